"""Export: a checkpoint becomes a Hugging Face folder that transformers loads as it is."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_longpo.checkpoint.card import CARD, RUN_CONFIG, write_card
from megatron_longpo.checkpoint.checksums import hash_files, verified, write_checksums
from megatron_longpo.checkpoint.distributed import DistributedReader
from megatron_longpo.checkpoint.folders import ASSETS, from_newest_good
from megatron_longpo.checkpoint.huggingface import (
    DTYPES,
    MAX_CONFIG_BYTES,
    LazyTensor,
    dtype_name,
    plan_shards,
    read_hf_config,
    shard_name,
    write_index,
    write_shard,
)
from megatron_longpo.checkpoint.prefetch import Prefetcher
from megatron_longpo.conversion.carried import carry_training, describe
from megatron_longpo.conversion.changes import NO_CHANGES, Changes, Conversion
from megatron_longpo.conversion.fused import FusedTensor, check_finite, check_stored, fused_tensors
from megatron_longpo.conversion.output import check_new, copy_assets, remove_auto_map, staging_folder
from megatron_longpo.errors import CheckpointError, one_line
from megatron_longpo.model.families import config_for_export
from megatron_longpo.model.shape import ModelShape
from megatron_longpo.runtime.collectives import my_share, raise_on_all_ranks, rank
from megatron_longpo.runtime.log import log
from megatron_longpo.runtime.progress import OnProgress, ignore_progress
from megatron_longpo.runtime.reading import read_json


def export_hf(
    checkpoint: str | Path,
    output: str | Path,
    *,
    changes: Changes = NO_CHANGES,
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    check: Callable[[Path, Path], None] | None = None,
    progress: OnProgress = ignore_progress,
) -> Conversion:
    """Convert a converted or trained checkpoint into a Hugging Face folder; collective.

    The processes of a process group share the shards. Optimizer states are not read. A trained model gets a model card,
    README.md.

    Args:
        checkpoint: converted checkpoint, one iteration of a run, or a run's folder (its newest iteration).
        output: new model folder; it appears when it is complete.
        changes: changes to RoPE and the longest context, written to config.json.
        dtype: dtype of the weights. Default: that of the imported model.
        max_shard_bytes: largest safetensors file, in bytes.
        check: called with the checkpoint's folder and the written folder before the latter gets its name; what it raises prevents
            that.
        progress: called with the bytes that this process has converted since the last call, and the total of all processes.

    Raises:
        CheckpointError: the checkpoint lacks a tensor, a weight is not finite, the output exists, or the disk is too small.
    """
    output = Path(os.path.abspath(output))
    check_new(output)

    def export(folder: Path) -> Conversion:
        return _export(
            folder,
            output,
            changes=changes,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            check=check,
            progress=progress,
        )

    return from_newest_good(checkpoint, export)


def _export(
    folder: Path,
    output: Path,
    *,
    changes: Changes,
    dtype: str | None,
    max_shard_bytes: int,
    check: Callable[[Path, Path], None] | None,
    progress: OnProgress,
) -> Conversion:
    shape = changes.apply(ModelShape.read(folder), "export")
    assets = folder / ASSETS
    config = read_hf_config(assets)
    exporter = _Exporter(DistributedReader(folder), shape, dtype, progress)
    shards = plan_shards(exporter.tensors, max_shard_bytes)
    written_dtype = dtype_name(exporter.tensors[0].dtype)
    with staging_folder(output, exporter.total) as staging:
        with verified(folder), raise_on_all_ranks(output):
            own = []
            for number, shard in my_share(list(enumerate(shards)), [sum(t.bytes for t in s) for s in shards]):
                own.append(staging / shard_name(number, len(shards)))
                with closing(exporter.values(shard)) as values:
                    write_shard(own[-1], shard, values)
            if rank() == 0:
                write_index(staging, shards)
                left_out = copy_assets(assets, staging)
                exported = config_for_export(config, shape, written_dtype, str(assets / "config.json"))
                (staging / "config.json").write_text(json.dumps(exported, indent=2) + "\n", encoding="utf-8")
                remove_auto_map(staging)
                _raise_model_max_length(staging / "tokenizer_config.json", shape.max_position_embeddings)
                carried = carry_training(folder, staging)
                write_card(folder, staging, shape, written_dtype)
                lines = [*carried, *describe(staging, shape, written_dtype, left_out)]
        if check is not None:
            check(folder, staging)
        with raise_on_all_ranks(output):
            hash_files(staging, own, rank())
        with raise_on_all_ranks(output):
            if rank() == 0:
                # The card is for people, who may write more into it.
                write_checksums(staging, leave_out=(CARD,))
    if rank() == 0:
        for line in lines:
            log(f"export: {line}")
    return Conversion(len(exporter.tensors), exporter.total, shape)


@dataclass(frozen=True)
class _ExportedTensor(LazyTensor):
    """A Hugging Face tensor to be written.

    Attributes:
        fused: tensor of ours that it is a part of.
        number: index among the parts of ``fused``.
    """

    fused: FusedTensor
    number: int


class _Exporter:
    """Makes Hugging Face's tensors from a checkpoint.

    Args:
        reader: reader of the checkpoint.
        shape: shape of the exported model.
        dtype: name of the dtype to write; None means that of the imported model.
        progress: see ``export_hf``.

    Attributes:
        tensors: all tensors, in file order.
        total: their bytes.

    Raises:
        CheckpointError: the checkpoint lacks a tensor, or has one of another shape.
    """

    def __init__(self, reader: DistributedReader, shape: ModelShape, dtype: str | None, progress: OnProgress) -> None:
        self._reader, self._progress = reader, progress
        is_trained = (reader.folder / RUN_CONFIG).is_file()
        self.tensors: list[_ExportedTensor] = []
        for fused in fused_tensors(shape):
            check_stored(reader, fused)
            # A converted checkpoint keeps the dtype of every tensor; training has a dtype of its own.
            keeps_dtype = dtype is None and not is_trained
            written = reader.dtype(fused.entry.ours) if keeps_dtype else DTYPES[dtype or shape.dtype]
            self.tensors += _parts_of(fused, written)
        self.total = sum(tensor.bytes for tensor in self.tensors)

    def values(self, shard: Sequence[_ExportedTensor]) -> Generator[Tensor, None, None]:
        """Values of a shard's tensors, in order. A tensor of ours that is cut by a shard's end is read for both shards.

        Raises:
            CheckpointError: a value cannot be read, or is not finite.
        """
        runs = [(fused, list(run)) for fused, run in itertools.groupby(shard, key=lambda tensor: tensor.fused)]
        with Prefetcher([(self._stored_bytes(fused), partial(self._read, fused)) for fused, _ in runs]) as prefetched:
            for fused, run in runs:
                wanted = {tensor.number: tensor for tensor in run}
                # Not kept under a name, so that it is freed before the next one is made.
                parts = fused.split(next(prefetched))
                for number in range(len(fused.names)):
                    part = next(parts)
                    if number in wanted:
                        yield part
                        self._progress(wanted[number].bytes, total=self.total)
                    del part
                del parts

    def _stored_bytes(self, fused: FusedTensor) -> int:
        return fused.numel * self._reader.dtype(fused.entry.ours).itemsize

    def _read(self, fused: FusedTensor) -> Tensor:
        tensor = fused.read(self._reader)
        check_finite(tensor, f"{self._reader.folder}: {fused.label}", "export another checkpoint")
        return tensor


def _parts_of(fused: FusedTensor, dtype: torch.dtype) -> list[_ExportedTensor]:
    shapes = fused.entry.their_shapes(fused.model)
    return [
        _ExportedTensor(name=name, shape=shape, dtype=dtype, fused=fused, number=number)
        for number, (name, shape) in enumerate(zip(fused.names, shapes, strict=True))
    ]


def _raise_model_max_length(path: Path, length: int) -> None:
    """Let the tokenizer accept the longest context that the model claims."""
    if not path.is_file():
        return
    try:
        content = read_json(path, MAX_CONFIG_BYTES)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path.name} of the imported model: cannot be read ({one_line(error)}); convert the model again"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.name} of the imported model: is not a JSON object; convert the model again")
    if isinstance(content.get("model_max_length"), int) and content["model_max_length"] < length:
        content["model_max_length"] = length
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
