"""Distributed checkpoints, written and read one tensor at a time, so that a conversion never holds a whole model.

The format is torch.distributed.checkpoint's, which megatron-core's torch_dist reads. Writing takes a planner that names every
chunk in advance and makes each one as it is written; reading takes any slice. With a process group, each process writes its own
chunks.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from megatron_longpo.checkpoint.checksums import hash_own_files
from megatron_longpo.checkpoint.prefetch import Prefetcher, flushing
from megatron_longpo.errors import CheckpointError, DamagedError, one_line
from megatron_longpo.runtime.collectives import rank

# More elements than any tensor has, and more bytes than any file.
_MOST_ELEMENTS = 2**62


@dataclass(frozen=True)
class LazyChunk:
    """A part of a stored tensor that is made when it is written.

    Attributes:
        key: key of the stored tensor.
        global_shape: shape of the whole stored tensor.
        offsets, sizes: position and shape of this part.
        dtype: dtype of the tensor.
        make: function that makes the part, of shape ``sizes``.
    """

    key: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return math.prod(self.sizes) * self.dtype.itemsize


class _LazySavePlanner(SavePlanner):
    """Names all chunks in advance. Their values come in the same order, because the writer is set up to keep it.

    Args:
        chunks: chunks of this process.
        values: their values, in order.
    """

    def __init__(self, chunks: Sequence[LazyChunk], values: Iterator[Tensor]) -> None:
        self._chunks, self._values = chunks, values
        self._expected = iter(chunks)
        self._written: Tensor | None = None

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
                for c in self._chunks
            ]
        )

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        chunk = next(self._expected)
        assert write_item.index.fqn == chunk.key, "chunks are written in the order of the plan"
        assert write_item.index.offset == torch.Size(chunk.offsets)
        self._release()
        tensor = next(self._values)
        assert tuple(tensor.shape) == chunk.sizes and tensor.dtype == chunk.dtype
        self._written = tensor
        return tensor

    def _release(self) -> None:
        """Give up the memory of the tensor that was written last: torch (2.13) keeps one per key until the file is complete."""
        if self._written is not None:
            storage = self._written.untyped_storage()
            # Of a larger storage the writer makes a copy, and others may look at the rest of it.
            if storage.nbytes() == self._written.nbytes and storage.resizable():
                storage.resize_(0)
            self._written = None


def write_distributed(folder: Path, chunks: Sequence[LazyChunk]) -> None:
    """Write this process's chunks to a new distributed checkpoint, each made, written and dropped in turn; collective.

    Raises:
        CheckpointException: torch.distributed.checkpoint's, with what any process raised.
    """
    # No copying ahead: on CUDA the writer would sort the chunks for it.
    writer = FileSystemWriter(folder, single_file_per_rank=True, thread_count=1, per_thread_copy_ahead=0)
    with Prefetcher([(c.bytes, c.make) for c in chunks]) as values, flushing(folder / f"__{rank()}_0.distcp"):
        dcp.save({}, storage_writer=writer, planner=_LazySavePlanner(chunks, values))
    hash_own_files(folder, rank())
    if rank() == 0:
        torch.save({}, folder / "common.pt")
        save_config(CheckpointingConfig("torch_dist", 1), str(folder))


class _FileSlice(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, stream: io.FileIO, start: int, length: int) -> None:
        self._stream, self._start, self._length, self._offset = stream, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._offset, os.SEEK_END: self._length}[whence]
        self._offset = base + offset
        return self._offset

    def tell(self) -> int:
        return self._offset

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        wanted = min(len(view), max(0, self._length - self._offset))
        self._stream.seek(self._start + self._offset)
        count = self._stream.readinto(view[:wanted])
        self._offset += count
        return count


class DistributedReader:
    """Reads slices of a distributed checkpoint.

    Args:
        folder: folder of the checkpoint.

    Raises:
        CheckpointError: the folder is not a distributed checkpoint, or its metadata cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = FileSystemReader(folder)
        try:
            self._metadata = self._reader.read_metadata()
            _check_index(self._metadata)
        except Exception as error:
            raise DamagedError(
                f"{folder}: .metadata cannot be read ({one_line(error)}); convert or save the checkpoint again"
            ) from None
        self._reader.set_up_storage_reader(self._metadata, True)
        self._tensors = {
            key: value
            for key, value in self._metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }

    def missing_files(self) -> list[str]:
        """Names of the files that the metadata name and that are not in the folder."""
        # Read as a listing is: what it shows is what gets a checksum.
        present = set(os.listdir(self.folder))
        return sorted({info.relative_path for info in self._reader.storage_data.values()} - present)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a stored tensor.

        Raises:
            CheckpointError: the checkpoint has no tensor with this key.
        """
        if key not in self._tensors:
            raise CheckpointError(f"{self.folder}: has no tensor {key}; is it a checkpoint of this model?")
        return tuple(self._tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        self.shape(key)
        return self._tensors[key].properties.dtype

    def read(self, key: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """Read the slice of shape ``sizes`` at ``offsets``, as stored. A slice within one stored chunk is not copied.

        Raises:
            CheckpointError: the tensor is missing or incomplete, or its file is damaged.
        """
        self.shape(key)
        ends_of_slice = [a + n for a, n in zip(offsets, sizes, strict=True)]
        # (chunk, starts and ends of its intersection with the slice)
        found: list[tuple[ChunkStorageMetadata, list[int], list[int]]] = []
        for chunk in self._tensors[key].chunks:
            starts = [max(a, b) for a, b in zip(offsets, chunk.offsets, strict=True)]
            ends = [min(a + n, b + m) for a, n, b, m in zip(offsets, sizes, chunk.offsets, chunk.sizes, strict=True)]
            if all(end > start for start, end in zip(starts, ends, strict=True)):
                found.append((chunk, starts, ends))
        # Known before memory is taken: a damaged index may claim any size.
        covered = sum(math.prod(b - a for a, b in zip(starts, ends, strict=True)) for _, starts, ends in found)
        is_whole = any(starts == list(offsets) and ends == ends_of_slice for _, starts, ends in found)
        if not is_whole and (not found or covered != math.prod(sizes)):
            raise DamagedError(
                f"{self.folder}: {key} is incomplete, so the checkpoint is damaged; use another, or convert the model again"
            )
        result: Tensor | None = None
        for chunk, starts, ends in found:
            part = _narrow(self._read_chunk(key, chunk), starts, ends, base=chunk.offsets)
            if tuple(part.shape) == tuple(sizes):
                return part
            if result is None:
                result = torch.empty(*sizes, dtype=self.dtype(key))
            _narrow(result, starts, ends, base=offsets).copy_(part)
        assert result is not None
        return result

    def _read_chunk(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        try:
            stored = self._metadata.storage_data[MetadataIndex(key, chunk.offsets)]
            # Unbuffered, because torch reads whole tensors.
            with open(self.folder / stored.relative_path, "rb", buffering=0) as stream:
                part = cast(BinaryIO, _FileSlice(stream, stored.offset, stored.length))
                tensor: Tensor = torch.load(part, map_location="cpu", weights_only=True)
            if tensor.shape != chunk.sizes:
                raise ValueError(f"{list(tensor.shape)} instead of {list(chunk.sizes)}")
            if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.itemsize:
                raise ValueError("it repeats its elements, as no stored tensor does")
            return tensor
        except Exception as error:
            raise DamagedError(
                f"{self.folder}: {key} cannot be read ({one_line(error)}), so the checkpoint is damaged; use another, or "
                "convert the model again"
            ) from None


def _check_index(index: Metadata) -> None:
    """Check that an index holds what torch.distributed.checkpoint writes, so that what is read by it needs no checks of its own.

    Raises:
        ValueError: it does not.
    """

    def is_size(value: Any, dimensions: int | None = None) -> bool:
        return (
            isinstance(value, torch.Size)
            and all(type(n) is int and 0 <= n < _MOST_ELEMENTS for n in value)
            and dimensions in (None, len(value))
        )

    for part in (index.state_dict_metadata, index.storage_data):
        if not isinstance(part, dict):
            raise ValueError("it has no table of tensors or places")
    for key, entry in index.state_dict_metadata.items():
        if not isinstance(key, str) or not isinstance(entry, TensorStorageMetadata | BytesStorageMetadata):
            raise ValueError(f"{key!r:.100} is no entry")
        if isinstance(entry, BytesStorageMetadata):
            continue
        size, properties = entry.size, entry.properties
        if not is_size(size) or math.prod(size) >= _MOST_ELEMENTS or not isinstance(entry.chunks, list):
            raise ValueError(f"the shape of {key:.100} is {size!r:.100}")
        if not isinstance(properties, TensorProperties) or not isinstance(properties.dtype, torch.dtype):
            raise ValueError(f"{key:.100} has no dtype")
        for chunk in entry.chunks:
            if not isinstance(chunk, ChunkStorageMetadata) or not all(
                is_size(part, len(size)) for part in (chunk.offsets, chunk.sizes)
            ):
                raise ValueError(f"a part of {key:.100} has no place or no shape")
            if any(start + n > m for start, n, m in zip(chunk.offsets, chunk.sizes, size, strict=True)):
                raise ValueError(f"a part of {key:.100} is outside of it")
    for place, stored in index.storage_data.items():
        name = getattr(stored, "relative_path", None)
        numbers = (getattr(stored, "offset", None), getattr(stored, "length", None))
        if (
            not isinstance(place, MetadataIndex)
            or not isinstance(name, str)
            or name in ("", ".", "..")
            or os.path.basename(name) != name
            or not all(type(n) is int and 0 <= n < _MOST_ELEMENTS for n in numbers)
        ):
            raise ValueError(f"{one_line(repr(stored), 200)} is not a place in a file of the folder")


def _narrow(tensor: Tensor, starts: Sequence[int], ends: Sequence[int], *, base: Sequence[int]) -> Tensor:
    """View of a range of a tensor whose first element has the index ``base``."""
    for dimension, (start, end, first) in enumerate(zip(starts, ends, base, strict=True)):
        tensor = tensor.narrow(dimension, start - first, end - start)
    return tensor
