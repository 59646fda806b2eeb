"""Score samples with the frozen reference: which rows, on which rank, in which packs.

LongPO's reference scores each answer on its short chunk only (paper, Eq. 9). Those rows are short, so each stays whole on one
rank: they are assigned to the data x context ranks by cost and packed. DPO's reference scores the long rows, which are cut
over the context-parallel ranks like the policy's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_longpo.data.preference import Sample, long_rows, short_rows
from megatron_longpo.data.sequence import Row
from megatron_longpo.model.rotary import Rotary
from megatron_longpo.model.shape import ModelShape
from megatron_longpo.runtime import platform
from megatron_longpo.runtime.balance import assign, round_up
from megatron_longpo.runtime.process_groups import Parallel
from megatron_longpo.training.batch import MicroBatch, response_sums
from megatron_longpo.training.objective import ReferenceRows


@dataclass(frozen=True)
class Task:
    """Rows of one sample that are laid out together: the two rows of a short turn, or the sample's long rows.

    Attributes:
        sample: index of the sample among those that are scored.
        rows: the rows.
        tokens: length of the rows together, in tokens.
        cost: relative cost of scoring them.
    """

    sample: int
    rows: tuple[Row, ...]
    tokens: int
    cost: float


def tasks_of(samples: Sequence[Sample], which: ReferenceRows, shape: ModelShape) -> list[Task]:
    """All tasks of the samples; ``Task.sample`` and the slots of the rows are indices into ``samples``."""
    tasks = []
    for index, sample in enumerate(samples):
        if which == "long":
            groups = [long_rows(sample, slot=index, turns="chained", nll_scope="response")]
        else:
            rows = short_rows(sample, slot=index)
            groups = [rows[i : i + 2] for i in range(0, len(rows), 2)]
        for group in groups:
            # The longest row stands for the group: its rows share all but their answers.
            longest = max(len(row.tokens_L) for row in group)
            tokens = sum(len(row.tokens_L) for row in group)
            tasks.append(Task(sample=index, rows=tuple(group), tokens=tokens, cost=shape.row_cost(longest)))
    return tasks


def pack(tokens: Sequence[int], limit: int) -> list[list[int]]:
    """Pack items into sequences of at most ``limit`` tokens, largest first, each into the first sequence with room for it.

    An item larger than the limit becomes a sequence of its own.

    Args:
        tokens: tokens of each item.
        limit: largest number of tokens of a sequence.

    Returns:
        For each sequence the indices of its items.
    """
    packs: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(tokens)), key=lambda i: (-tokens[i], i)):
        for number, left in enumerate(room):
            if tokens[item] <= left:
                packs[number].append(item)
                room[number] -= tokens[item]
                break
        else:
            packs.append([item])
            room.append(limit - tokens[item])
    return packs


@dataclass(frozen=True)
class ScoringWork:
    """What a rank had to do to score samples.

    Attributes:
        cost: multiply-adds per layer.
        loss_tokens: tokens whose log-probs it computed.
    """

    cost: float = 0.0
    loss_tokens: int = 0


@dataclass
class Scorer:
    """A model that holds the reference's weights, and how it scores.

    Attributes:
        model: this pipeline rank's chunks.
        rotary: rotary embedding of the reference.
        shape: shape of the model.
        rows: rows that are scored.
        parallel: degrees and groups.
        max_tokens: largest number of tokens of a packed sequence of short rows.
        prefix_sharing: whether rows share prefixes.
        work: this rank's share of the last call of ``score``.
    """

    model: Sequence[torch.nn.Module]
    rotary: Rotary
    shape: ModelShape
    rows: ReferenceRows
    parallel: Parallel
    max_tokens: int
    prefix_sharing: bool = True
    work: ScoringWork = field(default=ScoringWork(), init=False)

    def score(self, samples: Sequence[Sample]) -> np.ndarray:
        """Log-probs of the chosen and the rejected responses, summed over the turns of each sample; collective.

        Args:
            samples: samples, the same on every rank.

        Returns:
            [samples, 2] in fp64, identical on every rank.
        """
        parallel = self.parallel
        tasks = tasks_of(samples, self.rows, self.shape)
        costs = [task.cost for task in tasks]
        if self.rows == "long":
            mine = [tasks[i] for i in assign(costs, parallel.data_size)[parallel.data_rank]]
            packs = [[task] for task in mine]
        else:
            mine = [tasks[i] for i in assign(costs, parallel.dp_cp_size)[parallel.dp_cp_rank]]
            packs = [[mine[i] for i in items] for items in pack([task.tokens for task in mine], self.max_tokens)]
        batches = [self._lay_out(tasks_of_pack) for tasks_of_pack in packs]
        self.work = ScoringWork(
            cost=sum(task.cost for task in mine) / (parallel.context_size if self.rows == "long" else 1),
            loss_tokens=sum(len(batch.shard.loss_places_N) for batch in batches),
        )
        result = torch.zeros(len(samples), 2, dtype=torch.float64, device=platform.CURRENT.device)
        for tasks_of_pack, sums in zip(packs, self._forward(batches), strict=True):
            for slot, task in enumerate(tasks_of_pack):
                result[task.sample] += sums[slot]
        if parallel.pipeline_size > 1:
            dist.broadcast(result, src=parallel.last_stage_rank, group=parallel.pipeline_group)
        # A plain sum of disjoint parts; no gradient is taken through it.
        dist.all_reduce(result, group=parallel.data_group if self.rows == "long" else parallel.dp_cp_group)
        return result.cpu().numpy()

    def _lay_out(self, tasks: Sequence[Task]) -> MicroBatch:
        """The rows of some tasks as one sequence, with a pair of response slots per task."""
        rows = [
            Row(
                row.tokens_L,
                np.where(row.response_L < 0, row.response_L, row.response_L % 2 + 2 * slot),
                np.zeros_like(row.nll_L),
                slot,
            )
            for slot, task in enumerate(tasks)
            for row in task.rows
        ]
        return MicroBatch.make(
            rows,
            num_samples=len(tasks),
            prefix_sharing=self.prefix_sharing,
            parallel=self.parallel,
            context_parallel=self.rows == "long",
            window=self.shape.window_size,
        )

    def _forward(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        """For each micro batch the [tasks, 2] sums of its responses; zeros on all but the last pipeline stage."""
        if not batches:
            return []
        parallel = self.parallel
        # Interleaved schedules need a multiple of the pipeline size; the results of the extra ones are dropped.
        multiple = parallel.pipeline_size if parallel.virtual_stages else 1
        padded = [*batches, *[batches[-1]] * (round_up(len(batches), multiple) - len(batches))]

        def forward_step(iterator: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
            batch = next(iterator)

            def collect(logps_N: Tensor, **_: Any) -> Tensor:
                sums = response_sums(logps_N, batch, parallel)
                return torch.stack([sums.chosen_B, sums.rejected_B], dim=1)

            return chunk(batch.inputs, self.rotary), collect

        training = [chunk.training for chunk in self.model]
        for chunk in self.model:
            chunk.eval()
        several = len(self.model) > 1
        with torch.no_grad():
            sums = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=[iter(padded) for _ in self.model] if several else iter(padded),
                model=list(self.model) if several else self.model[0],
                num_microbatches=len(padded),
                seq_length=1,  # ignored: lengths vary
                micro_batch_size=1,
                forward_only=True,
                collect_non_loss_data=True,
            )
        for chunk, was in zip(self.model, training, strict=True):
            chunk.train(was)
        if parallel.is_last_stage:
            return list(sums)[: len(batches)]
        return [torch.zeros(b.num_samples, 2, dtype=torch.float64, device=platform.CURRENT.device) for b in batches]
