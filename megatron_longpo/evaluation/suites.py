"""The suites that generate answers, from configuration to numbers: RULER, InfiniteBench, the needle map."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_longpo.engines.base import Engine, model_identity
from megatron_longpo.errors import ConfigError, DataError
from megatron_longpo.evaluation import infinitebench, needle, ruler, short_context
from megatron_longpo.evaluation.runner import (
    Answer,
    Results,
    SampleBatch,
    Share,
    by_engine,
    run,
    sample_batches,
    samples_per_batch,
)
from megatron_longpo.evaluation.settings import EvaluationConfig, names
from megatron_longpo.runtime.files import write_atomically
from megatron_longpo.text.documents import find_files, read_documents


def read_materials(c: EvaluationConfig) -> ruler.Materials:
    """Texts, words and questions that a configuration names.

    Raises:
        ConfigError, DataError: something is missing or cannot be read.
    """
    r = c.ruler
    essays = None
    if r.haystack:
        texts = []
        for document in read_documents(find_files(r.haystack, "other"), "text"):
            if document.error is None:
                texts.append(document.text)
            else:
                print(f"haystack: {document.name} is left out ({document.error})", flush=True)
        essays = "\n".join(texts)
        if not essays.strip():
            raise DataError(f"haystack={', '.join(r.haystack)}: holds no text; name other files")
    words = None
    if r.words is not None:
        try:
            words = Path(r.words).read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"--words {r.words}: cannot be read ({error}); name a text file with a word a line"
            ) from None
        words = [w.strip() for w in words if w.strip()]
    tasks = names(r.ruler_tasks) if "ruler" in c.suites else []
    materials = ruler.Materials(
        essays=essays,
        words=words,
        squad=ruler.read_squad(Path(r.squad)) if r.squad and "qa_1" in tasks else None,
        hotpotqa=ruler.read_hotpotqa(Path(r.hotpotqa)) if r.hotpotqa and "qa_2" in tasks else None,
    )
    materials.check(tasks)
    if "needle" in c.suites:
        _ = materials.essay_words
    return materials


@dataclasses.dataclass(frozen=True)
class SuiteInputs:
    """What the suites of a configuration need, read before any long work.

    Attributes:
        materials: of RULER and the needle map.
        books: rows and bad lines of InfiniteBench, by task.
        short: tasks of the harness.
    """

    materials: ruler.Materials
    books: dict[str, tuple[list[dict[str, Any]], list[infinitebench.BadLine]]]
    short: list[short_context.LoadedTask]


def prepare(c: EvaluationConfig) -> SuiteInputs:
    """Read everything that a configuration names.

    Raises:
        ConfigError, DataError: something is missing or cannot be read.
    """
    books, short = {}, []
    if "infinitebench" in c.suites:
        assert c.infinitebench.infinitebench is not None
        folder = Path(c.infinitebench.infinitebench)
        books = {t: infinitebench.read_task(folder, t) for t in names(c.infinitebench.infinitebench_tasks)}
    materials = read_materials(c)
    if "short" in c.suites:
        data = Path(c.short.short_data) if c.short.short_data else None
        short = short_context.load_tasks(names(c.short.short_tasks), data, c.short.short_limit, c.evaluate.seed)
    return SuiteInputs(materials, books, short)


def digest_of(materials: ruler.Materials) -> dict[str, str | None]:
    """Names for the content of materials."""

    def of(value: Any) -> str | None:
        if value is None:
            return None
        return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")).hexdigest()[:16]

    def pool(found: ruler.QuestionPool | None) -> str | None:
        return None if found is None else of([[dataclasses.astuple(q) for q in found.questions], found.documents])

    return {
        "haystack": of(materials.essays),
        "words": of(materials.common_words),
        "squad": pool(materials.squad),
        "hotpotqa": pool(materials.hotpotqa),
    }


@dataclasses.dataclass
class ReadySuite:
    """A suite that is ready to be run.

    Attributes:
        name: of the suite.
        batches: its samples.
        answer: how they are answered.
        results: its folder.
        metrics: numbers of its rows.
    """

    name: str
    batches: list[SampleBatch]
    answer: Answer
    results: Results
    metrics: Callable[[Sequence[dict[str, Any]]], dict[str, Any]]

    def run(self) -> dict[str, Any] | None:
        """All samples answered; on the process that reports what results.json says of the suite, else None."""
        try:
            self.results.wait_for_parts()
            rows = run(self.name, self.batches, self.answer, self.results)
        finally:
            self.results.close()
        if rows is None:
            return None
        return {"settings": self.results.settings, "asked": asked_of(rows), "metrics": self.metrics(rows)}


class Suites:
    """Makes ready the suites of one model.

    Args:
        config: checked.
        prepared: read.
        engine: of the model.
        share: this process.
        restart: forget what is there.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        prepared: SuiteInputs,
        engine: Engine,
        share: Share,
        *,
        restart: bool = False,
    ) -> None:
        self.config, self.engine, self.share, self.restart = config, engine, share, restart
        self.materials, self.books = prepared.materials, prepared.books
        assert config.evaluate.output is not None
        self.output = Path(config.evaluate.output)

    def count(self, message: str, prefix: str) -> int:
        return len(self.engine.tokenizer.prompt([{"role": "user", "content": message}], prefix))

    def samples_per_batch(self, samples: int) -> int:
        return samples_per_batch(samples, self.share.world_size, self.engine.groups_at_once)

    def begin(self, suite: str) -> ReadySuite:
        """A suite checked, with its folder open, before any long work.

        Raises:
            ConfigError, DataError: a sample cannot be made, or the folder holds something else.
        """
        version, settings, batches = {
            "ruler": self._ruler,
            "needle": self._needle,
            "infinitebench": self._infinitebench,
        }[suite]()
        settings = {
            "version": version,
            "model": self.engine.identity,
            "tokenizer": self.engine.tokenizer.vocabulary_hash,
            "seed": self.config.evaluate.seed,
            **settings,
        }
        results = Results(self.output / suite, settings, self.share, restart=self.restart)
        return ReadySuite(suite, batches, by_engine(self.engine), results, METRICS[suite])

    def _ruler(self) -> tuple[dict[str, int], dict[str, Any], list[SampleBatch]]:
        c = self.config
        made = ruler.Ruler(self.materials, self.count, c.evaluate.seed)
        cells = [(task, length) for task in names(c.ruler.ruler_tasks) for length in c.lengths]
        samples = c.evaluate.samples
        size = self.samples_per_batch(len(cells) * samples)
        batches = [
            batch
            for task, length in cells
            for batch in sample_batches("ruler", task, length, samples, size, partial(made.sample, task, length))
        ]
        for task in ("qa_1", "qa_2"):
            if task in names(c.ruler.ruler_tasks) and c.evaluate.samples > len(self.materials.pool(task).questions):
                raise ConfigError(
                    f"samples={c.evaluate.samples} is more than the {len(self.materials.pool(task).questions)} questions of "
                    f"{task}; lower it, or name a larger file"
                )
        # Too short a length is known before any long work.
        for length in c.lengths[:1]:
            for task in names(c.ruler.ruler_tasks):
                # Of questions the last one too: so many must fit.
                for index in (0, c.evaluate.samples - 1) if ruler.GROUPS[task] == "QA" else (0,):
                    made.sample(task, length, index)
        versions = {task: ruler.VERSIONS[task] for task in names(c.ruler.ruler_tasks)}
        return versions, {"materials": digest_of(self.materials)}, batches

    def _needle(self) -> tuple[int, dict[str, Any], list[SampleBatch]]:
        c, n = self.config, self.config.needle
        made = needle.NeedleMap(self.materials, self.count, c.evaluate.seed, n.needle_depths, n.needle_haystack)
        batches = []
        for length in c.lengths:
            for trial in range(n.needle_trials):
                keys = tuple(f"needle/depth {d:g}/{length}/{trial}" for d in made.depths)
                cost = length * (1 if n.needle_haystack == "shared" else len(keys))
                batches.append(SampleBatch(keys, float(cost), partial(made.trial, length, trial)))  # type: ignore[misc]
        settings = {
            "materials": {"haystack": digest_of(self.materials)["haystack"]},
            "depths": n.needle_depths,
            "haystacks": n.needle_haystack,
        }
        made.trial(c.lengths[0], 0)
        return needle.VERSION, settings, batches

    def _infinitebench(self) -> tuple[int, dict[str, Any], list[SampleBatch]]:
        c, i = self.config, self.config.infinitebench
        length = c.lengths[-1]
        batches: list[SampleBatch] = []
        digests, bad = {}, []
        counts = {task: min(len(rows), i.infinitebench_samples or len(rows)) for task, (rows, _) in self.books.items()}
        size = self.samples_per_batch(sum(counts.values()))
        for task, (rows, aside) in self.books.items():
            bad += aside
            text = json.dumps(rows, ensure_ascii=False)
            digests[task] = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]

            def make(number: int, rows: list[dict[str, Any]] = rows, task: str = task) -> Any:
                tokenizer, kind = self.engine.tokenizer, i.infinitebench_prompts
                return infinitebench.sample_of(rows[number], task, number, length, kind, tokenizer, self.count)

            batches += sample_batches("infinitebench", task, length, counts[task], size, make)
        if bad and self.share.rank == 0:
            path = self.output / "infinitebench.rejected.jsonl"
            self.output.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(dataclasses.asdict(b), ensure_ascii=False) + "\n" for b in bad]
            write_atomically(path, "".join(lines).encode("utf-8", "replace"))
            print(f"infinitebench: {len(bad)} bad line(s) kept aside in {path}", flush=True)
        return infinitebench.VERSION, {"files": digests, "prompts": i.infinitebench_prompts}, batches


def begin_short(config: EvaluationConfig, prepared: SuiteInputs, share: Share, *, restart: bool = False) -> ReadySuite:
    """The short-context suite; like ``Suites.begin``, by lm-evaluation-harness and its own model."""
    from importlib.metadata import version

    e, s, model = config.evaluate, config.short, config.engine.model
    assert e.output is not None and model is not None
    loaded = prepared.short
    settings = {
        "version": short_context.VERSION,
        "harness": version("lm-eval"),
        "model": {"engine": "transformers", "model": model_identity(Path(model)), "dtype": config.engine.dtype},
        "seed": e.seed,
        "limit": dict.fromkeys(names(s.short_tasks), s.short_limit or "all"),
        "batch_size": s.short_batch_size,
        "shots": {t: short_context.SHORT[t].shots for t in names(s.short_tasks)},
        "local": {x.name: x.local for x in loaded if x.local},
        "questions": {x.name: short_context.digest_of(x) for x in loaded},
    }
    batches, tasks_by_keys = [], {}
    size = 4 * s.short_batch_size
    for task in loaded:
        numbers = sorted(task.requests)
        for first in range(0, len(numbers), size):
            taken = numbers[first : first + size]
            cost = sum(len(r.args[0]) for n in taken for r in task.requests[n])
            batch = SampleBatch(tuple(short_context.key_of(task, n) for n in taken), float(cost), list)
            batches.append(batch)
            tasks_by_keys[batch.keys] = (task, taken)
    found: list[Any] = []

    def answer(batch: SampleBatch, _done: set[str]) -> Iterator[tuple[list[dict[str, Any]], int]]:
        if not found:
            found.append(short_context.make_model(model, config.engine.dtype, s.short_batch_size))
        task, taken = tasks_by_keys[batch.keys]
        yield short_context.answer(task, taken, found[0]), 0

    results = Results(Path(e.output) / "short", settings, share, restart=restart)
    return ReadySuite("short", batches, answer, results, short_metrics)


def short_metrics(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Per task over all its questions (so MMLU's subjects count by size, as in the harness), and the mean of the tasks."""
    tasks = {t: cell(of) for t, of in by(rows, lambda r: r["task"]).items()}
    return {"tasks": tasks, "average": float(np.mean([c["score"] for c in tasks.values()]))}


# --------------------------------------------------------------------------------------------------
# Numbers
# --------------------------------------------------------------------------------------------------


def cell(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean score, its standard error, how many, and how many the engine refused."""
    scores = np.array([r["score"] for r in rows], dtype=float)
    error = float(scores.std(ddof=1) / np.sqrt(len(scores))) if len(scores) > 1 else None
    refused = sum(bool(r.get("refused")) for r in rows)
    result: dict[str, Any] = {"score": float(scores.mean()), "stderr": error, "samples": len(rows)}
    return {**result, "refused": refused} if refused else result


def asked_of(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Samples of each task and length."""
    return {name: len(of) for name, of in by(rows, lambda r: r["key"].rpartition("/")[0]).items()}


def by(rows: Sequence[dict[str, Any]], key: Callable[[dict[str, Any]], Any]) -> dict[Any, list[dict[str, Any]]]:
    """Rows in the order of first appearance of their keys."""
    found: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def ruler_metrics(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Per task and length; per group the mean of its tasks; the average of all tasks, as the paper's tables."""
    tasks = {t: by(of, lambda r: r["length"]) for t, of in by(rows, lambda r: r["task"]).items()}
    ordered = {t: tasks[t] for t in ruler.TASKS if t in tasks}
    cells = {t: {str(n): cell(x) for n, x in sorted(of.items())} for t, of in ordered.items()}
    lengths = sorted({int(n) for of in cells.values() for n in of})

    def mean(of: Sequence[str], length: int) -> float | None:
        # A mean over some of the tasks would not compare with one over all.
        if not all(str(length) in cells[t] for t in of):
            return None
        return float(np.mean([cells[t][str(length)]["score"] for t in of]))

    def over(values: Sequence[float | None]) -> float | None:
        known = [v for v in values if v is not None]
        return float(np.mean(known)) if known else None

    members: dict[str, list[str]] = {}
    for task in cells:
        members.setdefault(ruler.GROUPS[task], []).append(task)
    groups = {g: {str(n): mean(of, n) for n in lengths} for g, of in members.items()}
    return {
        "tasks": cells,
        "groups": groups,
        "average": {str(n): mean(list(cells), n) for n in lengths},
        "over_lengths": {
            **{g: over(list(of.values())) for g, of in groups.items()},
            "average": over([mean(list(cells), n) for n in lengths]),
        },
    }


def needle_metrics(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Per depth and length."""
    depths = by(sorted(rows, key=lambda r: (r["depth"], r["length"])), lambda r: f"{r['depth']:g}")
    cells = {d: {str(n): cell(x) for n, x in by(of, lambda r: r["length"]).items()} for d, of in depths.items()}
    return {"depths": cells, "average": cell(rows)}


def infinitebench_metrics(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Per task, and their mean."""
    rows_by_cell = by(rows, lambda r: (r["task"], r["length"]))
    tasks: dict[str, dict[str, Any]] = {}
    for (task, length), found in sorted(
        rows_by_cell.items(), key=lambda x: (infinitebench.TASKS.index(x[0][0]), x[0][1])
    ):
        tasks.setdefault(task, {})[str(length)] = {**cell(found), "cut": sum(bool(r.get("cut")) for r in found)}
    lengths = sorted({int(n) for of in tasks.values() for n in of})
    means = {
        str(n): float(np.mean([of[str(n)]["score"] for of in tasks.values()]))
        if all(str(n) in of for of in tasks.values())
        else None
        for n in lengths
    }
    return {"tasks": tasks, "average": means}


METRICS = {"ruler": ruler_metrics, "needle": needle_metrics, "infinitebench": infinitebench_metrics}
