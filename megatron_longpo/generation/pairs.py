"""A model generates its own short-to-long pairs from plain documents (LongPO, arXiv 2502.13922, section 3), in stages.

    documents -> questions -> short answers (chosen) -> long answers (rejected) -> filters -> preference JSONL

Each stage is a file with one line for each line of the stage before, appended as it is made: a killed run resumes after its
last whole line. A stage's manifest records what determines its lines, so that it is never resumed with other settings. Random
draws depend only on the seed and the document, and each document is answered by itself, so the result does not depend on how
the work was split or interrupted. The parts of a split run are merged by ``merging.merge``.

    OUTPUT.work/part-00-of-03/documents.jsonl  .manifest.json      and questions, short, long
    OUTPUT  OUTPUT.rejects.jsonl  OUTPUT.report/report.html  report.json
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_longpo.engines.base import MODEL_ROPE, Engine, Prompt, Reply, Rope, Sampling
from megatron_longpo.errors import DataError
from megatron_longpo.generation.chunks import Span, digest, group_units, take_units, units_of
from megatron_longpo.generation.filters import LanguageFilter, is_refusal, questions_in, why_not_ask
from megatron_longpo.generation.settings import GenerationConfig
from megatron_longpo.generation.stages import (
    STAGES,
    Line,
    Stage,
    joined,
    part_folder,
    part_folders,
    work_folder,
    write_config,
)
from megatron_longpo.runtime.files import HOLDER_FILE, FolderLock
from megatron_longpo.runtime.json_lines import decode_line
from megatron_longpo.runtime.log import log
from megatron_longpo.runtime.progress import Progress
from megatron_longpo.text.chat import load_tokenizer, user_message
from megatron_longpo.text.documents import MOST_BROKEN, RawDocument, find_files, read_documents
from megatron_longpo.text.template_kwargs import parse_template_kwargs

# Characters of a text that are kept to show why something was skipped.
DETAIL_CHARACTERS = 300
# Half a hash keeps the set of documents seen small.
_DUPLICATE_KEY_BYTES = 16
# Times that the texts of the documents are stored.
_COPIES = 2
# Documents queued per worker: enough to keep it busy, few enough to keep memory flat.
_DOCUMENTS_PER_WORKER = 4

# --------------------------------------------------------------------------------------------------
# Documents
# --------------------------------------------------------------------------------------------------


class Cutter:
    """Cuts a document into its parts and their chunks.

    Args:
        config: lengths, tokenizer and seed.
    """

    def __init__(self, config: GenerationConfig) -> None:
        self.config = config
        path = config.engine.tokenizer or config.engine.model
        assert path is not None
        self.tokenizer = load_tokenizer(
            path,
            config.engine.chat_template,
            template_seconds=config.engine.template_seconds,
            template_memory_bytes=config.engine.template_memory_bytes,
            template_kwargs=parse_template_kwargs(config.engine.chat_template_kwargs),
        )
        self._specials = [t for t in self.tokenizer.special_texts if t]

    def lines(self, number: int, raw: RawDocument) -> list[Line]:
        """Lines of the documents stage: one, or several if an overlong document is split."""
        documents = self.config.documents
        base: Line = {"number": number, "part": 0, "name": raw.name, "domain": raw.domain, "broken": raw.broken}
        if raw.error:
            return [{**base, "reason": raw.error}]
        text = raw.text.strip()
        if not text:
            return [{**base, "reason": "empty"}]
        if raw.broken > MOST_BROKEN * len(text):
            return [{**base, "reason": "not_text"}]
        if any(special in text for special in self._specials):
            # In a prompt it would end a turn, and preprocessing skips texts with it.
            return [{**base, "reason": "special_token_in_text"}]
        smallest, largest = self.config.chunk_tokens
        shortest, longest = self.config.document_tokens
        # Units this small can always be grouped to a length between the two limits.
        units = units_of(text, raw.domain, self.tokenizer.count, max(1, min(largest - smallest, longest)))
        total = sum(u.tokens for u in units)
        if total < shortest:
            return [{**base, "reason": "document_too_short", "tokens": total}]
        if total > longest and documents.overlong == "drop":
            return [{**base, "reason": "document_too_long", "tokens": total}]
        lines: list[Line] = []
        first = 0
        while first < len(units):
            span, after = take_units(units, longest, first)
            part = {**base, "part": len(lines)}
            if span.tokens >= shortest:
                lines.append({**part, **self._part(text, units[first:after], span)})
            elif documents.overlong == "split":
                lines.append({**part, "reason": "document_too_short", "tokens": span.tokens})
            first = after
            if documents.overlong != "split":
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
    """Generator for one draw, which depends only on the seed and on what the draw is for.

    Args:
        seed: seed of the run.
        keys: what the draw is for, as JSON values.
    """
    text = json.dumps([seed, *keys])
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little"))


def seed_of(seed: int, *keys: Any) -> int:
    """Sampling seed of one prompt; see ``rng_of``."""
    return int(rng_of(seed, *keys).integers(2**31))


# Set once in each worker process.
_cutter: Cutter | None = None


def _start_worker(config: GenerationConfig) -> None:
    global _cutter
    _cutter = Cutter(config)


def _cut(number: int, raw: RawDocument) -> list[Line]:
    assert _cutter is not None
    return _cutter.lines(number, raw)


def _own_documents(
    config: GenerationConfig, rank: int, world_size: int, skip_before: int
) -> Iterator[tuple[int, RawDocument]]:
    """Documents of this part from number ``skip_before`` on. All documents are read, to find duplicates."""
    documents = config.documents
    document_batch = config.document_batch
    seen: set[bytes] = set()
    for raw in itertools.islice(
        read_documents(
            find_files(documents.documents, documents.domain, config.reading, split=documents.split),
            documents.text_column,
            config.reading,
        ),
        documents.max_documents,
    ):
        error = raw.error
        if error is None:
            key = hashlib.sha256(raw.text.encode("utf-8", errors="surrogatepass")).digest()[:_DUPLICATE_KEY_BYTES]
            if key in seen and raw.text.strip():
                error = "duplicate"
            seen.add(key)
        # Documents that are answered together belong to the same part.
        if raw.number // document_batch % world_size == rank and raw.number >= skip_before:
            yield raw.number, dataclasses.replace(raw, text="" if error else raw.text, error=error)


def cut_documents(config: GenerationConfig, stage: Stage, rank: int, world_size: int) -> None:
    """Run the documents stage, or resume it.

    Args:
        config: what is read and how it is cut.
        stage: file of the stage.
        rank, world_size: which part of how many.

    Raises:
        DataError: the input cannot be read, or a worker died.
    """
    # A document with missing lines is cut again.
    last = _drop_unfinished(stage) if stage.records else -1
    with stage, Progress("documents") as progress:
        for lines in _cut_all(config, _own_documents(config, rank, world_size, last + 1)):
            stage.append(lines)
            progress.add(1, tokens=sum(line.get("tokens", 0) for line in lines))
    stage.finish()


def _drop_unfinished(stage: Stage) -> int:
    """Drop the lines of an incomplete document; returns the number of the last complete one, or -1."""
    end = count = whole_end = whole_count = 0
    last = -1
    with open(stage.path, "rb+") as stream:
        for raw in stream:
            try:
                line = decode_line(raw)
                is_last = line["part"] + 1 == line.get("parts", 1)
            except (ValueError, KeyError, TypeError):
                raise DataError(f"{stage.path}: line {count + 1} is damaged; start again with --restart") from None
            end, count = end + len(raw), count + 1
            if is_last:
                whole_end, whole_count, last = end, count, line["number"]
        stream.truncate(whole_end)
    stage.records = whole_count
    return int(last)


def _cut_all(config: GenerationConfig, documents: Iterator[tuple[int, RawDocument]]) -> Iterator[list[Line]]:
    """Lines of each document, in order, by ``workers`` processes."""
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
                if len(under_way) >= _DOCUMENTS_PER_WORKER * workers:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            f"one of {workers} workers died, probably out of memory; rerun with fewer --workers to resume"
        ) from None


# --------------------------------------------------------------------------------------------------
# Questions and answers
# --------------------------------------------------------------------------------------------------


def ask(config: GenerationConfig, engine: Engine, lines: Sequence[Line]) -> list[Line]:
    """Lines of the questions stage for lines of the documents stage: a turn for each chunk, or the reason why not."""
    questions, seed = config.questions, config.run.seed
    instruction = questions.question_prompt.format(count=questions.questions_per_chunk)
    sampling = Sampling(
        max_tokens=questions.question_tokens, temperature=questions.question_temperature, top_p=questions.question_top_p
    )
    turns: list[list[Line | None]] = [[None] * len(line.get("chunks", ())) for line in lines]
    spent = [_Spent() for _ in lines]
    for attempt in range(questions.question_tries):
        # Chunks without a turn, or without a usable question so far.
        open_ = [[i for i, t in enumerate(row) if t is None or "reason" in t] for row in turns]
        groups, owners = [], []
        for number, (line, places) in enumerate(zip(lines, open_, strict=True)):
            if places:
                owners.append(number)
                groups.append(
                    [
                        Prompt(
                            messages=(user_message(chunk_text(line, i), instruction),),
                            seed=seed_of(seed, line["id"], line["chunks"][i], "question", attempt),
                        )
                        for i in places
                    ]
                )
        if not groups:
            break
        replies_of = _timed(engine, groups, sampling, MODEL_ROPE, [spent[number] for number in owners])
        for number, replies in zip(owners, replies_of, strict=True):
            for i, reply in zip(open_[number], replies, strict=True):
                rng = rng_of(seed, lines[number]["id"], lines[number]["chunks"][i], "draw", attempt)
                turns[number][i] = _turn(reply, config, instruction, rng)
    return [_line_of(line, row, s) for line, row, s in zip(lines, turns, spent, strict=True)]


def _turn(reply: Reply, config: GenerationConfig, instruction: str, rng: np.random.Generator) -> Line:
    """A turn with one of the reply's questions, or the reason why not."""
    questions = config.questions
    if reply.no_answer:
        return _unanswered(reply, "questions")
    found = questions_in(reply.text, questions.question_pattern)
    if len(found) != questions.questions_per_chunk:
        return {"reason": "wrong_number_of_questions", "detail": f"{len(found)}: {reply.text[:DETAIL_CHARACTERS]}"}
    question = found[int(rng.integers(len(found)))]
    lead_in = questions.lead_ins[int(rng.integers(len(questions.lead_ins)))]
    reason = why_not_ask(question, instruction, config.filters)
    if reason:
        return {"reason": reason, "detail": question[:DETAIL_CHARACTERS]}
    return {"question": question, "instruction": lead_in + question}


def answer_short(config: GenerationConfig, engine: Engine, lines: Sequence[tuple[Line, Line]]) -> list[Line]:
    """Lines of the short stage: an answer to each turn on its chunk (chosen)."""
    answers = config.answers
    return _answer(
        config,
        engine,
        [(document, questions, None) for document, questions in lines],
        stage="short",
        text_of=chunk_text,
        sampling=Sampling(
            max_tokens=answers.answer_tokens, temperature=answers.answer_temperature, top_p=answers.answer_top_p
        ),
        rope=MODEL_ROPE,
    )


def answer_long(config: GenerationConfig, engine: Engine, lines: Sequence[tuple[Line, Line, Line]]) -> list[Line]:
    """Lines of the long stage: an answer on the whole document (rejected) to each turn that may still be kept."""
    answers = config.answers
    numbers = {
        "factor": answers.rotary_scaling_factor,
        "original_max_position_embeddings": answers.original_max_position_embeddings,
    }
    scaling = (
        None
        if answers.rope_type is None
        else {"rope_type": answers.rope_type, **{k: v for k, v in numbers.items() if v}}
    )
    max_tokens, temperature, top_p = config.long_sampling
    return _answer(
        config,
        engine,
        lines,
        stage="long",
        text_of=lambda document, _turn: str(document["text"]),
        sampling=Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p),
        rope=Rope(base=answers.rotary_base, scaling=scaling),
    )


def _answer(
    config: GenerationConfig,
    engine: Engine,
    lines: Sequence[tuple[Line, Line, Line | None]],
    *,
    stage: Literal["short", "long"],
    text_of: Callable[[Line, int], str],
    sampling: Sampling,
    rope: Rope,
) -> list[Line]:
    """Answer the turns of some documents.

    Args:
        config: filters and seed.
        engine: who answers.
        lines: for each document its lines of the stages documents, questions and, in the long stage, short.
        stage: stage whose lines are made.
        text_of: text on which a turn of a document is answered.
        sampling: how to decode.
        rope: RoPE of the engine.
    """
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
                        messages=(user_message(text_of(document, i), questions["turns"][i]["instruction"]),),
                        seed=seed_of(config.run.seed, document["id"], document["chunks"][i], stage),
                    )
                    for i in asked
                ]
            )
    spent = [_Spent() for _ in lines]
    replies_of = _timed(engine, groups, sampling, rope, [spent[number] for number in owners]) if groups else []
    for number, asked, replies in zip(owners, places, replies_of, strict=True):
        for i, reply in zip(asked, replies, strict=True):
            turns[number][i] = _answered(reply, config, stage)
    return [_line_of(d, row, s) for (d, _, _), row, s in zip(lines, turns, spent, strict=True)]


def _answered(reply: Reply, config: GenerationConfig, stage: Literal["short", "long"]) -> Line:
    """An answered turn, with the reason if it is already known that it will not be kept."""
    side = "chosen" if stage == "short" else "rejected"
    filters = config.filters
    # Thinking is no part of the row.
    new_tokens = reply.new_tokens - reply.thinking_tokens
    line: Line = {"text": reply.text, "prompt_tokens": reply.prompt_tokens, "new_tokens": new_tokens}
    if reply.no_answer not in (None, "empty"):
        return {**line, **_unanswered(reply, side)}
    if not reply.finished and not filters.keep_truncated:
        return {**line, "reason": f"truncated_{side}", "detail": reply.text[:DETAIL_CHARACTERS]}
    if stage == "short":
        # Saves reading the long document for a turn that will not be kept.
        if not reply.text:
            return {**line, "reason": "empty_chosen"}
        if is_refusal(reply.text, filters):
            return {**line, "reason": "refusal_chosen", "detail": reply.text[:DETAIL_CHARACTERS]}
        if reply.prompt_tokens + new_tokens > filters.short_seq_length:
            return {**line, "reason": "short_row_too_long", "detail": str(reply.prompt_tokens + new_tokens)}
    return line


def _unanswered(reply: Reply, what: str) -> Line:
    """Reason and detail for a reply that is no answer; ``what`` it should have been."""
    if reply.no_answer == "refused":
        return {"reason": "prompt_refused", "detail": reply.refused}
    return {"reason": f"{reply.no_answer}_{what}", "detail": reply.declined or ""}


@dataclass
class _Spent:
    """Tokens and seconds that a line took."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    seconds: float = 0.0


def _timed(
    engine: Engine,
    groups: Sequence[Sequence[Prompt]],
    sampling: Sampling,
    rope: Rope,
    spent: Sequence[_Spent],
) -> list[list[Reply]]:
    """Answer groups of prompts, and add what each group took to its entry of ``spent``; time is divided equally."""
    began = time.monotonic()
    replies_of = engine.answer(groups, sampling, rope)
    share = (time.monotonic() - began) / len(groups)
    for entry, replies in zip(spent, replies_of, strict=True):
        entry.prompt_tokens += sum(r.prompt_tokens for r in replies)
        entry.new_tokens += sum(r.new_tokens for r in replies)
        entry.seconds += share
    return replies_of


def _line_of(document: Line, turns: Sequence[Line | None], spent: _Spent) -> Line:
    return {
        "number": document["number"],
        "part": document["part"],
        "turns": list(turns),
        "prompt_tokens": spent.prompt_tokens,
        "new_tokens": spent.new_tokens,
        "seconds": round(spent.seconds, 3),
    }


def chunk_text(document: Line, turn: int) -> str:
    """Text of a turn's chunk."""
    start, end, _ = document["chunks"][turn]
    return str(document["text"][start:end])


# --------------------------------------------------------------------------------------------------
# A part of a run
# --------------------------------------------------------------------------------------------------


def stage_identities(
    config: GenerationConfig, engine_identity: dict[str, Any], files: Any
) -> dict[str, dict[str, Any]]:
    """Everything that determines the lines of each stage.

    Args:
        config: the configuration.
        engine_identity: identity of the engine.
        files: names, sizes and domains of the input files.
    """
    sections = config.as_dict()
    own = {k: v for k, v in sections["documents"].items() if k not in ("documents", "split", "workers")}
    engine = config.engine
    cut = {
        **own,
        "files": files,
        "seed": config.run.seed,
        "answer_tokens": sections["answers"]["answer_tokens"],
        "document_tokens": list(config.document_tokens),
        "tokenizer": engine.tokenizer or engine.model,
    }
    asked = {**cut, **sections["questions"], **engine_identity}
    asked |= {k: sections["filters"][k] for k in ("max_quoted_words", "min_question_words", "max_question_words")}
    short = {**asked, **{k: sections["answers"][k] for k in ("answer_tokens", "answer_temperature", "answer_top_p")}}
    short |= {
        k: sections["filters"][k] for k in ("refusals", "refusal_characters", "keep_truncated", "short_seq_length")
    }
    return {"documents": cut, "questions": asked, "short": short, "long": {**short, **sections["answers"]}}


def make_part(
    config: GenerationConfig,
    engine: Engine,
    rank: int,
    world_size: int,
    *,
    restart: bool = False,
    on_discarded: Callable[[], None] = lambda: None,
) -> None:
    """Run all stages of one part, or resume them.

    Args:
        config: the configuration.
        engine: who asks and answers.
        rank, world_size: which part of how many.
        restart: delete what an earlier run made of this part.
        on_discarded: called when that is deleted.

    Raises:
        DataError: the input cannot be read, the stages were made with other settings, or another process works on this part.
        LongPOError: the engine cannot answer.
    """
    assert config.run.output is not None
    output = Path(config.run.output)
    folder = part_folder(output, rank, world_size)
    folder.mkdir(parents=True, exist_ok=True)
    _refuse_another_split(output, world_size, restart=restart)
    with FolderLock(folder, record=True):
        if restart:
            for path in folder.iterdir():
                if path.name != HOLDER_FILE:
                    path.unlink()
            on_discarded()
        inputs = find_files(
            config.documents.documents, config.documents.domain, config.reading, split=config.documents.split
        )
        files = [[path.name, path.stat().st_size, domain] for path, domain in inputs]
        if rank == 0:
            _warn_of_space(folder, sum(path.stat().st_size for path, _ in inputs))
        # Raises where languages cannot be recognised; merging, hours later, would be too late.
        LanguageFilter(config.filters.languages, config.filters.min_language_probability)
        identities = stage_identities(config, engine.identity, files)
        stages = {name: Stage(folder, name, identities[name]) for name in STAGES}
        write_config(output, config)
        if not stages["documents"].finished:
            engine.check_ready()
            cut_documents(config, stages["documents"], rank, world_size)
        _run(stages, "questions", engine, lambda rows: ask(config, engine, [document for (document,) in rows]))
        _run(stages, "short", engine, lambda rows: answer_short(config, engine, rows))
        _run(stages, "long", engine, lambda rows: answer_long(config, engine, rows))


def _warn_of_space(folder: Path, size: int) -> None:
    """Log if the disk may be too small for the texts of the documents, which the stages and the merged file each hold."""
    free = shutil.disk_usage(folder).free
    if free < _COPIES * size:
        log(f"note: the documents have {size / 1e9:.2f} GB and are stored twice; {folder} has {free / 1e9:.2f} GB free")


def _refuse_another_split(output: Path, world_size: int, *, restart: bool) -> None:
    others = {p.name.split("-of-")[1] for p in part_folders(output)} - {f"{world_size:02d}"}
    if others and not restart:
        raise DataError(
            f"{work_folder(output)}: holds a run split in {int(min(others))} parts, not {world_size}; use that "
            "--world-size to resume, another --output, or --restart to start again"
        )
    if restart:
        for old in part_folders(output):
            if old.name.split("-of-")[1] in others:
                shutil.rmtree(old, ignore_errors=True)


def _run(stages: dict[str, Stage], name: str, engine: Engine, work: Callable[[list[Any]], list[Line]]) -> None:
    """Run a stage, or resume it, some documents at a time.

    Args:
        stages: all stages.
        name: stage to run.
        engine: decides how many documents are worked on together.
        work: makes the lines of documents from their lines in the stages before.
    """
    stage = stages[name]
    if stage.finished:
        return
    before = STAGES[: STAGES.index(name)]
    total = stages["documents"].records
    rows: Iterable[tuple[Line, ...]] = joined([stages[b].path for b in before])
    if engine.document_batch == 1:
        batches = _batched(rows, engine.groups_at_once, skip=stage.records)
    else:
        batches = _undone(_document_batches(rows, engine.document_batch), stage)
    # Taken before the stage is opened and counted, because it drops the lines of an incomplete batch.
    first = list(itertools.islice(batches, 1))
    with stage, Progress(name, total, done=stage.records) as progress:
        for batch in itertools.chain(first, batches):
            lines = work(batch)
            stage.append(lines)
            progress.add(len(lines), tokens=sum(line["prompt_tokens"] + line["new_tokens"] for line in lines))
    assert stage.records == total
    stage.finish()


def _batched(rows: Iterable[Any], size: int, *, skip: int) -> Iterator[list[Any]]:
    """Rows from number ``skip`` on, ``size`` at a time."""
    iterator = itertools.islice(rows, skip, None)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _document_batches(rows: Iterable[tuple[Line, ...]], size: int) -> Iterator[list[Any]]:
    """Rows grouped by the documents that are answered together."""
    for _, group in itertools.groupby(rows, key=lambda row: row[0]["number"] // size):
        yield list(group)


def _undone(batches: Iterator[list[Any]], stage: Stage) -> Iterator[list[Any]]:
    """Batches whose lines are not all in the stage; the lines of an incomplete batch are dropped first."""
    done = 0
    for batch in batches:
        if done + len(batch) <= stage.records:
            done += len(batch)
            continue
        if done < stage.records:
            stage.drop_after(done)
        yield batch
        done += len(batch)
