"""What the attention kernels are called with: shapes, strides and offsets of each block, before a kernel's own views of them."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from megatron_longpo.model.gpt import PolicyModel
from megatron_longpo.model.kernels import AttentionKernels, BlockInputs, Gradients


class RecordingKernels:
    """Passes calls on to the kernels, and counts them by the layout of their tensors.

    Args:
        kernels: kernels that are called.
        calls: number of calls by direction and layout of the tensors, as JSON; added to.
    """

    def __init__(self, kernels: AttentionKernels, calls: collections.Counter[str]) -> None:
        self._kernels, self._calls = kernels, calls

    @property
    def name(self) -> str:
        return self._kernels.name

    def calls(self, lengths: tuple[int, ...], heads: int, /) -> list[list[int]]:
        return self._kernels.calls(lengths, heads)

    def forward(self, block: BlockInputs) -> tuple[Tensor, Tensor]:
        self._note("forward", block, {})
        return self._kernels.forward(block)

    def backward(self, block: BlockInputs, grad_out: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        self._note("backward", block, {"grad_out": grad_out, "out": out, "lse": lse})
        return self._kernels.backward(block, grad_out, out, lse)

    def _note(self, direction: str, block: BlockInputs, others: dict[str, Tensor]) -> None:
        tensors = {"q": block.q, "k": block.k, "v": block.v, **others}
        given: dict[str, Any] = {"direction": direction, "lengths": block.lengths}
        given |= {name: [list(x.shape), list(x.stride()), x.storage_offset()] for name, x in tensors.items()}
        self._calls[json.dumps(given)] += 1


def record_blocks(chunks: Sequence[PolicyModel], calls: collections.Counter[str]) -> None:
    """Have the models' attention kernels recorded from now on."""
    for chunk in chunks:
        recording = RecordingKernels(chunk.attention.kernels, calls)
        chunk.attention = dataclasses.replace(chunk.attention, kernels=recording)
