"""Micro batches: samples laid out, cut for this rank, and their losses.

Shape legend: B = samples of the micro batch, N = places with a loss on this rank, s = places on this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron_longpo.config import DataConfig, ObjectiveConfig
from megatron_longpo.data.preference import Mode, Sample, long_rows, short_rows
from megatron_longpo.data.sequence import (
    NO_RESPONSE,
    Range,
    Row,
    SequenceLayout,
    Shard,
    assign_places,
    lay_out,
    local_spans,
    shard,
)
from megatron_longpo.model.attention import AttentionPlan
from megatron_longpo.model.inputs import ModelInputs
from megatron_longpo.model.logprobs import KnownGradients, TokenOrder
from megatron_longpo.runtime import platform
from megatron_longpo.runtime.process_groups import Parallel, sum_over_group
from megatron_longpo.training.objective import (
    preference_loss,
    response_nll,
    reward_distance,
    spec_of,
    total_loss,
)

# Tiles per rank with cp_comm_type=allgather. Two balance a plain causal sequence (zigzag); branches need more.
TILES = 4

# How many context-parallel exchanges are in flight at once. More overlap hides more latency but makes each matmul smaller.
HEAD_GROUPS = 4


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
        on_device: indices and slots of the shard, and whatever else the caller gave, on the device.
        num_samples: number of samples whose rows these are.
        context_parallel: whether the sequence is cut over the context-parallel ranks; otherwise this rank has all of it.
    """

    inputs: ModelInputs
    layout: SequenceLayout
    shard: Shard
    on_device: Mapping[str, Tensor]
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
        responses: int = 2,
        alignment: int = 1,
        more: Callable[[SequenceLayout, Shard], Mapping[str, np.ndarray]] = lambda _layout, _shard: {},
    ) -> MicroBatch:
        """Lay rows out, cut them, and bring what this rank needs of them to its device in one copy.

        Args:
            rows: rows with response slots ``responses * sample + number`` and NLL slots ``sample``.
            num_samples: number of samples that the slots refer to.
            prefix_sharing: whether common prefixes are shared.
            parallel: degrees and groups.
            context_parallel: whether to cut the sequence over the context-parallel ranks.
            window: sliding attention window of the model.
            responses: response slots per sample: chosen, rejected, and others.
            alignment: places of each rank, of tensor-parallel ranks with sequence parallelism too, are a multiple of this.
            more: function that makes other arrays, by name, for ``on_device``.
        """
        layout = lay_out(
            rows, prefix_sharing=prefix_sharing, num_samples=num_samples, num_responses=responses * num_samples
        )
        parts = parallel.context_size if context_parallel else 1
        part = parallel.context_rank if context_parallel else 0
        gather = parts > 1 and parallel.comm_type == "allgather"
        ranges_of_rank = assign_places(
            layout,
            multiple=parts * (parallel.tensor_size if parallel.sequence_parallel else 1) * alignment,
            parts=parts,
            tiles=TILES if gather else 1,
        )
        padded = sum(r.length for ranges in ranges_of_rank for r in ranges)
        own = shard(layout, ranges_of_rank[part], padded)
        on_device = platform.CURRENT.to_device(
            {
                "tokens": own.tokens,
                "positions": own.positions,
                "loss_places": own.loss_places_N,
                "targets": own.targets_N,
                "response_index": own.response_index_E,
                "response_slots": own.response_slots_E,
                "nll_index": own.nll_index,
                # In the table of sums, NLLs come after the responses.
                "nll_slots": own.nll_slots + responses * num_samples,
                **({"gathered": _gathered_of(ranges_of_rank, padded)} if gather else {}),
                **more(layout, own),
            }
        )
        attention = AttentionPlan.make(
            local_spans(layout.query_spans, ranges_of_rank[part]) if gather else layout.query_spans,
            parallel.context_group if context_parallel else None,
            parallel.comm_type,
            on_device.get("gathered"),
            head_groups=HEAD_GROUPS,
            window=window,
            positions_S=layout.positions_S,
        )
        inputs = ModelInputs(
            tokens_1s=on_device["tokens"][None],
            positions_1s=on_device["positions"][None],
            attention=attention,
            loss_places_N=on_device["loss_places"],
            targets_N=on_device["targets"],
            loss_counts=_counts_by_rank(own, parallel.tensor_size if parallel.sequence_parallel else 1),
        )
        return cls(
            inputs=inputs,
            layout=layout,
            shard=own,
            on_device=on_device,
            num_samples=num_samples,
            context_parallel=context_parallel,
        )


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
        third_B: log-probs of a third response; None: there are two per sample.
    """

    chosen_B: Tensor
    rejected_B: Tensor
    nll_sum_B: Tensor
    third_B: Tensor | None = None


def response_sums(logps_N: Tensor, batch: MicroBatch, parallel: Parallel) -> ResponseSums:
    """Sum log-probs into responses and NLLs: over places and, in the forward only, over context-parallel ranks."""
    n, of = batch.num_samples, batch.on_device
    # In fp64: summing 128K terms in fp32 would lose three of the digits that layouts have to agree in.
    logps_N = logps_N.double()
    num_responses = len(batch.layout.response_tokens)
    zeros = torch.zeros(num_responses + n, dtype=torch.float64, device=logps_N.device)
    responses = zeros.index_add(0, of["response_slots"], logps_N.index_select(0, of["response_index"]))
    sums = responses.index_add(0, of["nll_slots"], -logps_N.index_select(0, of["nll_index"]))
    if batch.context_parallel:
        sums = sum_over_group(sums, parallel.context_group)
    of_sample = sums[:num_responses].view(n, -1)
    return ResponseSums(
        chosen_B=of_sample[:, 0],
        rejected_B=of_sample[:, 1],
        nll_sum_B=sums[num_responses:],
        third_B=of_sample[:, 2] if of_sample.shape[1] > 2 else None,
    )


def known_nll_grad(layout: SequenceLayout, shard: Shard, scales_B: np.ndarray, *, uses_preference: bool) -> np.ndarray:
    """Gradients of this rank's log-probs that are known before the forward: [N] in fp32, NaN where they are not.

    A token that contributes only to an NLL gets -1 / (NLL tokens of its sample) times the sample's scale. A token that
    contributes to the preference term gets NaN.

    Args:
        layout: the whole sequence.
        shard: this rank's part of it.
        scales_B: [B] gradient of the step's loss by each sample's mean NLL.
        uses_preference: whether the loss has a preference term.
    """
    each_B = scales_B / np.maximum(layout.nll_tokens, 1)
    expected = np.zeros(len(shard.loss_places_N))
    np.subtract.at(expected, shard.nll_index, each_B[shard.nll_slots])
    if uses_preference:
        expected[shard.response_index_E] = np.nan
    return expected.astype(np.float32)


@dataclass(frozen=True)
class PolicyBatch:
    """Samples of one micro batch with all that their loss needs, on the device.

    Attributes:
        places: places of the samples in the global batch.
        chosen_tokens_B: length of each sample's long chosen row in tokens.
        micro_batch: their long rows as this rank computes them.
        reference_B2: [B, 2] reference log-probs of the chosen and the rejected responses; None without a reference.
        weights_B: [B] weights of the samples in fp64, as the data have them.
        factors_B: [B] factors in fp64 that make the mean over the places of a filled-up batch the mean over its samples.
        known: gradients of the log-probs that are known in advance, or None.
    """

    places: Sequence[int]
    chosen_tokens_B: Tensor
    micro_batch: MicroBatch
    reference_B2: Tensor | None
    weights_B: Tensor
    factors_B: Tensor
    known: KnownGradients | None


def policy_batch(
    samples: Sequence[Sample],
    places: Sequence[int],
    reference_B2: np.ndarray | None,
    *,
    factors_B: np.ndarray,
    num_microbatches: int,
    data: DataConfig,
    objective: ObjectiveConfig,
    parallel: Parallel,
    window: int | None = None,
    alignment: int = 1,
) -> PolicyBatch:
    """Lay out and cut the long rows of some samples.

    Args:
        samples: samples of the micro batch.
        places: their places in the global batch.
        reference_B2: [B, 2] log-probs of the reference, or None.
        factors_B: [B] factors of the places (``PolicyBatch``).
        num_microbatches: micro batches of the step.
        data: how turns are arranged and prefixes shared.
        objective: which rows the policy computes.
        parallel: degrees and groups.
        window: sliding attention window of the model.
        alignment: as for ``MicroBatch.make``.
    """
    spec = spec_of(objective.objective, objective.loss_type)
    weights_B = np.array([sample.weight for sample in samples], np.float64)
    # [N] whether a gradient is known; nothing if no loss of the objective is.
    told: list[np.ndarray] = []

    def more(layout: SequenceLayout, own: Shard) -> dict[str, np.ndarray]:
        arrays = {
            "weights": weights_B,
            "factors": factors_B,
            "nll_tokens": layout.nll_tokens,
            "response_tokens": layout.response_tokens.reshape(len(samples), -1),
            "chosen_tokens": np.array([sample.length(Mode.CHOSEN) for sample in samples], np.int64),
        }
        if reference_B2 is not None:
            arrays["reference"] = np.asarray(reference_B2, np.float64)
        if spec.uses_nll and len(own.loss_places_N):
            # The mean over the micro batch's samples and the step's micro batches, times the context-parallel size, as
            # megatron-core's schedule has it (docs/loss.md).
            scale = parallel.context_size / (len(samples) * num_microbatches)
            arrays["known"] = known_nll_grad(
                layout, own, scale * weights_B * factors_B, uses_preference=spec.uses_preference
            )
            told.append(~np.isnan(arrays["known"]))
        return arrays

    micro_batch = MicroBatch.make(
        _policy_rows(samples, data=data, objective=objective),
        num_samples=len(samples),
        prefix_sharing=data.prefix_sharing,
        parallel=parallel,
        context_parallel=True,
        window=window,
        responses=spec.responses,
        alignment=alignment,
        more=more,
    )
    of, counts = micro_batch.on_device, micro_batch.inputs.loss_counts
    assert counts is not None
    return PolicyBatch(
        places=places,
        chosen_tokens_B=of["chosen_tokens"],
        micro_batch=micro_batch,
        reference_B2=of.get("reference"),
        weights_B=of["weights"],
        factors_B=of["factors"],
        known=KnownGradients(of["known"], TokenOrder.make(told[0], counts)) if told else None,
    )


def policy_layout(samples: Sequence[Sample], *, data: DataConfig, objective: ObjectiveConfig) -> SequenceLayout:
    """Layout of the samples' long rows before it is cut."""
    return lay_out(
        _policy_rows(samples, data=data, objective=objective),
        prefix_sharing=data.prefix_sharing,
        num_samples=len(samples),
        num_responses=spec_of(objective.objective, objective.loss_type).responses * len(samples),
    )


def _policy_rows(samples: Sequence[Sample], *, data: DataConfig, objective: ObjectiveConfig) -> list[Row]:
    spec = spec_of(objective.objective, objective.loss_type)
    both = spec.uses_preference and not spec.prefers_short
    sides = (Mode.CHOSEN, Mode.REJECTED) if both else (Mode.CHOSEN,)
    rows: list[Row] = []
    for slot, sample in enumerate(samples):
        long = long_rows(sample, slot=slot, turns=data.turns, nll_scope=objective.nll_scope, sides=sides)
        if not spec.prefers_short:
            rows += long
            continue
        rows += [_with_slots(row, spec.responses * slot + 2) for row in long]
        for row in short_rows(sample, slot=slot):
            rows.append(_with_slots(row, spec.responses * slot + int(np.max(row.response_L)) % 2))
    return rows


def _with_slots(row: Row, response: int) -> Row:
    """The row with another slot for its responses."""
    return replace(row, response_L=np.where(row.response_L == NO_RESPONSE, NO_RESPONSE, response))


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
    sums = response_sums(logps_N, batch.micro_batch, parallel)
    response_tokens = batch.micro_batch.on_device["response_tokens"]
    nll_B = sums.nll_sum_B / batch.micro_batch.on_device["nll_tokens"].clamp(min=1)
    zeros = torch.zeros_like(nll_B)
    ref_chosen_B = ref_rejected_B = None
    if batch.reference_B2 is not None:
        ref_chosen_B, ref_rejected_B = batch.reference_B2.unbind(1)
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
            distance_B=None
            if sums.third_B is None
            else reward_distance(
                sums.chosen_B,
                sums.third_B,
                response_tokens[:, 0],
                beta=objective.beta,
                loss_type=objective.loss_type,
            ),
            solo_alpha=objective.solo_alpha,
        )
        preference_B, reward_chosen_B, reward_rejected_B = terms.loss_B, terms.reward_chosen_B, terms.reward_rejected_B
        rejected_B = sums.rejected_B
    loss_B = batch.weights_B * loss_B
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
        "tokens": batch.chosen_tokens_B,
        "response_tokens/chosen": response_tokens[:, 0],
        "response_tokens/rejected": response_tokens[:, 1],
    }
    return (batch.factors_B * loss_B).mean(), {name: value.detach().double() for name, value in metrics.items()}
