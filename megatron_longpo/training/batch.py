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
from megatron_longpo.model.inputs import ModelInputs
from megatron_longpo.model.logprobs import KnownGradients, TokenOrder
from megatron_longpo.runtime import platform
from megatron_longpo.runtime.process_groups import Parallel, sum_over_group
from megatron_longpo.training.objective import preference_loss, response_nll, spec_of, total_loss

# Tiles per rank with cp_comm_type=allgather. Two balance a plain causal sequence (zigzag); branches need more.
_TILES = 4

# How many context-parallel exchanges are in flight at once. More overlap hides more latency but makes each matmul smaller.
_HEAD_GROUPS = 4


def _gathered_of(ranges_of_rank: Sequence[Sequence[Range]], padded: int) -> np.ndarray:
    """Index of each place of the sequence in the concatenation of the ranks' shards."""
    result = np.zeros(padded, np.int64)
    for rank, ranges in enumerate(ranges_of_rank):
        first = rank * (padded // len(ranges_of_rank))
        for r in ranges:
            result[r.start : r.start + r.length] = np.arange(first + r.local, first + r.local + r.length)
    return result


@dataclass(frozen=True)
class MicroBatch:
    """Rows laid out as one sequence and cut for this rank.

    Attributes:
        inputs: what the model is called with.
        layout: the whole sequence.
        shard: this rank's part of it.
        num_samples: number of samples whose rows these are.
        context_parallel: whether the sequence is cut over the context-parallel ranks; otherwise this rank has all of it.
    """

    inputs: ModelInputs
    layout: SequenceLayout
    shard: Shard
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
            num_samples: number of samples that the slots refer to.
            prefix_sharing: whether common prefixes are shared.
            parallel: degrees and groups.
            context_parallel: whether to cut the sequence over the context-parallel ranks.
            window: sliding attention window of the model.
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
        own = shard(layout, ranges_of_rank[part], padded)
        device = platform.CURRENT.device
        attention = AttentionPlan.make(
            local_spans(layout.query_spans, ranges_of_rank[part]) if gather else layout.query_spans,
            parallel.context_group if context_parallel else None,
            parallel.comm_type,
            torch.from_numpy(_gathered_of(ranges_of_rank, padded)).to(device) if gather else None,
            head_groups=_HEAD_GROUPS,
            window=window,
            positions_S=layout.positions_S,
        )
        inputs = ModelInputs(
            tokens_1s=torch.from_numpy(own.tokens).to(device)[None],
            positions_1s=torch.from_numpy(own.positions).to(device)[None],
            attention=attention,
            loss_places_N=torch.from_numpy(own.loss_places_N).to(device),
            targets_N=torch.from_numpy(own.targets_N).to(device),
            loss_counts=_counts_by_rank(own, parallel.tensor_size if parallel.sequence_parallel else 1),
        )
        return cls(inputs=inputs, layout=layout, shard=own, num_samples=num_samples, context_parallel=context_parallel)


def _counts_by_rank(own: Shard, ranks: int) -> tuple[int, ...]:
    """How many of the places with a loss are in each of ``ranks`` equal parts of the shard."""
    ends = np.arange(ranks + 1) * (len(own.tokens) // ranks)
    return tuple(np.diff(np.searchsorted(own.loss_places_N, ends)).tolist())


@dataclass(frozen=True)
class ResponseSums:
    """Sums over the whole sequence, identical on all context-parallel ranks; each has shape [B].

    Attributes:
        chosen_B, rejected_B: log-probs of the responses.
        nll_sum_B: NLL of the chosen rows, summed over tokens.
    """

    chosen_B: Tensor
    rejected_B: Tensor
    nll_sum_B: Tensor


def response_sums(logps_N: Tensor, batch: MicroBatch, parallel: Parallel) -> ResponseSums:
    """Sum log-probs into responses and NLLs: over places and, in the forward only, over context-parallel ranks."""
    device, n = logps_N.device, batch.num_samples
    s = batch.shard

    def index(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    # In fp64: summing 128K terms in fp32 would lose three of the digits that layouts have to agree in.
    logps_N = logps_N.double()
    zeros = torch.zeros(3 * n, dtype=torch.float64, device=device)
    responses = zeros.index_add(0, index(s.response_slots_E), logps_N.index_select(0, index(s.response_index_E)))
    sums = responses.index_add(0, index(s.nll_slots) + 2 * n, -logps_N.index_select(0, index(s.nll_index)))
    if batch.context_parallel:
        sums = sum_over_group(sums, parallel.context_group)
    pairs = sums[: 2 * n].view(n, 2)
    return ResponseSums(chosen_B=pairs[:, 0], rejected_B=pairs[:, 1], nll_sum_B=sums[2 * n :])


def known_nll_grad(
    batch: PolicyBatch, *, objective: ObjectiveConfig, parallel: Parallel, num_microbatches: int
) -> KnownGradients | None:
    """Gradients of this rank's log-probs that are known before the forward.

    A token that contributes only to an NLL gets -1 / (NLL tokens of its sample) times the sample's weight and factor, divided
    by the samples of the micro batch and by the micro batches of the step, times the context-parallel size (megatron-core's
    schedule; docs/loss.md). A token that contributes to the preference term gets NaN.

    Returns:
        The gradients, or None if no gradient is known.
    """
    micro_batch = batch.micro_batch
    s, spec = micro_batch.shard, spec_of(objective.objective, objective.loss_type)
    if not spec.uses_nll or not len(s.loss_places_N):
        return None
    tokens_B = np.maximum(micro_batch.layout.nll_tokens, 1)
    each_B = parallel.context_size / (tokens_B * micro_batch.num_samples * num_microbatches)
    each_B = each_B * batch.weights_B * batch.factors_B
    expected = np.zeros(len(s.loss_places_N))
    np.subtract.at(expected, s.nll_index, each_B[s.nll_slots])
    if spec.uses_preference:
        expected[s.response_index_E] = np.nan
    device, counts = platform.CURRENT.device, micro_batch.inputs.loss_counts
    assert counts is not None
    return KnownGradients(
        torch.from_numpy(expected.astype(np.float32)).to(device), TokenOrder.make(~np.isnan(expected), counts, device)
    )


@dataclass(frozen=True)
class PolicyBatch:
    """Samples of one micro batch with all that their loss needs.

    Attributes:
        places: places of the samples in the global batch.
        chosen_tokens: length of each sample's long chosen row in tokens.
        micro_batch: their long rows as this rank computes them.
        reference_B2: [B, 2] reference log-probs of the chosen and the rejected responses; None without a reference.
        weights_B: [B] weights of the samples in fp64, as the data have them.
        factors_B: [B] factors in fp64 that make the mean over the places of a filled-up batch the mean over its samples.
    """

    places: Sequence[int]
    chosen_tokens: Sequence[int]
    micro_batch: MicroBatch
    reference_B2: np.ndarray | None
    weights_B: np.ndarray
    factors_B: np.ndarray


def policy_batch(
    samples: Sequence[Sample],
    places: Sequence[int],
    reference_B2: np.ndarray | None,
    *,
    factors_B: np.ndarray,
    data: DataConfig,
    objective: ObjectiveConfig,
    parallel: Parallel,
    window: int | None = None,
) -> PolicyBatch:
    """Lay out and cut the long rows of some samples.

    Args:
        samples: samples of the micro batch.
        places: their places in the global batch.
        reference_B2: [B, 2] log-probs of the reference, or None.
        factors_B: [B] factors of the places (``PolicyBatch``).
        data: how turns are arranged and prefixes shared.
        objective: which rows the policy computes.
        parallel: degrees and groups.
        window: sliding attention window of the model.
    """
    micro_batch = MicroBatch.make(
        _policy_rows(samples, data=data, objective=objective),
        num_samples=len(samples),
        prefix_sharing=data.prefix_sharing,
        parallel=parallel,
        context_parallel=True,
        window=window,
    )
    return PolicyBatch(
        places=places,
        chosen_tokens=[sample.length(Mode.CHOSEN) for sample in samples],
        micro_batch=micro_batch,
        reference_B2=reference_B2,
        weights_B=np.array([sample.weight for sample in samples]),
        factors_B=factors_B,
    )


def policy_layout(samples: Sequence[Sample], *, data: DataConfig, objective: ObjectiveConfig) -> SequenceLayout:
    """Layout of the samples' long rows before it is cut."""
    return lay_out(
        _policy_rows(samples, data=data, objective=objective),
        prefix_sharing=data.prefix_sharing,
        num_samples=len(samples),
        num_responses=2 * len(samples),
    )


def _policy_rows(samples: Sequence[Sample], *, data: DataConfig, objective: ObjectiveConfig) -> list[Row]:
    uses_preference = spec_of(objective.objective, objective.loss_type).uses_preference
    sides = (Mode.CHOSEN, Mode.REJECTED) if uses_preference else (Mode.CHOSEN,)
    return [
        row
        for slot, sample in enumerate(samples)
        for row in long_rows(sample, slot=slot, turns=data.turns, nll_scope=objective.nll_scope, sides=sides)
    ]


def batch_loss(
    logps_N: Tensor, batch: PolicyBatch, *, objective: ObjectiveConfig, parallel: Parallel
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss of a micro batch, identical on all context-parallel ranks, and the metrics of its samples.

    Args:
        logps_N: [N] log-probs of this rank's places.
        batch: the micro batch.
        objective: the loss.
        parallel: degrees and groups.

    Returns:
        The scalar loss, and the metrics by name, each [B] in fp64 without gradient.
    """
    layout = batch.micro_batch.layout
    sums = response_sums(logps_N, batch.micro_batch, parallel)
    device = logps_N.device
    nll_tokens = torch.from_numpy(layout.nll_tokens).to(device).clamp(min=1)
    response_tokens = torch.from_numpy(layout.response_tokens).to(device).view(-1, 2)
    nll_B = sums.nll_sum_B / nll_tokens
    zeros = torch.zeros_like(nll_B)
    ref_chosen_B = ref_rejected_B = None
    if batch.reference_B2 is not None:
        reference_B2 = torch.from_numpy(batch.reference_B2).to(device=device, dtype=torch.float64)
        ref_chosen_B, ref_rejected_B = reference_B2[:, 0], reference_B2[:, 1]
    if not spec_of(objective.objective, objective.loss_type).uses_preference:
        loss_B = total_loss(objective.objective, None, nll_B, objective.preference_weight)
        preference_B = reward_chosen_B = reward_rejected_B = zeros
        # The rejected rows are not computed.
        rejected_B = zeros
    else:
        terms = preference_loss(
            sums.chosen_B,
            sums.rejected_B,
            ref_chosen_B,
            ref_rejected_B,
            beta=objective.beta,
            loss_type=objective.loss_type,
            label_smoothing=objective.label_smoothing,
            simpo_gamma=objective.simpo_gamma,
            chosen_tokens_B=response_tokens[:, 0],
            rejected_tokens_B=response_tokens[:, 1],
        )
        loss_B = total_loss(
            objective.objective,
            terms.loss_B,
            nll_B,
            objective.preference_weight,
            response_nll_B=response_nll(sums.chosen_B, response_tokens[:, 0]),
            rpo_alpha=objective.rpo_alpha,
        )
        preference_B, reward_chosen_B, reward_rejected_B = terms.loss_B, terms.reward_chosen_B, terms.reward_rejected_B
        rejected_B = sums.rejected_B
    weights_B, factors_B = (torch.from_numpy(values).to(device) for values in (batch.weights_B, batch.factors_B))
    loss_B = weights_B * loss_B
    margins_B = reward_chosen_B - reward_rejected_B
    metrics = {
        "loss": loss_B,
        "nll": nll_B,
        "preference": preference_B,
        "logps/chosen": sums.chosen_B,
        "logps/rejected": rejected_B,
        "ref/chosen": zeros if ref_chosen_B is None else ref_chosen_B,
        "ref/rejected": zeros if ref_rejected_B is None else ref_rejected_B,
        "rewards/chosen": reward_chosen_B,
        "rewards/rejected": reward_rejected_B,
        "rewards/margins": margins_B,
        "rewards/accuracies": margins_B > 0,
        "tokens": torch.tensor(batch.chosen_tokens, device=device),
        "response_tokens/chosen": response_tokens[:, 0],
        "response_tokens/rejected": response_tokens[:, 1],
    }
    return (factors_B * loss_B).mean(), {name: value.detach().double() for name, value in metrics.items()}
