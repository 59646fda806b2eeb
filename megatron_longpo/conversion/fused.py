"""Fused tensors: an entry of the family's table at one layer, the unit that a conversion reads, checks and writes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_longpo.checkpoint.distributed import DistributedReader
from megatron_longpo.checkpoint.huggingface import BLOCK_ELEMENTS, HuggingFaceWeights, is_finite
from megatron_longpo.errors import CheckpointError, DamagedError
from megatron_longpo.model.entries import Entry
from megatron_longpo.model.families import entries_of
from megatron_longpo.model.shape import FILE_NAME, ModelShape

# Buffers that old versions of transformers saved; they are computed from the configuration.
_IGNORED_SUFFIX = "rotary_emb.inv_freq"
_STACKED_PREFIX = "decoder.layers."
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True, eq=False)
class FusedTensor:
    """One of our tensors in one layer, with the Hugging Face tensors that it is made of.

    Attributes:
        entry: entry of the family's table.
        layer: layer number; None outside the layers.
        model: shape of the model.
    """

    entry: Entry
    layer: int | None
    model: ModelShape

    @property
    def label(self) -> str:
        """Name of the tensor for messages."""
        return self.entry.ours if self.layer is None else f"{self.entry.ours} of layer {self.layer}"

    @property
    def parameter_name(self) -> str:
        """Name of the parameter in an unsharded model."""
        if self.layer is None:
            return self.entry.ours
        return self.entry.ours.replace(_STACKED_PREFIX, f"{_STACKED_PREFIX}{self.layer}.", 1)

    @property
    def names(self) -> list[str]:
        """Hugging Face's names."""
        return self.entry.names(self.layer)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Shape of our tensor in this layer."""
        return self.entry.our_shape(self.model)

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the stored tensor, all layers."""
        return self.sizes if self.layer is None else (self.model.num_layers, *self.sizes)

    @property
    def stored_sizes(self) -> tuple[int, ...]:
        """Shape of this layer's part of the stored tensor."""
        return self.sizes if self.layer is None else (1, *self.sizes)

    @property
    def stored_offsets(self) -> tuple[int, ...]:
        """Position of this layer's part in the stored tensor."""
        inside = (0,) * len(self.sizes)
        return inside if self.layer is None else (self.layer, *inside)

    def read(self, reader: DistributedReader) -> Tensor:
        """Our tensor in this layer, read from a checkpoint."""
        stored = reader.read(self.entry.ours, self.stored_offsets, self.stored_sizes)
        return stored if self.layer is None else stored[0]

    def split(self, tensor: Tensor) -> Iterator[Tensor]:
        """Split our tensor into Hugging Face's, made one at a time."""
        return self.entry.split(tensor, self.model)


def fused_tensors(shape: ModelShape) -> list[FusedTensor]:
    """All tensors of a model layer by layer, so that a shard of a safetensors folder contains whole layers."""
    entries = entries_of(shape)
    outside = [FusedTensor(entry, None, shape) for entry in entries if not entry.stacked]
    stacked = [entry for entry in entries if entry.stacked]
    return outside + [FusedTensor(entry, layer, shape) for layer in range(shape.num_layers) for entry in stacked]


def check_names(source: HuggingFaceWeights, shape: ModelShape) -> None:
    """Check that a model folder has exactly the tensors of a model, with their shapes and floating-point values.

    Raises:
        CheckpointError: a tensor is missing or unknown, has another shape or no floating-point values, or an output layer that
            config.json ties to the embedding is another one.
    """
    expected = {
        name: sizes
        for fused in fused_tensors(shape)
        for name, sizes in zip(fused.names, fused.entry.their_shapes(shape), strict=True)
    }
    present = {name for name in source.names() if not name.endswith(_IGNORED_SUFFIX)}
    has_own_head = not shape.untie_embeddings_and_output_weights and _HEAD in present
    if has_own_head:
        # A copy of the embedding, which is checked below.
        present.discard(_HEAD)
    missing, unknown = sorted(set(expected) - present), sorted(present - set(expected))
    if missing or unknown:
        raise CheckpointError(
            f"{source.folder}: its tensors do not fit its config.json: missing {missing[:3] or 'none'} ({len(missing)}), "
            f"unknown {unknown[:3] or 'none'} ({len(unknown)}); {_fix_of(missing)}"
        )
    for name, sizes in expected.items():
        if source.shape(name) != sizes:
            raise CheckpointError(
                f"{source.folder}: {name} has shape {list(source.shape(name))}, but config.json says {list(sizes)}, so they "
                "belong to different models; download the model again"
            )
        source.dtype(name)
    if has_own_head:
        _check_tied(source)


def _fix_of(missing: list[str]) -> str:
    if missing == [_HEAD]:
        return "set tie_word_embeddings to true in config.json if the output layer is the embedding, or download the model again"
    return "download the model again, or fix config.json"


def _check_tied(source: HuggingFaceWeights) -> None:
    """Check that an output layer in a file, which config.json ties to the embedding, is that embedding.

    transformers 5 uses an output layer of its own in spite of the flag, while transformers 4 and vLLM drop it.
    """
    is_copy = source.shape(_HEAD) == source.shape(_EMBEDDING) and source.dtype(_HEAD) == source.dtype(_EMBEDDING)
    rows, columns = source.shape(_EMBEDDING)
    step = max(1, BLOCK_ELEMENTS // columns)
    for start in range(0, rows if is_copy else 0, step):
        ends = start, min(start + step, rows)
        is_copy = is_copy and torch.equal(source.read_rows(_HEAD, *ends), source.read_rows(_EMBEDDING, *ends))
    if not is_copy:
        raise CheckpointError(
            f"{source.folder}: tie_word_embeddings is true in config.json, but {_HEAD} is not {_EMBEDDING}; set "
            f"tie_word_embeddings to false to keep {_HEAD}, as transformers 5 does, or remove the tensor to tie it, as "
            "transformers 4 and vLLM do"
        )


def check_stored(reader: DistributedReader, fused: FusedTensor) -> None:
    """Check that a checkpoint has one of our tensors, with its shape.

    Raises:
        CheckpointError: it is missing, or has another shape.
    """
    stored, expected = reader.shape(fused.entry.ours), fused.stored_shape
    # Training pads the vocabulary; only its true rows are read.
    is_padded = fused.entry.is_vocabulary and stored[0] >= expected[0] and stored[1:] == expected[1:]
    if stored != expected and not is_padded:
        raise CheckpointError(
            f"{reader.folder}: {fused.entry.ours} has shape {list(stored)}, but {FILE_NAME} says {list(expected)}, so they "
            "belong to different models; convert the model again"
        )


def check_finite(tensor: Tensor, label: str, fix: str) -> None:
    """Check that a tensor contains neither NaN nor infinities.

    Args:
        tensor: tensor to check.
        label: its name for the message.
        fix: what the user can do.

    Raises:
        CheckpointError: it does.
    """
    if not is_finite(tensor):
        raise DamagedError(f"{label} contains NaN or Inf; {fix}")


def layer_weights(
    reader: DistributedReader, shape: ModelShape, layer: int | None, prefix: str
) -> Iterator[tuple[str, Tensor]]:
    """Weights of a checkpoint with the names that they have in an unsharded model, read one at a time.

    Args:
        reader: reader of the checkpoint.
        shape: shape of the model.
        layer: layer number; None for the weights outside the layers.
        prefix: prefix of the names wanted.
    """
    for fused in fused_tensors(shape):
        if fused.layer == layer and fused.parameter_name.startswith(prefix):
            yield fused.parameter_name, fused.read(reader)
