"""What the model is called with.

Shape legend: s = places on this context-parallel rank, N = places with a loss on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_longpo.model.attention import AttentionPlan


@dataclass(frozen=True)
class ModelInputs:
    """One sequence, cut for this rank, on its device.

    Attributes:
        tokens_1s, positions_1s: [1, s] token ids of this rank's places and their RoPE positions.
        attention: which places see which, over the whole sequence.
        loss_places_N: [N] indices, among this rank's places, of those with a loss.
        targets_N: [N] token ids that these places predict.
        loss_counts: with sequence parallelism, how many of these places each tensor-parallel rank holds; otherwise one number, N.
            None: N.
    """

    tokens_1s: Tensor
    positions_1s: Tensor
    attention: AttentionPlan
    loss_places_N: Tensor
    targets_N: Tensor
    loss_counts: tuple[int, ...] | None = None
