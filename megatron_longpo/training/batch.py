"""Micro batches: samples laid out, cut for this rank, and their losses.

Shape legend: B = samples of the micro batch, N = places with a loss on this rank, s = places on this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_longpo.config import DataConfig, ObjectiveConfig
from megatron_longpo.data.preference import Mode, Sample, long_rows
from megatron_longpo.data.sequence import Range, Row, SequenceLayout, Shard, assign_places, lay_out, local_spans, shard
from megatron_longpo.model.attention import AttentionPlan
from megatron_longpo.runtime import platform
from megatron_longpo.runtime.process_groups import Parallel, sum_over_group
from megatron_longpo.training.metrics import SAMPLE_COLUMNS
from megatron_longpo.training.objective import preference_loss, total_loss

# Tiles per rank with cp_comm_type=allgather. Two balance a plain causal sequence (zigzag); branches need more.
_TILES = 4

# How many context-parallel exchanges are in flight at once. More overlap hides more latency but makes each matmul smaller.
_HEAD_GROUPS = 4


def _gathered_of(ranges_of_rank: Sequence[Sequence[Range]], padded: int) -> np.ndarray:
    """Where each place of the sequence is in the ranks' shards put end to end."""
    result = np.zeros(padded, np.int64)
    for rank, ranges in enumerate(ranges_of_rank):
        first = rank * (padded // len(ranges_of_rank))
        for r in ranges:
            result[r.start : r.start + r.length] = np.arange(first + r.local, first + r.local + r.length)
    return result


@dataclass
class MicroBatch:
    """A sequence as this rank computes it, on its device.

    ``context_parallel`` says whether the sequence is cut over the context-parallel ranks or whole on each.
    """

    layout: SequenceLayout
    shard: Shard
    plan: AttentionPlan
    tokens_1s: Tensor
    positions_1s: Tensor
    loss_places_N: Tensor
    targets_N: Tensor
    num_samples: int
    context_parallel: bool

    @classmethod
    def make(
        cls,
        rows: Sequence[Row],
        *,
        num_samples: int,
        prefix_sharing: bool,
        parallel: Parallel,
        context_parallel: bool,
        window: int | None = None,
    ) -> MicroBatch:
        """Lay rows out and cut them.

        Args:
            rows: rows with response slots 2 * sample + side and NLL slots sample.
            num_samples: how many samples the slots are of.
            prefix_sharing: share common prefixes.
            parallel: degrees and groups.
            context_parallel: cut over the context-parallel ranks; else the sequence is this rank's alone.
            window: of the model's attention.
        """
        layout = lay_out(rows, prefix_sharing=prefix_sharing, num_samples=num_samples, num_responses=2 * num_samples)
        parts = parallel.context_size if context_parallel else 1
        part = parallel.context_rank if context_parallel else 0
        gather = parts > 1 and parallel.comm_type == "allgather"
        ranges_of_rank = assign_places(
            layout,
            multiple=parts * (parallel.tensor_size if parallel.sequence_parallel else 1),
            parts=parts,
            tiles=_TILES if gather else 1,
        )
        padded = sum(r.length for ranges in ranges_of_rank for r in ranges)
        mine = shard(layout, ranges_of_rank[part], padded)
        device = platform.CURRENT.device
        return cls(
            layout=layout,
            shard=mine,
            plan=AttentionPlan.make(
                local_spans(layout.query_spans, ranges_of_rank[part]) if gather else layout.query_spans,
                parallel.context_group if context_parallel else None,
                parallel.comm_type,
                torch.from_numpy(_gathered_of(ranges_of_rank, padded)).to(device) if gather else None,
                head_groups=_HEAD_GROUPS,
                window=window,
                positions_S=layout.positions_S,
            ),
            tokens_1s=torch.from_numpy(mine.tokens).to(device)[None],
            positions_1s=torch.from_numpy(mine.positions).to(device)[None],
            loss_places_N=torch.from_numpy(mine.loss_places_N).to(device),
            targets_N=torch.from_numpy(mine.targets_N).to(device),
            num_samples=num_samples,
            context_parallel=context_parallel,
        )


@dataclass(frozen=True)
class ResponseSums:
    """Whole-sequence sums, the same on every context-parallel rank; each [B]."""

    chosen_B: Tensor
    rejected_B: Tensor
    nll_sum_B: Tensor


def response_sums(logps_N: Tensor, batch: MicroBatch, parallel: Parallel) -> ResponseSums:
    """Sum log-probs into responses and NLLs, over places and, in forward only, over context-parallel ranks."""
    device, n = logps_N.device, batch.num_samples
    s = batch.shard

    def index(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    # In fp64: 128K summands in fp32 would cost three of the digits that layouts are to agree in.
    logps_N = logps_N.double()
    zeros = torch.zeros(3 * n, dtype=torch.float64, device=device)
    responses = zeros.index_add(0, index(s.response_slots_E), logps_N.index_select(0, index(s.response_index_E)))
    sums = responses.index_add(0, index(s.nll_slots) + 2 * n, -logps_N.index_select(0, index(s.nll_index)))
    if batch.context_parallel:
        sums = sum_over_group(sums, parallel.context_group)
    pairs = sums[: 2 * n].view(n, 2)
    return ResponseSums(pairs[:, 0], pairs[:, 1], sums[2 * n :])


def known_nll_grad(
    batch: MicroBatch, *, objective: ObjectiveConfig, parallel: Parallel, microbatches: int
) -> Tensor | None:
    """Gradient that each of this rank's log-probs will get, [N] in fp32, NaN where it depends on the preference.

    A token that counts in an NLL alone gets -1 / its sample's NLL tokens, over the samples of the micro batch, over the
    micro batches of the step, times the context-parallel size (megatron-core's schedule; docs/loss.md).
    """
    s = batch.shard
    if objective.objective == "dpo" or not len(s.loss_places_N):
        return None
    each_B = parallel.context_size / (np.maximum(batch.layout.nll_tokens, 1) * batch.num_samples * microbatches)
    expected = np.zeros(len(s.loss_places_N))
    np.subtract.at(expected, s.nll_index, each_B[s.nll_slots])
    if objective.objective != "sft":
        expected[s.response_index_E] = np.nan
    return torch.from_numpy(expected.astype(np.float32)).to(platform.CURRENT.device)


def policy_rows(samples: Sequence[Sample], *, data: DataConfig, objective: ObjectiveConfig) -> list[Row]:
    """The long rows that the policy computes of some samples."""
    sides = (Mode.CHOSEN,) if objective.objective == "sft" else (Mode.CHOSEN, Mode.REJECTED)
    return [
        row
        for slot, sample in enumerate(samples)
        for row in long_rows(sample, slot=slot, turns=data.turns, nll_scope=objective.nll_scope, sides=sides)
    ]


def policy_layout(samples: Sequence[Sample], *, data: DataConfig, objective: ObjectiveConfig) -> SequenceLayout:
    """Their layout, before any cut."""
    rows = policy_rows(samples, data=data, objective=objective)
    return lay_out(rows, prefix_sharing=data.prefix_sharing, num_samples=len(samples), num_responses=2 * len(samples))


def policy_batch(
    samples: Sequence[Sample],
    *,
    data: DataConfig,
    objective: ObjectiveConfig,
    parallel: Parallel,
    window: int | None = None,
) -> MicroBatch:
    """The long rows of some samples as this rank computes them."""
    return MicroBatch.make(
        policy_rows(samples, data=data, objective=objective),
        num_samples=len(samples),
        prefix_sharing=data.prefix_sharing,
        parallel=parallel,
        context_parallel=True,
        window=window,
    )


def batch_loss(
    logps_N: Tensor,
    batch: MicroBatch,
    reference_B2: np.ndarray | None,
    *,
    objective: ObjectiveConfig,
    parallel: Parallel,
    chosen_tokens: Sequence[int],
) -> tuple[Tensor, list[list[float]]]:
    """Mean loss of a micro batch, whole on every context-parallel rank, and each sample's metrics.

    Args:
        logps_N: log-probs of this rank's places.
        batch: the micro batch.
        reference_B2: [B, 2] reference log-probs of chosen and rejected, or None for sft.
        objective: the loss.
        parallel: groups.
        chosen_tokens: tokens of each sample's long chosen row, for the log.

    Returns:
        The scalar loss and, per sample, the metrics of SAMPLE_COLUMNS.
    """
    sums = response_sums(logps_N, batch, parallel)
    device = logps_N.device
    nll_tokens = torch.from_numpy(batch.layout.nll_tokens).to(device).clamp(min=1)
    nll_B = sums.nll_sum_B / nll_tokens
    zeros = torch.zeros_like(nll_B)
    if reference_B2 is None:
        loss_B = total_loss(objective.objective, None, nll_B, objective.preference_weight)
        preference = ref_chosen = ref_rejected = reward_chosen = reward_rejected = zeros
        # The rejected rows are not computed.
        logp_rejected = zeros
    else:
        reference = torch.from_numpy(reference_B2).to(device=device, dtype=torch.float64)
        ref_chosen, ref_rejected = reference[:, 0], reference[:, 1]
        response_tokens = torch.from_numpy(batch.layout.response_tokens).to(device).view(-1, 2)
        terms = preference_loss(
            sums.chosen_B,
            sums.rejected_B,
            ref_chosen,
            ref_rejected,
            beta=objective.beta,
            loss_type=objective.loss_type,
            label_smoothing=objective.label_smoothing,
            chosen_tokens_B=response_tokens[:, 0],
            rejected_tokens_B=response_tokens[:, 1],
        )
        loss_B = total_loss(objective.objective, terms.loss_B, nll_B, objective.preference_weight)
        preference, reward_chosen, reward_rejected = terms.loss_B, terms.reward_chosen_B, terms.reward_rejected_B
        logp_rejected = sums.rejected_B
    margins = reward_chosen - reward_rejected
    columns = (
        loss_B,
        nll_B,
        preference,
        sums.chosen_B,
        logp_rejected,
        ref_chosen,
        ref_rejected,
        reward_chosen,
        reward_rejected,
        margins,
        (margins > 0).double(),
        torch.tensor(list(chosen_tokens), dtype=torch.float64, device=device),
    )
    assert len(columns) == len(SAMPLE_COLUMNS)
    return loss_B.mean(), torch.stack([c.detach() for c in columns], dim=1).tolist()
