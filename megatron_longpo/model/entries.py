"""Entries: one Megatron tensor each, and the Hugging Face tensors that it is made of. An entry serves both directions.

Megatron stacks the layers of a model under one key (``decoder.layers.mlp.linear_fc2.weight`` is [layers, ...]), fuses query,
key and value per key-value group, and concatenates the gate and up projections.

Letters of a tensor's dimensions: H = hidden size, D = head size, Q/K = width of all query/key-value heads, F = MLP width,
G = gate and up together (2F), V = vocabulary size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_longpo.model.shape import ModelShape


def _size(letter: str, shape: ModelShape) -> int:
    return {
        "H": shape.hidden_size,
        "D": shape.kv_channels,
        "Q": shape.query_width,
        "K": shape.kv_width,
        "F": shape.ffn_hidden_size,
        "G": 2 * shape.ffn_hidden_size,
        "V": shape.vocab_size,
    }[letter]


@dataclass(frozen=True)
class HuggingFaceTensor:
    """A Hugging Face tensor.

    Attributes:
        name: name, with ``*`` for the layer number.
        dims: letters of its dimensions, such as ``QH``.
        is_rotated: whether RoPE rotates what its rows compute, so that the order of the rows matters.
    """

    name: str
    dims: str
    is_rotated: bool = False

    def shape_in(self, shape: ModelShape) -> tuple[int, ...]:
        return tuple(_size(letter, shape) for letter in self.dims)


@dataclass(frozen=True)
class Entry(ABC):
    """One Megatron tensor and the Hugging Face tensors that it is made of.

    Attributes:
        ours: key in the distributed checkpoint.
    """

    ours: str

    @property
    @abstractmethod
    def theirs(self) -> tuple[HuggingFaceTensor, ...]:
        """Hugging Face's tensors, in the order in which they are fused."""

    def views(self, fused: Tensor, shape: ModelShape) -> list[Tensor]:
        """Views of our tensor, one for each of Hugging Face's. By default they are concatenated."""
        return list(fused.split([sizes[0] for sizes in self.their_shapes(shape)]))

    @property
    def stacked(self) -> bool:
        """Whether ours has a leading layer dimension."""
        return "*" in self.theirs[0].name

    @property
    def is_vocabulary(self) -> bool:
        """Whether rows are tokens: training pads them."""
        return self.theirs[0].dims[0] == "V"

    def names(self, layer: int | None) -> list[str]:
        """Hugging Face's names in a layer; ``layer`` is None outside the layers."""
        return [tensor.name.replace("*", str(layer)) for tensor in self.theirs]

    def their_shapes(self, shape: ModelShape) -> list[tuple[int, ...]]:
        """Shapes of Hugging Face's tensors."""
        return [tensor.shape_in(shape) for tensor in self.theirs]

    def our_shape(self, shape: ModelShape) -> tuple[int, ...]:
        """Shape of ours; that of one layer if layers are stacked."""
        shapes = self.their_shapes(shape)
        return (sum(s[0] for s in shapes), *shapes[0][1:])

    def fuse(self, tensors: Iterable[Tensor], shape: ModelShape) -> Tensor:
        """Combine Hugging Face's tensors, taken one at a time, into ours."""
        source = iter(tensors)
        if len(self.theirs) == 1:
            return next(source)
        fused: Tensor | None = None
        for number, theirs in enumerate(self.theirs):
            # A loop over `source` would keep each tensor while the next one is read.
            tensor = next(source)
            if fused is None:
                fused = torch.empty(self.our_shape(shape), dtype=tensor.dtype)
            view = self.views(fused, shape)[number]
            view.copy_((_halves(tensor, shape) if theirs.is_rotated else tensor).reshape(view.shape))
            del tensor
        assert fused is not None
        return fused

    def split(self, tensor: Tensor, shape: ModelShape) -> Iterator[Tensor]:
        """Split ours into Hugging Face's tensors, made one at a time."""
        for theirs, view in zip(self.theirs, self.views(tensor, shape), strict=True):
            part = view.reshape(theirs.shape_in(shape))
            yield _neighbours(part, shape) if theirs.is_rotated else part


@dataclass(frozen=True)
class Plain(Entry):
    """A tensor that both sides store alike.

    Attributes:
        name: Hugging Face's name, with ``*`` for the layer number.
        dims: letters of its dimensions.
    """

    name: str
    dims: str

    @property
    def theirs(self) -> tuple[HuggingFaceTensor, ...]:
        return (HuggingFaceTensor(self.name, self.dims),)


@dataclass(frozen=True)
class QKV(Entry):
    """Query, key and value projections, or their biases, fused per key-value group.

    Attributes:
        q, k, v: Hugging Face's names, with ``*`` for the layer number.
        columns: letters of the dimensions after the rows; empty for biases.
    """

    q: str
    k: str
    v: str
    columns: str = "H"

    @property
    def theirs(self) -> tuple[HuggingFaceTensor, ...]:
        return (
            HuggingFaceTensor(self.q, "Q" + self.columns, is_rotated=True),
            HuggingFaceTensor(self.k, "K" + self.columns, is_rotated=True),
            HuggingFaceTensor(self.v, "K" + self.columns),
        )

    def views(self, fused: Tensor, shape: ModelShape) -> list[Tensor]:
        # [key-value groups, query heads of a group + key + value, head size, columns]
        groups = shape.num_query_groups
        per_group = shape.num_attention_heads // groups
        mixed = fused.view(groups, per_group + 2, shape.kv_channels, *fused.shape[1:])
        return list(mixed.split([per_group, 1, 1], dim=1))


@dataclass(frozen=True)
class GateUp(Entry):
    """Gate and up projections of the MLP, concatenated.

    Attributes:
        gate, up: Hugging Face's names, with ``*`` for the layer number.
    """

    gate: str
    up: str

    @property
    def theirs(self) -> tuple[HuggingFaceTensor, ...]:
        return (HuggingFaceTensor(self.gate, "FH"), HuggingFaceTensor(self.up, "FH"))


def _halves(x: Tensor, shape: ModelShape) -> Tensor:
    """Reorder rows of query or key so that old channels 2i and 2i + 1, which RoPE pairs, become i and i + R."""
    if not shape.rotary_interleaved:
        return x
    heads = x.unflatten(0, (-1, shape.kv_channels))
    rotated = int(shape.kv_channels * shape.rotary_percent)
    return torch.cat([heads[:, 0:rotated:2], heads[:, 1:rotated:2], heads[:, rotated:]], dim=1).flatten(0, 1)


def _neighbours(x: Tensor, shape: ModelShape) -> Tensor:
    """The inverse of ``_halves``."""
    if not shape.rotary_interleaved:
        return x
    heads = x.unflatten(0, (-1, shape.kv_channels))
    rotated = int(shape.kv_channels * shape.rotary_percent)
    pairs = torch.stack([heads[:, : rotated // 2], heads[:, rotated // 2 : rotated]], dim=2).flatten(1, 2)
    return torch.cat([pairs, heads[:, rotated:]], dim=1).flatten(0, 1)
