"""Comparison of a checkpoint with a Hugging Face folder: settings, and every tensor bit by bit after the mapping."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_longpo.checkpoint.checksums import verified
from megatron_longpo.checkpoint.distributed import DistributedReader
from megatron_longpo.checkpoint.folders import resolve
from megatron_longpo.checkpoint.huggingface import BLOCK_ELEMENTS, HuggingFaceWeights, read_hf_config
from megatron_longpo.checkpoint.prefetch import Prefetcher
from megatron_longpo.conversion.changes import NO_CHANGES, Changes
from megatron_longpo.conversion.fused import check_names, check_stored, fused_tensors
from megatron_longpo.model.families import shape_from_hf
from megatron_longpo.model.shape import FILE_NAME, ModelShape
from megatron_longpo.runtime.collectives import all_gather_objects, my_share, raise_on_all_ranks
from megatron_longpo.runtime.progress import OnProgress, ignore_progress

# Fields in which two checkpoints of the same tensors may differ.
_SETTINGS = frozenset({"rotary_base", "rope_scaling", "max_position_embeddings", "layernorm_epsilon", "window_size"})
_NOT_COMPARED = frozenset({"dtype", "tokenizer_hash", "weights_hash", "base_model", "base_revision", "init_method_std"})
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Difference:
    """First place where a tensor of the two sides differs.

    Attributes:
        name: Hugging Face's name of the tensor.
        layer: layer number; None outside the layers.
        index: index of the first element that differs.
        ours, theirs: its values in the checkpoint and in the Hugging Face folder.
        largest: largest difference in the tensor.
    """

    name: str
    layer: int | None
    index: tuple[int, ...]
    ours: float
    theirs: float
    largest: float


@dataclass(frozen=True)
class Comparison:
    """Result of comparing a checkpoint with a Hugging Face folder.

    Attributes:
        tensors, bytes: number of tensors and bytes compared.
        layers: number of layers of the model.
        settings: one line per setting that differs.
        differences: tensors that differ, in file order.
    """

    tensors: int
    bytes: int
    layers: int
    settings: list[str]
    differences: list[Difference]

    @property
    def is_equal(self) -> bool:
        return not self.settings and not self.differences


@dataclass(frozen=True)
class Sides:
    """Shapes of a checkpoint and of a Hugging Face folder that should be the same model.

    Attributes:
        ours, theirs: shape of the checkpoint and of the folder; one of them with the changes of the conversion.
        config: the folder's config.json.
    """

    ours: ModelShape
    theirs: ModelShape
    config: dict[str, Any]

    @classmethod
    def read(cls, checkpoint: Path, hf: Path, changes: Changes) -> Sides:
        """Read both shapes.

        Export applied the changes to ours, import to theirs: whichever leaves fewer differences is assumed.
        """
        config = read_hf_config(hf)
        ours, theirs = ModelShape.read(checkpoint), shape_from_hf(config, str(hf / "config.json"))
        exported = cls(changes.apply(ours, "verify"), theirs, config)
        imported = cls(ours, changes.apply(theirs, "verify"), config)
        return imported if len(imported.unequal_fields()) < len(exported.unequal_fields()) else exported

    def unequal_fields(self) -> list[str]:
        """Names of the fields that differ, except those that say nothing about the model itself."""
        return unequal_fields(self.ours, self.theirs)


def unequal_fields(a: ModelShape, b: ModelShape) -> list[str]:
    """Names of the fields in which two shapes differ, except those that say nothing about the model itself."""
    names = [f.name for f in dataclasses.fields(ModelShape) if f.name not in _NOT_COMPARED]
    return [name for name in names if getattr(a, name) != getattr(b, name)]


def compare(
    checkpoint: str | Path,
    hf: str | Path,
    *,
    changes: Changes = NO_CHANGES,
    progress: OnProgress = ignore_progress,
) -> Comparison:
    """Compare a checkpoint with a Hugging Face folder: settings, and every tensor bit by bit after the mapping; collective.

    Neither side is held as a whole. Where the dtypes differ, the wider side's values are cast first, as the conversion did.

    Args:
        checkpoint: converted checkpoint, one iteration of a run, or a run's folder (its newest iteration).
        hf: model folder.
        changes: changes that import or export was given; they are applied to one side, which must then equal the other.
        progress: called with the bytes (of the Hugging Face side) that this process has compared since the last call, and the
            total of all processes.

    Raises:
        CheckpointError: a side lacks a tensor, or cannot be read.
    """
    hf = Path(hf)
    differences: list[tuple[int, Difference]] = []
    with raise_on_all_ranks(hf):
        folder = resolve(checkpoint)
        sides = Sides.read(folder, hf, changes)
        model, unequal = sides.ours, sides.unequal_fields()
        settings = [
            f"{name}: {FILE_NAME} has {getattr(sides.ours, name)}, config.json {getattr(sides.theirs, name)}"
            for name in unequal
        ]
        if set(unequal) - _SETTINGS:
            # Models with different tensors.
            return Comparison(tensors=0, bytes=0, layers=model.num_layers, settings=settings, differences=[])
        source, reader = HuggingFaceWeights(hf), DistributedReader(folder)
        check_names(source, sides.theirs)
        every = fused_tensors(model)
        for fused in every:
            check_stored(reader, fused)
        their_bytes = [fused.numel * source.dtype(fused.names[0]).itemsize for fused in every]
    total = sum(their_bytes)
    mine = my_share(list(enumerate(every)), their_bytes)
    items = [(f.numel * reader.dtype(f.entry.ours).itemsize, partial(f.read, reader)) for _, f in mine]
    with verified(folder), raise_on_all_ranks(hf), Prefetcher(items) as prefetched:
        for number, fused in mine:
            # Not kept under a name, so that it is freed before the next one is made.
            parts = fused.split(next(prefetched))
            for name in fused.names:
                found = _first_difference(next(parts), source, name, fused.layer)
                if found is not None:
                    differences.append((number, found))
            del parts
            progress(their_bytes[number], total=total)
    gathered = sorted((x for part in all_gather_objects(differences) for x in part), key=lambda x: x[0])
    return Comparison(
        tensors=sum(len(fused.names) for fused in every),
        bytes=total,
        layers=model.num_layers,
        settings=settings,
        differences=[difference for _, difference in gathered],
    )


def _first_difference(ours: Tensor, source: HuggingFaceWeights, name: str, layer: int | None) -> Difference | None:
    """First difference of a tensor; theirs is read a block of rows at a time."""
    rows = max(1, BLOCK_ELEMENTS * len(ours) // max(1, ours.numel()))
    index: tuple[int, ...] | None = None
    our_value = their_value = largest = 0.0
    for start in range(0, len(ours), rows):
        x = ours[start : start + rows]
        y = source.read_rows(name, start, start + rows)
        if _same_bits(x, y):
            continue
        narrow = x.dtype if x.dtype.itemsize <= y.dtype.itemsize else y.dtype
        a, b = x.to(narrow), y.to(narrow)
        # Different bits can be equal numbers: 0 and -0.
        gap = (a.double() - b.double()).abs().nan_to_num(float("inf"), posinf=float("inf"))
        largest = max(largest, float(gap.max()))
        if index is None:
            row, *rest = (_as_integers(a) != _as_integers(b)).nonzero()[0].tolist()
            index = (start + row, *rest)
            our_value, their_value = float(x[(row, *rest)]), float(y[(row, *rest)])
    if index is None:
        return None
    return Difference(name=name, layer=layer, index=index, ours=our_value, theirs=their_value, largest=largest)


def _same_bits(x: Tensor, y: Tensor) -> bool:
    if x.dtype == y.dtype:
        return torch.equal(_as_integers(x), _as_integers(y))
    # Either side may have been cast: import casts theirs to ours, export ours to theirs.
    casts = []
    if x.dtype.itemsize >= y.dtype.itemsize:
        casts.append((x.to(y.dtype), y))
    if y.dtype.itemsize >= x.dtype.itemsize:
        casts.append((x, y.to(x.dtype)))
    return any(torch.equal(_as_integers(a), _as_integers(b)) for a, b in casts)


def _as_integers(x: Tensor) -> Tensor:
    return x.contiguous().view(_INTEGERS[x.dtype.itemsize])
