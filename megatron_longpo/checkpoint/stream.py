"""Tensors into and out of checkpoints one at a time, so that a conversion never holds a model.

The distributed checkpoint is torch.distributed.checkpoint's format, which megatron-core's torch_dist reads: a planner
that names every chunk in advance and makes each as it is written, and one that reads any slice.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_longpo.errors import CheckpointError

# --------------------------------------------------------------------------------------------------
# Distributed checkpoints
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LazyChunk:
    """A part of a stored tensor that is made when it is written.

    Attributes:
        key: of the stored tensor.
        global_shape: of the whole stored tensor.
        offsets, sizes: this part.
        dtype: of the tensor.
        make: gives the part, of shape ``sizes``.
    """

    key: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


class _LazySavePlanner(SavePlanner):
    def __init__(self, chunks: Sequence[LazyChunk]) -> None:
        self._chunks = {(c.key, c.offsets): c for c in chunks}

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        return SavePlan(
            [
                WriteItem(
                    index=MetadataIndex(c.key, torch.Size(c.offsets)),
                    type=WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        chunk=ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)),
                        properties=TensorProperties(dtype=c.dtype),
                        size=torch.Size(c.global_shape),
                    ),
                )
                for c in self._chunks.values()
            ]
        )

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        assert write_item.index.offset is not None
        chunk = self._chunks[(write_item.index.fqn, tuple(write_item.index.offset))]
        tensor = chunk.make()
        assert tuple(tensor.shape) == chunk.sizes and tensor.dtype == chunk.dtype
        return tensor


def write_distributed(folder: Path, chunks: Sequence[LazyChunk]) -> None:
    """Write chunks to a new distributed checkpoint, each made, written and dropped in turn."""
    dcp.save(
        {},
        storage_writer=FileSystemWriter(folder, single_file_per_rank=True, thread_count=1),
        planner=_LazySavePlanner(chunks),
    )
    torch.save({}, folder / "common.pt")
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


class _SlicePlanner(LoadPlanner):
    def __init__(self, key: str, offsets: Sequence[int], into: Tensor) -> None:
        self._key, self._offsets, self._into = key, offsets, into

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        self._metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        assert self._metadata is not None
        stored = self._metadata.state_dict_metadata[self._key]
        chunk = ChunkStorageMetadata(torch.Size(self._offsets), self._into.size())
        return LoadPlan(create_read_items_for_chunk_list(self._key, stored, [chunk]))  # type: ignore[arg-type]

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise CheckpointError(f"{self._key} is not a tensor")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        part = self._into
        for dimension, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(dimension, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


class DistributedReader:
    """Reads slices of a distributed checkpoint.

    Raises:
        CheckpointError: the folder holds none, or it cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = FileSystemReader(folder)
        try:
            self._metadata = self._reader.read_metadata()
        except Exception as error:
            raise CheckpointError(
                f"{folder}: its .metadata cannot be read ({error}); convert or save it again"
            ) from None
        self._reader.set_up_storage_reader(self._metadata, True)
        self._tensors = {
            key: value
            for key, value in self._metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a stored tensor.

        Raises:
            CheckpointError: there is none of that key.
        """
        if key not in self._tensors:
            raise CheckpointError(f"{self.folder}: has no tensor {key}; is it a checkpoint of this model?")
        return tuple(self._tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        self.shape(key)
        return self._tensors[key].properties.dtype

    def read(self, key: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """The slice of ``sizes`` at ``offsets``, as stored."""
        into = torch.empty(*sizes, dtype=self.dtype(key))
        planner = _SlicePlanner(key, offsets, into)
        planner.set_up_planner({}, self._metadata, True)
        try:
            self._reader.read_data(planner.create_local_plan(), planner).wait()
        except Exception as error:
            raise CheckpointError(f"{self.folder}: {key} cannot be read ({error}); the checkpoint is damaged") from None
        return into


# --------------------------------------------------------------------------------------------------
# safetensors
# --------------------------------------------------------------------------------------------------

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` of torch.float32."""
    return str(dtype).removeprefix("torch.")


class SafetensorsFolder:
    """Tensors of a Hugging Face model folder: one model.safetensors, or shards with an index.

    Raises:
        CheckpointError: no safetensors there, or a shard that the index names is missing or truncated.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                files = sorted(set(weight_map.values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{index}: cannot be read ({error}); download the model again") from None
        elif (folder / "model.safetensors").is_file():
            files = ["model.safetensors"]
        else:
            raise CheckpointError(
                f"{folder}: holds no model.safetensors and no model.safetensors.index.json; save the model with "
                "safe_serialization"
            )
        self._file_of: dict[str, Path] = {}
        for name in files:
            path = folder / str(name)
            with self._open(path) as tensors:
                for key in tensors.keys():  # noqa: SIM118
                    self._file_of[key] = path

    def _open(self, path: Path) -> Any:
        try:
            return safe_open(str(path), framework="pt", device="cpu")
        except FileNotFoundError:
            raise CheckpointError(f"{path}: is named by the index and not there; download the model again") from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: cannot be read ({error}); it is truncated or damaged, download it again"
            ) from None

    def names(self) -> set[str]:
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        with self._open(self._file_of[name]) as tensors:
            return tuple(tensors.get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """One tensor, read from its shard now."""
        with self._open(self._file_of[name]) as tensors:
            return tensors.get_tensor(name)


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of a safetensors file to be written: its description in advance, its values when their turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        size = self.dtype.itemsize
        for n in self.shape:
            size *= n
        return size


def plan_shards(tensors: Sequence[LazyTensor], max_shard_bytes: int) -> list[list[LazyTensor]]:
    """Consecutive tensors a shard, none over the limit unless a single tensor is."""
    shards: list[list[LazyTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.bytes
    return shards


def write_safetensors(
    folder: Path, tensors: Sequence[LazyTensor], values: Iterator[Tensor], max_shard_bytes: int
) -> None:
    """Write model.safetensors, or shards with an index, taking the values one by one in the order described.

    The format (safetensors' README): header length as 64 bits little-endian, JSON header, raw values.
    """
    shards = plan_shards(tensors, max_shard_bytes)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for tensor in shard:
            header[tensor.name] = {
                "dtype": _DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset + tensor.bytes],
            }
            offset += tensor.bytes
            weight_map[tensor.name] = name
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / name, "wb") as stream:
            stream.write(struct.pack("<Q", len(text)))
            stream.write(text)
            for tensor in shard:
                value = next(values).to(tensor.dtype).contiguous()
                assert tuple(value.shape) == tensor.shape
                stream.write(value.reshape(-1).view(torch.uint8).numpy().data)
            stream.flush()
            os.fsync(stream.fileno())
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(t.bytes for t in tensors)}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
