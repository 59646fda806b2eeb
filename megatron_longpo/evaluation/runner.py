"""Samples through an engine: assigned to processes, answers on disk as they come, and gone on with after a kill.

    OUTPUT/SUITE/settings.json                         what the answers depend on; another value needs another folder,
                                                       what is added (a task's questions, say) does not
    OUTPUT/SUITE/parts/RANK-of-WORLD/answers.jsonl     as they came
    OUTPUT/SUITE/samples.jsonl                         all of them in order, when the last is there
    OUTPUT/SUITE/asked.json                            which those are, by task and length

A restart may use more or fewer processes: what any part holds is done.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_longpo.engines.base import Engine, Prompt, Reply, Sampling
from megatron_longpo.errors import ConfigError, DataError
from megatron_longpo.evaluation.samples import EvalSample
from megatron_longpo.evaluation.scoring import SCORERS
from megatron_longpo.runtime.balance import assign, ceil_div
from megatron_longpo.runtime.files import lock, waiting_lock, write_atomically
from megatron_longpo.runtime.progress import Progress


@dataclass(frozen=True)
class SampleBatch:
    """Samples that stay together: what they begin with alike is read once.

    Attributes:
        keys: of its samples.
        cost: of reading them, for the assignment to processes.
        make: its samples, in groups that share a text.
    """

    keys: tuple[str, ...]
    cost: float
    make: Callable[[], list[list[EvalSample]]]


@dataclass(frozen=True)
class Share:
    """Which part of the work this process does.

    Attributes:
        rank, world_size: the part, of how many.
        together: whether the processes were launched together, so that each may wait for the others.
    """

    rank: int = 0
    world_size: int = 1
    together: bool = False


class Results:
    """The folder of a suite.

    ``settings`` are afterwards those of all its answers: what an earlier run's had of other tasks, too.

    Args:
        folder: OUTPUT/SUITE.
        settings: what its answers depend on.
        share: this process.
        restart: forget what is there (one process).

    Raises:
        ConfigError: what is there was made with other settings, or several processes are to forget it.
        DataError: another process works on this part.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], share: Share, *, restart: bool = False) -> None:
        self.folder, self.share = folder, share
        self.parts = folder / "parts"
        path = folder / "settings.json"
        if restart:
            if share.world_size > 1:
                raise ConfigError(f"--restart is for one process; remove {folder}, then launch again without it")
            for part in self.parts.glob("*-of-*"):
                # Not under a process that is at work.
                os.close(lock(part))
            shutil.rmtree(folder, ignore_errors=True)
        self.parts.mkdir(parents=True, exist_ok=True)
        with waiting_lock(folder):
            # Whichever part comes first; those that come later are held against it.
            before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            self.settings, changed = _merge_settings(before, json.loads(json.dumps(settings)))
            if before and changed:
                told = "; ".join(f"{k} was {_brief(x)} and is {_brief(y)}" for k, (x, y) in changed.items())
                raise ConfigError(
                    f"{folder} holds answers made with other settings ({told}); name another --output, or --restart"
                )
            if self.settings != before:
                write_atomically(path, (json.dumps(self.settings, indent=2, ensure_ascii=False) + "\n").encode())
        mine = self.parts / f"{share.rank}-of-{share.world_size}"
        mine.mkdir(exist_ok=True)
        self._lock = lock(mine)
        self._path = mine / "answers.jsonl"
        _drop_torn_line(self._path)

    def close(self) -> None:
        os.close(self._lock)

    def wait_for_parts(self, patience: float = 600.0) -> None:
        """Until the folders of all processes that were launched together are seen.

        Raises:
            DataError: some are not, as where nodes do not share the output folder: they would wait for one another for ever.
        """
        if not self.share.together:
            return
        names = [f"{rank}-of-{self.share.world_size}" for rank in range(self.share.world_size)]
        began = told = time.monotonic()
        while missing := [n for n in names if not (self.parts / n).is_dir()]:
            if time.monotonic() - began > patience:
                raise DataError(
                    f"{self.parts}: {len(missing)} of {len(names)} processes have no folder there ({missing[0]}, ...) after "
                    f"{patience:.0f} s; name an --output that all nodes see"
                )
            if time.monotonic() - told > 60:
                told = time.monotonic()
                print(f"waiting for {len(missing)} processes to begin", flush=True)
            time.sleep(0.1)

    def answered(self) -> set[str]:
        """Keys of the answers that any part holds."""
        return {row["key"] for row in self.rows()}

    def done(self) -> set[str]:
        """Keys that need not be asked again; what an engine refused is, since it may have more room now."""
        return {row["key"] for row in self.rows() if not row.get("refused")}

    def rows(self) -> Iterator[dict[str, Any]]:
        """What any part holds."""
        for path in self._paths():
            yield from read_rows(path)

    def _paths(self) -> list[Path]:
        return sorted(self.parts.glob("*/answers.jsonl"))

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Put answers on disk."""
        # What is no text in UTF-8 (half a surrogate pair from a JSON file) must not end a run.
        with open(self._path, "a", encoding="utf-8", errors="replace") as stream:
            stream.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            stream.flush()
            os.fsync(stream.fileno())

    def wait(self, keys: Sequence[str]) -> bool:
        """Whether all parts together hold all of these; processes that were launched together wait until they do.

        A process that fails makes its launcher end those that wait.

        Raises:
            DataError: the only process lacks some.
        """
        told, pause = time.monotonic(), 0.2
        while missing := set(keys) - self.answered():
            if self.share.world_size == 1:
                raise DataError(
                    f"{self.folder}: {len(missing)} answers are missing ({min(missing)}, ...); run it again"
                )
            if not self.share.together:
                print(
                    f"{self.folder}: {len(missing)} answers of other parts are missing; the last part reports",
                    flush=True,
                )
                return False
            if time.monotonic() - told > 60:
                told = time.monotonic()
                print(f"waiting for {len(missing)} answers of other processes", flush=True)
            time.sleep(pause)
            pause = min(5.0, 1.5 * pause)
        return True

    def merge(self, keys: Sequence[str]) -> list[dict[str, Any]]:
        """These answers, and those of other cells that earlier runs finished, in order: written to samples.jsonl.

        A cell is a task and a length. Of a cell that is asked again with fewer samples those alone count; one that was begun
        and not finished does not count.
        """
        path = self.folder / "asked.json"
        cells: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        now: dict[str, list[str]] = {}
        for key in keys:
            now.setdefault(key.rpartition("/")[0], []).append(key)
        cells |= now
        write_atomically(path, (json.dumps(cells) + "\n").encode())
        found: dict[str, dict[str, Any]] = {}
        for row in self.rows():
            if row["key"] not in found or not row.get("refused"):
                found[row["key"]] = row
        rows = [found[key] for keys_of_cell in cells.values() for key in keys_of_cell]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomically(self.folder / "samples.jsonl", text.encode("utf-8", errors="replace"))
        return rows


def _drop_torn_line(path: Path) -> None:
    """Cut off a line that a kill left half-written."""
    if path.exists():
        with open(path, "r+b") as stream:
            content = stream.read()
            end = content.rfind(b"\n") + 1
            if end < len(content):
                stream.truncate(end)


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Whole rows of a JSONL file of answers; one that is being written, or was torn, is passed over."""
    if path.exists():
        with open(path, encoding="utf-8", errors="replace") as stream:
            for line in stream:
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                if isinstance(row, dict) and "key" in row and "score" in row:
                    yield row


def _merge_settings(before: dict[str, Any], now: dict[str, Any]) -> tuple[dict[str, Any], dict[str, tuple[Any, Any]]]:
    """Settings of both, and which of them differ, by name: (before, now).

    Of what goes by task (``_BY_TASK``) a part that is missing or null on one side is taken from the other.
    """
    both = {**before, **now}
    changed: dict[str, tuple[Any, Any]] = {}
    for name in both:
        x, y = before.get(name), now.get(name)
        if name in _BY_TASK and isinstance(x, dict) and isinstance(y, dict):
            both[name] = {k: x[k] if y.get(k) is None and k in x else y.get(k) for k in {**x, **y}}
            parts = [k for k in x if x[k] is not None and y.get(k) is not None and x[k] != y[k]]
            changed |= {f"{name}.{k}": (x[k], y[k]) for k in parts}
        elif x != y:
            changed[name] = (x, y)
    return both, changed


# Settings that hold something for each task, or for what a task is made of: other runs may add to them.
_BY_TASK = ("version", "materials", "files", "shots", "limit", "local", "questions")


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def assign_batches(batches: Sequence[SampleBatch], world_size: int) -> list[list[SampleBatch]]:
    """Batches of each process, in the given order: the most expensive first, each to the least loaded process."""
    return [[batches[i] for i in mine] for mine in assign([b.cost for b in batches], world_size)]


# Answers what a batch still lacks, some rows at a time, with the tokens that were read and written for them.
Answer = Callable[[SampleBatch, set[str]], Iterator[tuple[list[dict[str, Any]], int]]]


def run(name: str, batches: Sequence[SampleBatch], answer: Answer, results: Results) -> list[dict[str, Any]] | None:
    """Answer what is not answered yet.

    Args:
        name: for the progress line.
        batches: all samples.
        answer: how.
        results: where to.

    Returns:
        All rows in order on the process that reports, None on the others: of processes launched together the first reports, else
        the one that ends last.
    """
    keys = [key for batch in batches for key in batch.keys]
    done = results.done()
    mine = assign_batches(batches, results.share.world_size)[results.share.rank]
    total = sum(len(w.keys) for w in mine)
    before = sum(key in done for w in mine for key in w.keys)
    share = results.share
    title = name if share.world_size == 1 else f"{name}, part {share.rank + 1} of {share.world_size}"
    with Progress(title, total, done=before, unit="samples") as progress:
        for batch in mine:
            if all(key in done for key in batch.keys):
                continue
            for rows, tokens in answer(batch, done):
                results.add(rows)
                progress.add(len(rows), tokens)
    complete = results.wait(keys)
    reports = complete and (results.share.rank == 0 or not results.share.together)
    return results.merge(keys) if reports else None


def by_engine(engine: Engine) -> Answer:
    """Answers of an engine, scored."""

    def answer(batch: SampleBatch, done: set[str]) -> Iterator[tuple[list[dict[str, Any]], int]]:
        groups = [[s for s in group if s.key not in done] for group in batch.make()]
        # Alphabetically, texts that begin alike stand together, and an engine that keeps prefixes reads on from there.
        groups = sorted((g for g in groups if g), key=lambda g: g[0].message)
        at_once = max(1, engine.groups_at_once)
        for first in range(0, len(groups), at_once):
            asked = groups[first : first + at_once]
            began = time.monotonic()
            # Samples of a batch are of one task, and so have one limit.
            sampling = Sampling(asked[0][0].max_tokens)
            replies = engine.answer([[prompt_of(s) for s in g] for g in asked], sampling)
            seconds = (time.monotonic() - began) / sum(map(len, asked))
            pairs = [(s, r) for g, rs in zip(asked, replies, strict=True) for s, r in zip(g, rs, strict=True)]
            tokens = sum(r.prompt_tokens + r.new_tokens for _, r in pairs)
            yield [row_of(s, r, seconds) for s, r in pairs], tokens

    return answer


def prompt_of(sample: EvalSample) -> Prompt:
    return Prompt(({"role": "user", "content": sample.message},), prefix=sample.prefix)


def row_of(sample: EvalSample, reply: Reply, seconds: float) -> dict[str, Any]:
    """What is kept of an answer."""
    return {
        "key": sample.key,
        "task": sample.task,
        "length": sample.length,
        "index": sample.index,
        "score": 0.0 if reply.refused else SCORERS[sample.scorer](reply.text, sample.references),
        "answer": reply.text,
        "references": list(sample.references),
        "digest": sample.digest,
        "prompt_tokens": reply.prompt_tokens or sample.prompt_tokens,
        "new_tokens": reply.new_tokens,
        "finished": reply.finished,
        "refused": reply.refused,
        "seconds": round(seconds, 3),
        **sample.details,
    }


def samples_per_batch(samples: int, world_size: int, at_once: int) -> int:
    """Samples that stay together: many, since those of a task begin alike; but every process is to get several batches.

    Args:
        samples: of all batches together.
        world_size: processes.
        at_once: samples that the engine answers together; smaller ones would waste its own batches.
    """
    of_each = ceil_div(samples, world_size)
    return max(1, min(at_once, of_each), min(_LARGEST_BATCH, of_each // _BATCHES_PER_PROCESS))


# More would leave more to do again after a kill, and share little more.
_LARGEST_BATCH = 32

# So the last process ends at most an eighth after the mean.
_BATCHES_PER_PROCESS = 8


def sample_batches(
    suite: str, task: str, length: int, count: int, size: int, make: Callable[[int], EvalSample]
) -> list[SampleBatch]:
    """Samples 0 to ``count`` - 1 of a task and length, each a group of its own, in even batches of at most ``size``."""
    parts = ceil_div(count, size)
    bounds = [count * i // parts for i in range(parts + 1)]
    result = []
    for first, end in itertools.pairwise(bounds):
        numbers = range(first, end)

        def made(numbers: range = numbers) -> list[list[EvalSample]]:
            return [[make(i)] for i in numbers]

        keys = tuple(f"{suite}/{task}/{length}/{i}" for i in numbers)
        result.append(SampleBatch(keys, float(len(numbers) * length), made))
    return result
