"""Samples through an engine: batches assigned to processes, answered, scored and stored as they come."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

from megatron_longpo.engines.base import Engine, Prompt, Reply, Sampling
from megatron_longpo.evaluation.folder import SuiteFolder
from megatron_longpo.evaluation.samples import AnswerRow, EvalSample, sample_key
from megatron_longpo.evaluation.scoring import SCORERS
from megatron_longpo.runtime.balance import assign, ceil_div
from megatron_longpo.runtime.progress import Progress

Content = TypeVar("Content")
# Samples in groups that share a text, which an engine reads once.
SampleGroups = list[list[EvalSample]]

# A larger batch would lose more work in a kill, and share little more.
_LARGEST_BATCH = 32
# The last process then ends at most an eighth after the mean.
_BATCHES_PER_PROCESS = 8


@dataclass(frozen=True)
class SampleBatch(Generic[Content]):
    """Samples that one process answers together.

    Attributes:
        keys: keys of the samples.
        cost: estimated cost of answering them, in any unit.
        make: makes the samples, in the form that the suite's ``Answer`` takes.
    """

    keys: tuple[str, ...]
    cost: float
    make: Callable[[], Content]


@dataclass(frozen=True)
class Answered:
    """Some answers of a batch.

    Attributes:
        rows: the answers.
        tokens: tokens read and written for them.
    """

    rows: list[AnswerRow]
    tokens: int = 0


# Answers the samples of a batch whose keys are not in the set, a few rows at a time.
Answer = Callable[[SampleBatch[Content], set[str]], Iterator[Answered]]


def run(
    name: str, batches: Sequence[SampleBatch[Content]], answer: Answer[Content], folder: SuiteFolder
) -> list[AnswerRow] | None:
    """Answer the samples that have no answer yet.

    Args:
        name: title of the progress line.
        batches: all samples of all processes.
        answer: how to answer a batch.
        folder: where the answers go.

    Returns:
        All rows in order on the process that reports, None on the others. Of processes in one launch rank 0 reports, else the
        one that ends last.
    """
    share = folder.share
    keys = [key for batch in batches for key in batch.keys]
    done = folder.done()
    mine = assign_batches(batches, share.world_size)[share.rank]
    total = sum(len(batch.keys) for batch in mine)
    before = sum(key in done for batch in mine for key in batch.keys)
    title = name if share.world_size == 1 else f"{name}, part {share.rank + 1} of {share.world_size}"
    with Progress(title, total, done=before, unit="samples") as progress:
        for batch in mine:
            if all(key in done for key in batch.keys):
                continue
            for answered in answer(batch, done):
                folder.add(answered.rows)
                progress.add(len(answered.rows), answered.tokens)
    complete = folder.wait_for_answers(keys)
    reports = complete and (share.rank == 0 or not share.together)
    return folder.write_samples(keys) if reports else None


def assign_batches(batches: Sequence[SampleBatch[Content]], world_size: int) -> list[list[SampleBatch[Content]]]:
    """Batches of each process, in the given order: the most expensive first, each to the least loaded process."""
    return [[batches[i] for i in mine] for mine in assign([b.cost for b in batches], world_size)]


def answer_by_engine(engine: Engine) -> Answer[SampleGroups]:
    """How an engine answers batches; the answers are scored by the samples' scorers."""

    def answer(batch: SampleBatch[SampleGroups], done: set[str]) -> Iterator[Answered]:
        groups = [[sample for sample in group if sample.key not in done] for group in batch.make()]
        # In alphabetical order texts with a common beginning are neighbours, and an engine that keeps prefixes reads on from
        # there.
        groups = sorted((group for group in groups if group), key=lambda group: group[0].message)
        at_once = max(1, engine.groups_at_once)
        for first in range(0, len(groups), at_once):
            asked = groups[first : first + at_once]
            began = time.monotonic()
            # The samples of a batch belong to one task, and so have one limit.
            sampling = Sampling(asked[0][0].max_tokens)
            replies = engine.answer([[prompt_of(sample) for sample in group] for group in asked], sampling)
            seconds = (time.monotonic() - began) / sum(map(len, asked))
            pairs = list(zip(itertools.chain(*asked), itertools.chain(*replies), strict=True))
            yield Answered(
                rows=[row_of(sample, reply, seconds) for sample, reply in pairs],
                tokens=sum(reply.prompt_tokens + reply.new_tokens for _, reply in pairs),
            )

    return answer


def prompt_of(sample: EvalSample) -> Prompt:
    """The sample as an engine takes it."""
    return Prompt(({"role": "user", "content": sample.message},), prefix=sample.prefix)


def row_of(sample: EvalSample, reply: Reply, seconds: float) -> AnswerRow:
    """The row that is stored for an answer.

    Args:
        sample: the question.
        reply: its answer; what is no answer counts as wrong.
        seconds: time it took.
    """
    row: AnswerRow = {
        "key": sample.key,
        "task": sample.task,
        "length": sample.length,
        "index": sample.index,
        "score": 0.0 if reply.no_answer else SCORERS[sample.scorer](reply.text, sample.references),
        "answer": reply.text,
        "references": list(sample.references),
        "digest": sample.digest,
        "prompt_tokens": reply.prompt_tokens or sample.prompt_tokens,
        "new_tokens": reply.new_tokens,
        "finished": reply.finished,
        "refused": reply.refused,
        "no_answer": reply.no_answer,
        "seconds": round(seconds, 3),
    }
    if reply.thinking_tokens:
        row["thinking_tokens"] = reply.thinking_tokens
    return cast(AnswerRow, {**row, **sample.details})


def samples_per_batch(samples: int, world_size: int, at_once: int) -> int:
    """Size of batches: large, since the samples of a task begin alike, but with several batches for every process.

    Args:
        samples: number of samples in all batches.
        world_size: number of processes.
        at_once: samples that the engine answers together; smaller batches would waste its capacity.
    """
    of_each = ceil_div(samples, world_size)
    return max(1, min(at_once, of_each), min(_LARGEST_BATCH, of_each // _BATCHES_PER_PROCESS))


def sample_batches(
    suite: str, task: str, length: int, *, count: int, size: int, make: Callable[[int], EvalSample]
) -> list[SampleBatch[SampleGroups]]:
    """Samples 0 to ``count`` - 1 of a task and length in even batches; each sample is a group of its own.

    Args:
        suite, task, length: what the samples belong to.
        count: number of samples.
        size: most samples of a batch.
        make: makes the sample of an index.
    """
    parts = ceil_div(count, size)
    bounds = [count * i // parts for i in range(parts + 1)]
    batches = []
    for first, end in itertools.pairwise(bounds):
        indices = range(first, end)

        def made(indices: range = indices) -> SampleGroups:
            return [[make(index)] for index in indices]

        keys = tuple(sample_key(suite, task, length, index) for index in indices)
        batches.append(SampleBatch(keys, cost=float(len(indices) * length), make=made))
    return batches
