"""Tensors into and out of checkpoints one at a time, so that a conversion never holds a model.

The distributed checkpoint is torch.distributed.checkpoint's format, which megatron-core's torch_dist reads: a planner
that names every chunk in advance and makes each as it is written, and a reader of any slice. Several processes share
the work where there is a process group: each writes its own chunks, or its own safetensors shards.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
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
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from megatron_longpo.errors import CheckpointError, one_line


def _bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


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

    @property
    def bytes(self) -> int:
        return _bytes(self.sizes, self.dtype)


# How much may be made before it is written, beyond the largest chunk.
_AHEAD_BYTES = 2**26
_FLUSH_SECONDS = 0.1


class Prefetcher:
    """Makes values in a thread, in order, while those before are being used: reading and writing overlap.

    Values that are made and not yet given take, with the one given last, at most the largest one's bytes and ``ahead`` bytes;
    a consumer that keeps a value while it asks for the next has it besides.

    Args:
        items: bytes of each value, and what makes it.
        ahead: how much is made beyond the value that is being used.
    """

    def __init__(self, items: Sequence[tuple[int, Callable[[], Tensor]]], ahead: int = _AHEAD_BYTES) -> None:
        self._items = items
        self._limit = max((n for n, _ in items), default=0) + ahead
        self._ready: dict[int, Tensor | BaseException] = {}
        self._held = 0
        self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        for number, (size, make) in enumerate(self._items):
            with self._changed:
                self._changed.wait_for(lambda size=size: self._stopped or self._held + size <= self._limit)  # type: ignore[misc]
                if self._stopped:
                    return
                self._held += size
            try:
                value: Tensor | BaseException = make()
            except BaseException as error:
                value = error
            with self._changed:
                self._ready[number] = value
                self._changed.notify_all()
            if isinstance(value, BaseException):
                return
            del value

    def __iter__(self) -> Iterator[Tensor]:
        """The values in order; a value counts as dropped when the next one is asked for.

        Raises:
            BaseException: what making a value raised.
        """
        try:
            for number, (size, _) in enumerate(self._items):
                with self._changed:
                    self._changed.wait_for(lambda number=number: number in self._ready)  # type: ignore[misc]
                    value = self._ready.pop(number)
                if isinstance(value, BaseException):
                    raise value
                yield value
                del value
                with self._changed:
                    self._held -= size
                    self._changed.notify_all()
        finally:
            with self._changed:
                self._stopped = True
                self._changed.notify_all()
            self._thread.join()


@contextmanager
def _flushing(path: Path) -> Iterator[None]:
    """Bring a file to the disk while it is being written, so that the wait at its end is short.

    The system would gather gigabytes in memory first, and write them when the last ``fsync`` asks for it.
    """
    done = threading.Event()

    def flush() -> None:
        while not done.wait(_FLUSH_SECONDS):
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except OSError:
                continue
            try:
                os.fdatasync(descriptor)
            except OSError:
                return  # whoever writes the file hears of it too
            finally:
                os.close(descriptor)

    thread = threading.Thread(target=flush, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class _LazySavePlanner(SavePlanner):
    """Names all chunks in advance; their values come in the same order, since the writer is told to take no other."""

    def __init__(self, chunks: Sequence[LazyChunk]) -> None:
        self._chunks = {(c.key, c.offsets): c for c in chunks}
        self._order = list(self._chunks)
        self._values: Iterator[Tensor] | None = None

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
        if self._values is None:
            self._values = iter(Prefetcher([(c.bytes, c.make) for c in self._chunks.values()]))
        key = (write_item.index.fqn, tuple(write_item.index.offset))
        assert self._order.pop(0) == key, "chunks are written in the order of the plan"
        tensor = next(self._values)
        chunk = self._chunks[key]
        assert tuple(tensor.shape) == chunk.sizes and tensor.dtype == chunk.dtype
        if not self._order:
            self.close()
        return tensor

    def close(self) -> None:
        """End the thread, if it still runs."""
        if self._values is not None:
            self._values.close()  # type: ignore[attr-defined]
            self._values = None


def write_distributed(folder: Path, chunks: Sequence[LazyChunk]) -> None:
    """Write this process's chunks to a new distributed checkpoint, each made, written and dropped in turn; collective.

    Raises:
        CheckpointException: of torch.distributed.checkpoint, with what any process raised.
    """
    planner = _LazySavePlanner(chunks)
    try:
        # Nothing copied ahead: on CUDA that would sort the chunks.
        writer = FileSystemWriter(folder, single_file_per_rank=True, thread_count=1, per_thread_copy_ahead=0)
        rank = dist.get_rank() if dist.is_initialized() else 0
        with _flushing(folder / f"__{rank}_0.distcp"):
            dcp.save({}, storage_writer=writer, planner=planner)
    finally:
        planner.close()
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save({}, folder / "common.pt")
        save_config(CheckpointingConfig("torch_dist", 1), str(folder))


class _FileSlice(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, stream: BinaryIO, start: int, length: int) -> None:
        self._stream, self._start, self._length, self._place = stream, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._length}[whence]
        self._place = base + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        wanted = min(len(view), max(0, self._length - self._place))
        self._stream.seek(self._start + self._place)
        count = self._stream.readinto(view[:wanted])  # type: ignore[attr-defined]
        self._place += count
        return int(count)


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
        """The slice of ``sizes`` at ``offsets``, as stored. A slice that was written as one piece is not copied.

        Raises:
            CheckpointError: there is none, or its file is damaged.
        """
        self.shape(key)
        into: Tensor | None = None
        covered = 0
        for chunk in self._tensors[key].chunks:
            # Where this stored piece and the slice meet.
            starts = [max(a, b) for a, b in zip(offsets, chunk.offsets, strict=True)]
            ends = [min(a + n, b + m) for a, n, b, m in zip(offsets, sizes, chunk.offsets, chunk.sizes, strict=True)]
            if any(end <= start for start, end in zip(starts, ends, strict=True)):
                continue
            piece = self._piece(key, chunk)
            for dimension, (start, end, base) in enumerate(zip(starts, ends, chunk.offsets, strict=True)):
                piece = piece.narrow(dimension, start - base, end - start)
            if tuple(piece.shape) == tuple(sizes):
                return piece
            if into is None:
                into = torch.empty(*sizes, dtype=self.dtype(key))
            target = into
            for dimension, (start, end, base) in enumerate(zip(starts, ends, offsets, strict=True)):
                target = target.narrow(dimension, start - base, end - start)
            target.copy_(piece)
            covered += piece.numel()
        if into is None or covered != into.numel():
            raise CheckpointError(f"{self.folder}: {key} is not all there; the checkpoint is damaged")
        return into

    def _piece(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        try:
            place = self._metadata.storage_data[MetadataIndex(key, chunk.offsets)]
            # Unbuffered: torch reads whole tensors.
            with open(self.folder / place.relative_path, "rb", buffering=0) as stream:
                part = _FileSlice(stream, place.offset, place.length)  # type: ignore[arg-type]
                tensor: Tensor = torch.load(part, map_location="cpu", weights_only=True)  # type: ignore[arg-type]
            if tensor.shape != chunk.sizes:
                raise ValueError(f"{list(tensor.shape)} instead of {list(chunk.sizes)}")
            return tensor
        except Exception as error:
            raise CheckpointError(
                f"{self.folder}: {key} cannot be read ({one_line(error)}); the checkpoint is damaged"
            ) from None


# --------------------------------------------------------------------------------------------------
# Hugging Face folders
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


@dataclass(frozen=True)
class _TensorInfo:
    """Where a tensor lies, and what it is; a dtype that is not converted stays a name."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | str


class HuggingFaceWeights:
    """Tensors of a Hugging Face model folder: safetensors, or pickles where there are none; one file or shards.

    Pickles are opened by torch's weights_only loader, which runs no code of theirs.

    Raises:
        CheckpointError: no weights there; a shard that the index names is missing, truncated or no weights; a tensor in
            a shard other than the index says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pickle: tuple[Path, dict[str, Tensor]] | None = None
        # One at a time: two threads may read.
        self._lock = threading.Lock()
        for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
            index, single = folder / f"{stem}{suffix}.index.json", folder / f"{stem}{suffix}"
            if index.is_file() or single.is_file():
                break
        else:
            raise CheckpointError(
                f"{folder}: holds no model.safetensors, model.safetensors.index.json, pytorch_model.bin or "
                "pytorch_model.bin.index.json; give the folder that save_pretrained wrote"
            )
        self._is_pickle = suffix == ".bin"
        weight_map: dict[str, str] | None = None
        if index.is_file():
            try:
                weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
                files = sorted(set(weight_map.values()))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{index}: cannot be read ({error}); download the model again") from None
        else:
            files = [single.name]
        self._found: dict[str, _TensorInfo] = {}
        for name in files:
            path = folder / str(name)
            for key, described in self._describe(path).items():
                if weight_map is not None and weight_map.get(key, name) != name:
                    continue
                self._found[key] = described
        for key, name in (weight_map or {}).items():
            if key not in self._found:
                raise CheckpointError(
                    f"{folder / name}: lacks {key}, which {index.name} says is there; download it again"
                )

    def _describe(self, path: Path) -> dict[str, _TensorInfo]:
        if self._is_pickle:
            return {k: _TensorInfo(path, tuple(v.shape), v.dtype) for k, v in self._unpickle(path).items()}
        found = {}
        with self._open(path) as tensors:
            for key in tensors.keys():  # noqa: SIM118
                part = tensors.get_slice(key)
                name = part.get_dtype()
                found[key] = _TensorInfo(path, tuple(part.get_shape()), _DTYPES_BY_NAME.get(name, name))
        return found

    def _open(self, path: Path) -> Any:
        try:
            return safe_open(str(path), framework="pt", device="cpu")
        except FileNotFoundError:
            raise CheckpointError(f"{path}: is named by the index and not there; download the model again") from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: cannot be read ({error}); it is truncated or damaged, download it again"
            ) from None

    def _unpickle(self, path: Path) -> dict[str, Tensor]:
        """All tensors of a pickle, mapped rather than read; the last file stays open."""
        if self._pickle is None or self._pickle[0] != path:
            self._pickle = None
            try:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except FileNotFoundError:
                raise CheckpointError(
                    f"{path}: is named by the index and not there; download the model again"
                ) from None
            except pickle.UnpicklingError as error:
                raise CheckpointError(
                    f"{path}: holds more than weights, and is not opened ({one_line(error)}); save the model "
                    "with safe_serialization"
                ) from None
            except (RuntimeError, OSError, ValueError, EOFError) as error:
                raise CheckpointError(
                    f"{path}: cannot be read ({one_line(error)}); it is truncated or damaged, or of a torch before 1.6: "
                    "download it again, or save it again with safe_serialization"
                ) from None
            if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
                raise CheckpointError(f"{path}: is not a state dict of tensors; save the model with save_pretrained")
            self._pickle = (path, content)
        return self._pickle[1]

    def names(self) -> set[str]:
        return set(self._found)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._found[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a weight.

        Raises:
            CheckpointError: quantised, or no floating-point number at all.
        """
        found = self._found[name]
        if not isinstance(found.dtype, torch.dtype) or found.dtype not in _DTYPE_NAMES:
            raise CheckpointError(
                f"{found.file}: {name} has dtype {found.dtype}; {', '.join(map(dtype_name, _DTYPE_NAMES))} can be converted: "
                "give the model as it was before quantisation"
            )
        return found.dtype

    def read(self, name: str) -> Tensor:
        """One tensor, read from its file now; what was read before is let go."""
        path = self._found[name].file
        with self._lock:
            if self._is_pickle:
                return self._unpickle(path)[name].clone()
            with self._open(path) as tensors:
                return tensors.get_tensor(name)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows (of the first dimension) of a tensor, read from its file now."""
        path = self._found[name].file
        with self._lock:
            if self._is_pickle:
                return self._unpickle(path)[name][start:stop].clone()
            with self._open(path) as tensors:
                found: Tensor = tensors.get_slice(name)[start:stop]
                return found


_DTYPES_BY_NAME = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of a safetensors file to be written: its description in advance, its values when their turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return _bytes(self.shape, self.dtype)


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


def shard_name(number: int, count: int) -> str:
    """``model-00002-of-00007.safetensors`` of shard 1 of 7."""
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path, shards: Sequence[Sequence[LazyTensor]]) -> None:
    """model.safetensors.index.json, where there are several shards."""
    if len(shards) == 1:
        return
    weight_map = {t.name: shard_name(i, len(shards)) for i, shard in enumerate(shards) for t in shard}
    index = {"metadata": {"total_size": sum(t.bytes for shard in shards for t in shard)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


# Values are cast and written in pieces of this many elements, so that a cast holds no second copy of a tensor.
_PIECE = 2**24


def write_shard(path: Path, tensors: Sequence[LazyTensor], values: Iterator[Tensor]) -> None:
    """Write a safetensors file, taking the values one by one in the order described.

    The format (safetensors' README): header length as 64 bits little-endian, JSON header, raw values.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.bytes],
        }
        offset += tensor.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb", buffering=0) as stream, _flushing(path):
        _write_all(stream, struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            value = next(values)
            assert tuple(value.shape) == tensor.shape
            for piece in value.contiguous().view(-1).split(_PIECE):
                cast = piece.to(tensor.dtype)
                if cast.dtype != piece.dtype and not torch.isfinite(torch.stack(torch.aminmax(cast))).all():
                    raise CheckpointError(
                        f"{tensor.name}: values do not fit {dtype_name(tensor.dtype)}; give --dtype bfloat16 or float32"
                    )
                _write_all(stream, cast.view(torch.uint8).numpy().data)
            # Not kept while the next is made.
            del value, piece, cast
        os.fsync(stream.fileno())


def _write_all(stream: Any, content: Any) -> None:
    view = memoryview(content)
    while len(view):
        view = view[stream.write(view) :]
