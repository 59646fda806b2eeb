"""A model makes its own short-to-long pairs from plain documents (LongPO, arXiv 2502.13922, section 3), in stages.

    documents -> questions -> short answers (chosen) -> long answers (rejected) -> filters -> preference JSONL

Each stage is a file of lines, one for each line of the stage before, appended as they are made: a run that is killed goes
on after its last whole line. A stage's manifest holds what made it, so that it is not gone on with under other settings.
What is drawn is drawn by seed and document, and a document is answered by itself, so that the result does not depend on
how the work is split or broken off. The parts of a split run are merged by ``merging.merge``.

    OUTPUT.work/part-00-of-03/documents.jsonl  .manifest.json      and questions, short, long
    OUTPUT  OUTPUT.rejects.jsonl  OUTPUT.report/report.html  report.json
"""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from megatron_longpo.engines.base import Engine, Prompt, Reply, Rope, Sampling
from megatron_longpo.errors import DataError
from megatron_longpo.generation.chunks import Span, digest, group_units, take_units, units_of
from megatron_longpo.generation.filters import LanguageFilter, is_refusal, questions_in, why_not_ask
from megatron_longpo.generation.settings import GenerationConfig
from megatron_longpo.generation.stages import STAGES, Line, Stage, part_folder, part_folders, read_lines, work_folder
from megatron_longpo.runtime.files import FolderLock, write_atomically
from megatron_longpo.runtime.progress import Progress
from megatron_longpo.text.chat import load_tokenizer, user_message
from megatron_longpo.text.documents import MOST_BROKEN, RawDocument, find_files, read_documents

# --------------------------------------------------------------------------------------------------
# Documents
# --------------------------------------------------------------------------------------------------

_cutter: Any = None


class Cutter:
    """Cuts a document into its parts and their chunks.

    Args:
        config: lengths and seed.
    """

    def __init__(self, config: GenerationConfig) -> None:
        self.config = config
        e = config.engine
        path = e.tokenizer or e.model
        assert path is not None
        self.tokenizer = load_tokenizer(path, e.chat_template)
        self._specials = [t for t in self.tokenizer.special_texts if t]

    def lines(self, number: int, raw: RawDocument) -> list[Line]:
        """Lines of the documents stage: one, or several where an overlong document is split."""
        d = self.config.documents
        base: Line = {"number": number, "part": 0, "name": raw.name, "domain": raw.domain, "broken": raw.broken}
        if raw.error:
            return [{**base, "reason": raw.error}]
        text = raw.text.strip()
        if not text:
            return [{**base, "reason": "empty"}]
        if raw.broken > MOST_BROKEN * len(text):
            return [{**base, "reason": "not_text"}]
        if any(special in text for special in self._specials):
            # In a prompt it would end a turn, and the data tools refuse it.
            return [{**base, "reason": "special_token_in_text"}]
        smallest, largest = self.config.chunk_tokens
        shortest, longest = self.config.document_tokens
        # So that any run of units can be brought between the two.
        units = units_of(text, raw.domain, self.tokenizer.count, max(1, min(largest - smallest, longest)))
        total = sum(u.tokens for u in units)
        if total < shortest:
            return [{**base, "reason": "document_too_short", "tokens": total}]
        if total > longest and d.overlong == "drop":
            return [{**base, "reason": "document_too_long", "tokens": total}]
        lines: list[Line] = []
        first = 0
        while first < len(units):
            span, after = take_units(units, longest, first)
            part = {**base, "part": len(lines)}
            if span.tokens >= shortest:
                lines.append({**part, **self._part(text, units[first:after], span)})
            elif d.overlong == "split":
                lines.append({**part, "reason": "document_too_short", "tokens": span.tokens})
            first = after
            if d.overlong != "split":
                break
        for line in lines:
            line["parts"] = len(lines)
        return lines or [{**base, "reason": "document_too_short", "tokens": total}]

    def _part(self, text: str, units: Sequence[Span], span: Span) -> Line:
        context = text[span.start : span.end]
        name = digest(context)
        chunks = group_units(units, *self.config.chunk_tokens)
        rng = rng_of(self.config.run.seed, name, "chunks")
        drawn = sorted(rng.permutation(len(chunks))[: self.config.documents.chunks_per_document].tolist())
        line: Line = {"id": name, "tokens": span.tokens, "text": context}
        if not drawn:
            return {**line, "reason": "no_chunk", "text": ""}
        picked = [chunks[i] for i in drawn]
        return {**line, "chunks": [[c.start - span.start, c.end - span.start, c.tokens] for c in picked]}


def rng_of(seed: int, *keys: Any) -> np.random.Generator:
    """Random numbers of their own for a seed and a thing."""
    text = json.dumps([seed, *keys])
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little"))


def seed_of(seed: int, *keys: Any) -> int:
    return int(rng_of(seed, *keys).integers(2**31))


def _start_worker(config: GenerationConfig) -> None:
    global _cutter
    _cutter = Cutter(config)


def _cut(number: int, raw: RawDocument) -> list[Line]:
    return list(_cutter.lines(number, raw))


def _own_documents(
    config: GenerationConfig, rank: int, world_size: int, skip_before: int
) -> Iterator[tuple[int, RawDocument]]:
    """This part's documents from a number on. Repetitions are told from all documents, so all are read."""
    d = config.documents
    document_batch = config.document_batch
    seen: set[bytes] = set()
    for raw in itertools.islice(read_documents(find_files(d.documents, d.domain), d.text_column), d.max_documents):
        error = raw.error
        if error is None:
            key = hashlib.sha256(raw.text.encode("utf-8", errors="surrogatepass")).digest()[:16]
            if key in seen and raw.text.strip():
                error = "duplicate"
            seen.add(key)
        # Documents that are answered together stay together.
        if raw.number // document_batch % world_size == rank and raw.number >= skip_before:
            text = "" if error else raw.text
            yield raw.number, RawDocument(raw.number, raw.name, raw.domain, text, raw.broken, error)


def cut_documents(config: GenerationConfig, stage: Stage, rank: int, world_size: int) -> None:
    """The documents stage.

    Raises:
        DataError: input that cannot be read, or a worker that died.
    """
    # A document whose lines are not all there is cut again.
    last = _drop_unfinished(stage) if stage.records else -1
    with stage, Progress("documents", None) as progress:
        for lines in _cut_all(config, _own_documents(config, rank, world_size, last + 1)):
            stage.append(lines)
            progress.add(1, sum(line.get("tokens", 0) for line in lines))
    stage.finish()


def _drop_unfinished(stage: Stage) -> int:
    """Number of the last document whose lines are all there; others are cut off."""
    end = count = whole_end = whole_count = 0
    last = -1
    with open(stage.path, "rb+") as stream:
        for raw in stream:
            try:
                line = json.loads(raw)
                is_last = line["part"] + 1 == line.get("parts", 1)
            except (ValueError, KeyError, TypeError):
                raise DataError(f"{stage.path}: line {count + 1} is damaged; begin again with --restart") from None
            end, count = end + len(raw), count + 1
            if is_last:
                whole_end, whole_count, last = end, count, line["number"]
        stream.truncate(whole_end)
    stage.records = whole_count
    return int(last)


def _cut_all(config: GenerationConfig, documents: Iterator[tuple[int, RawDocument]]) -> Iterator[list[Line]]:
    """Lines of documents, in order, by as many processes as are asked for."""
    workers = config.documents.workers
    if workers == 1:
        cutter = Cutter(config)
        for number, raw in documents:
            yield cutter.lines(number, raw)
        return
    context = multiprocessing.get_context("spawn")
    under_way: deque[Future[list[Line]]] = deque()
    try:
        with ProcessPoolExecutor(workers, context, _start_worker, (config,)) as pool:
            for number, raw in documents:
                under_way.append(pool.submit(_cut, number, raw))
                # Few at a time, so that memory stays flat.
                if len(under_way) >= 4 * workers:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            "a worker process died (out of memory?); lower --workers; the same command goes on where it was"
        ) from None


# --------------------------------------------------------------------------------------------------
# Questions and answers
# --------------------------------------------------------------------------------------------------


def ask(config: GenerationConfig, engine: Engine, lines: Sequence[Line]) -> list[Line]:
    """Lines of the questions stage for lines of the documents stage: one turn for each chunk, or why there is none."""
    q, seed = config.questions, config.run.seed
    told = q.question_prompt.format(count=q.questions_per_chunk)
    sampling = Sampling(q.question_tokens, q.question_temperature, q.question_top_p)
    turns: list[list[Line | None]] = [[None] * len(line.get("chunks", ())) for line in lines]
    spent = [_Spent() for _ in lines]
    for attempt in range(q.question_tries):
        # Chunks that have no turn yet, or one with a reason not to ask that another try may lift.
        open_ = [[i for i, t in enumerate(row) if t is None or "reason" in t] for row in turns]
        groups, owners = [], []
        for number, (line, places) in enumerate(zip(lines, open_, strict=True)):
            if places:
                owners.append(number)
                groups.append(
                    [
                        Prompt(
                            (user_message(chunk_text(line, i), told),),
                            seed_of(seed, line["id"], line["chunks"][i], "question", attempt),
                        )
                        for i in places
                    ]
                )
        if not groups:
            break
        for number, replies in zip(owners, _timed(engine, groups, sampling, Rope(), spent, owners), strict=True):
            for i, reply in zip(open_[number], replies, strict=True):
                rng = rng_of(seed, lines[number]["id"], lines[number]["chunks"][i], "draw", attempt)
                turns[number][i] = _turn(reply, config, told, rng)
    return [_line_of(line, row, s) for line, row, s in zip(lines, turns, spent, strict=True)]


def _turn(reply: Reply, config: GenerationConfig, told: str, rng: np.random.Generator) -> Line:
    q = config.questions
    if reply.refused:
        return {"reason": "prompt_refused", "detail": reply.refused}
    found = questions_in(reply.text, q.question_pattern)
    if len(found) != q.questions_per_chunk:
        return {"reason": "wrong_number_of_questions", "detail": f"{len(found)}: {reply.text[:300]}"}
    question = found[int(rng.integers(len(found)))]
    lead_in = q.lead_ins[int(rng.integers(len(q.lead_ins)))]
    reason = why_not_ask(question, told, config.filters)
    if reason:
        return {"reason": reason, "detail": question[:300]}
    return {"question": question, "instruction": lead_in + question}


def answer_short(config: GenerationConfig, engine: Engine, lines: Sequence[tuple[Line, Line]]) -> list[Line]:
    """Lines of the short stage: each turn's answer on its chunk (chosen)."""

    def text(document: Line, turn: int) -> str:
        return chunk_text(document, turn)

    return _answer(config, engine, [(d, q, None) for d, q in lines], text, "short", Rope())


def answer_long(config: GenerationConfig, engine: Engine, lines: Sequence[tuple[Line, Line, Line]]) -> list[Line]:
    """Lines of the long stage: each turn's answer on the whole document (rejected), if its turn can still be kept."""
    a = config.answers
    numbers = {
        "factor": a.rotary_scaling_factor,
        "original_max_position_embeddings": a.original_max_position_embeddings,
    }
    scaling = None if a.rope_type is None else {"rope_type": a.rope_type, **{k: v for k, v in numbers.items() if v}}

    def text(document: Line, _turn: int) -> str:
        return str(document["text"])

    return _answer(config, engine, lines, text, "long", Rope(a.rotary_base, scaling))


def _answer(
    config: GenerationConfig,
    engine: Engine,
    lines: Sequence[tuple[Line, Line, Line | None]],
    text: Callable[[Line, int], str],
    stage: str,
    rope: Rope,
) -> list[Line]:
    a, seed = config.answers, config.run.seed
    turns: list[list[Line | None]] = []
    groups, owners, places = [], [], []
    for number, (document, questions, short) in enumerate(lines):
        row: list[Line | None] = [None] * len(questions.get("turns", ()))
        asked = []
        for i, turn in enumerate(questions.get("turns", ())):
            before = turn if short is None or "reason" in turn else short["turns"][i]
            if "reason" in before:
                row[i] = {"reason": "before"}
            else:
                asked.append(i)
        turns.append(row)
        if asked:
            owners.append(number)
            places.append(asked)
            groups.append(
                [
                    Prompt(
                        (user_message(text(document, i), questions["turns"][i]["instruction"]),),
                        seed_of(seed, document["id"], document["chunks"][i], stage),
                    )
                    for i in asked
                ]
            )
    spent = [_Spent() for _ in lines]
    usual = (a.answer_tokens, a.answer_temperature, a.answer_top_p)
    sampling = Sampling(*(usual if stage == "short" else config.long_sampling))
    replies = _timed(engine, groups, sampling, rope, spent, owners) if groups else []
    for number, asked, row_replies in zip(owners, places, replies, strict=True):
        for i, reply in zip(asked, row_replies, strict=True):
            turns[number][i] = _answered(reply, config, stage)
    return [_line_of(d, row, s) for (d, _, _), row, s in zip(lines, turns, spent, strict=True)]


def _answered(reply: Reply, config: GenerationConfig, stage: str) -> Line:
    side = "chosen" if stage == "short" else "rejected"
    f = config.filters
    line: Line = {"text": reply.text, "prompt_tokens": reply.prompt_tokens, "new_tokens": reply.new_tokens}
    if reply.refused:
        return {**line, "reason": "prompt_refused", "detail": reply.refused}
    if not reply.finished and not f.keep_truncated:
        return {**line, "reason": f"truncated_{side}", "detail": reply.text[:300]}
    if stage == "short":
        # No long document is read for an answer that will not be kept.
        if not reply.text:
            return {**line, "reason": "empty_chosen"}
        if is_refusal(reply.text, f):
            return {**line, "reason": "refusal_chosen", "detail": reply.text[:300]}
        if reply.prompt_tokens + reply.new_tokens > f.short_seq_length:
            return {**line, "reason": "short_row_too_long", "detail": str(reply.prompt_tokens + reply.new_tokens)}
    return line


class _Spent:
    """Tokens and seconds of a line."""

    def __init__(self) -> None:
        self.prompt = self.new = 0
        self.seconds = 0.0


def _timed(
    engine: Engine,
    groups: Sequence[Sequence[Prompt]],
    sampling: Sampling,
    rope: Rope,
    spent: Sequence[_Spent],
    owners: Sequence[int],
) -> list[list[Reply]]:
    began = time.monotonic()
    replies = engine.answer(groups, sampling, rope)
    share = (time.monotonic() - began) / len(groups)
    for number, row in zip(owners, replies, strict=True):
        spent[number].prompt += sum(r.prompt_tokens for r in row)
        spent[number].new += sum(r.new_tokens for r in row)
        spent[number].seconds += share
    return replies


def _line_of(document: Line, turns: Sequence[Line | None], spent: _Spent) -> Line:
    return {
        "number": document["number"],
        "part": document["part"],
        "turns": list(turns),
        "prompt_tokens": spent.prompt,
        "new_tokens": spent.new,
        "seconds": round(spent.seconds, 3),
    }


def chunk_text(document: Line, turn: int) -> str:
    start, end, _ = document["chunks"][turn]
    return str(document["text"][start:end])


# --------------------------------------------------------------------------------------------------
# A part of a run
# --------------------------------------------------------------------------------------------------


def stage_identities(
    config: GenerationConfig, engine_identity: dict[str, Any], files: Any
) -> dict[str, dict[str, Any]]:
    """What makes the lines of each stage what they are."""
    c = config.as_dict()
    own = {k: v for k, v in c["documents"].items() if k not in ("documents", "workers")}
    e = config.engine
    cut = {
        **own,
        "files": files,
        "seed": config.run.seed,
        "answer_tokens": c["answers"]["answer_tokens"],
        "document_tokens": list(config.document_tokens),
        "tokenizer": e.tokenizer or e.model,
    }
    asked = {**cut, **c["questions"], **engine_identity}
    asked |= {k: c["filters"][k] for k in ("max_quoted_words", "min_question_words", "max_question_words")}
    short = {**asked, **{k: c["answers"][k] for k in ("answer_tokens", "answer_temperature", "answer_top_p")}}
    short |= {k: c["filters"][k] for k in ("refusals", "refusal_characters", "keep_truncated", "short_seq_length")}
    return {"documents": cut, "questions": asked, "short": short, "long": {**short, **c["answers"]}}


def make_part(config: GenerationConfig, engine: Engine, rank: int, world_size: int, *, restart: bool = False) -> None:
    """All stages of one part, from where they are.

    Raises:
        DataError: unreadable input, stages of other settings, another process at the same part.
        LongPOError: what the engine cannot do.
    """
    assert config.run.output is not None
    output = Path(config.run.output)
    folder = part_folder(output, rank, world_size)
    folder.mkdir(parents=True, exist_ok=True)
    _refuse_another_split(output, world_size, restart=restart)
    with FolderLock(folder):
        if restart:
            for path in folder.iterdir():
                path.unlink()
        files = [[f.name, f.stat().st_size, domain] for f, domain in _files(config)]
        LanguageFilter(config.filters.languages, config.filters.min_language_probability)
        identities = stage_identities(config, engine.identity, files)
        stages = {name: Stage(folder, name, identities[name]) for name in STAGES}
        write_atomically(work_folder(output) / "run.yaml", config.as_yaml().encode())
        if not stages["documents"].finished:
            cut_documents(config, stages["documents"], rank, world_size)
        _run(stages, "questions", ("documents",), engine, lambda rows: ask(config, engine, [r[0] for r in rows]))
        _run(
            stages,
            "short",
            ("documents", "questions"),
            engine,
            lambda rows: answer_short(config, engine, rows),
        )
        _run(
            stages,
            "long",
            ("documents", "questions", "short"),
            engine,
            lambda rows: answer_long(config, engine, rows),
        )


def _files(config: GenerationConfig) -> list[tuple[Path, Any]]:
    return find_files(config.documents.documents, config.documents.domain)


def _refuse_another_split(output: Path, world_size: int, *, restart: bool) -> None:
    others = {p.name.split("-of-")[1] for p in part_folders(output)} - {f"{world_size:02d}"}
    if others and not restart:
        raise DataError(
            f"{work_folder(output)}: holds a run split in {int(min(others))} parts, not {world_size}; give that "
            "--world-size to go on, another --output, or --restart to begin again"
        )
    if restart:
        import shutil

        for old in part_folders(output):
            if old.name.split("-of-")[1] in others:
                shutil.rmtree(old, ignore_errors=True)


def _run(
    stages: dict[str, Stage],
    name: str,
    before: Sequence[str],
    engine: Engine,
    work: Callable[[list[Any]], list[Line]],
) -> None:
    """One stage after those before it, a few documents at a time."""
    stage = stages[name]
    if stage.finished:
        return
    total = stages["documents"].records
    rows: Iterable[tuple[Line, ...]] = zip(*(read_lines(stages[b].path) for b in before), strict=True)
    batches = _document_batches(rows, engine.document_batch)
    if engine.document_batch == 1:
        batches = _batched((row for batch in batches for row in batch), engine.groups_at_once, stage.records)
    else:
        batches = _undone(batches, stage)
    with stage, Progress(name, total, done=stage.records) as progress:
        for batch in batches:
            lines = work(batch)
            stage.append(lines)
            progress.add(len(lines), sum(line["prompt_tokens"] + line["new_tokens"] for line in lines))
    assert stage.records == total
    stage.finish()


def _batched(rows: Iterable[Any], size: int, skip: int) -> Iterator[list[Any]]:
    iterator = itertools.islice(rows, skip, None)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _document_batches(rows: Iterable[tuple[Line, ...]], size: int) -> Iterator[list[Any]]:
    """Rows of the documents that are answered together."""
    for _, group in itertools.groupby(rows, key=lambda row: row[0]["number"] // size):
        yield list(group)


def _undone(batches: Iterator[list[Any]], stage: Stage) -> Iterator[list[Any]]:
    """Windows that are not all there; of one that a kill cut, the lines that are there go too."""
    done = 0
    for batch in batches:
        if done + len(batch) <= stage.records:
            done += len(batch)
            continue
        if done < stage.records:
            stage.drop_after(done)
        yield batch
        done += len(batch)
