"""Hugging Face model folders, read and written one tensor at a time."""

from __future__ import annotations

import json
import math
import os
import pickle
import struct
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_longpo.checkpoint.prefetch import flushing
from megatron_longpo.errors import CheckpointError, one_line
from megatron_longpo.model.families import check_numbers
from megatron_longpo.model.shape import largest_size
from megatron_longpo.runtime.reading import TooLarge, read_json

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    # Not offered to cast to, but kept where a model has it.
    "float64": torch.float64,
}
_SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
_SAFETENSORS_DTYPES = {name: dtype for dtype, name in _SAFETENSORS_NAMES.items()}
# Elements that are checked, cast, compared or written at a time, so that no second copy of a tensor is held.
BLOCK_ELEMENTS = 2**24
# Largest config.json, and largest index of shards; that of the largest model so far (671 billion weights) has 9 MB.
MAX_CONFIG_BYTES = 2**24
MAX_INDEX_BYTES = 2**28
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf")
# Four-bit weights are two a byte; twice that, because layers may share theirs.
_MAX_WEIGHTS_PER_BYTE = 4
# The header of a safetensors file is padded to a multiple of this.
_HEADER_ALIGNMENT = 8


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def blocks_of(tensor: Tensor) -> Sequence[Tensor]:
    """The elements of a tensor, ``BLOCK_ELEMENTS`` at a time."""
    return tensor.contiguous().view(-1).split(BLOCK_ELEMENTS)


def is_finite(tensor: Tensor) -> bool:
    """Whether a non-empty tensor contains neither NaN nor infinities."""
    # NaN propagates through the extremes, and an infinity is one.
    return all(bool(torch.isfinite(torch.stack(torch.aminmax(block))).all()) for block in blocks_of(tensor))


def read_hf_config(folder: Path) -> dict[str, Any]:
    """Read config.json of a model folder.

    Raises:
        CheckpointError: the file is missing or is not a JSON object.
    """
    path = folder / "config.json"
    try:
        config = read_json(path, largest_size(MAX_CONFIG_BYTES))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no such file; use a complete Hugging Face model folder, as save_pretrained writes it"
        ) from None
    except TooLarge as error:
        raise CheckpointError(f"{path}: {error}; download it again, or raise model_size_factor") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({one_line(error)}); download it again") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: is not a JSON object, so it is not a model's configuration; download it again")
    return config


def weight_bytes(folder: Path) -> int:
    """Bytes of a folder's weight files."""
    return sum(
        file.stat().st_size for file in folder.iterdir() if file.name.endswith(_WEIGHT_SUFFIXES) and file.is_file()
    )


def check_model_folder(folder: Path) -> None:
    """Check that transformers may build the model of a folder: its configuration is within the limits, and its files have as many
    weights.

    transformers makes the weights that a file lacks, so a configuration of a few bytes could ask for any amount of memory.

    Raises:
        CheckpointError: config.json is missing or damaged, has a number beyond its limit, or describes far more weights than
            there are.
    """
    path, config = folder / "config.json", read_hf_config(folder)
    nested = [part for part in config.values() if isinstance(part, dict) and "hidden_size" in part]
    stored = weight_bytes(folder)
    for part in (config, *nested):
        check_numbers(part, str(path))
        layers, hidden, width, vocabulary = (
            part[key] if type(part.get(key)) is int else 0
            for key in ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
        )
        # At least: gate or up and down projections, and embeddings.
        weights = hidden * (2 * layers * width + vocabulary)
        if weights > largest_size(_MAX_WEIGHTS_PER_BYTE * stored) and stored:
            raise CheckpointError(
                f"{path}: describes at least {weights:,} weights, but its folder's weights have {stored:,} bytes; "
                "download the model again, or raise model_size_factor"
            )


@dataclass(frozen=True)
class _TensorInfo:
    """Where a tensor is stored, and what it is. A dtype that cannot be converted stays a name."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | str


class HuggingFaceWeights:
    """Weights of a Hugging Face model folder: safetensors, or pickles if there are none; one file or shards.

    Pickles are opened with torch's weights_only loader, which does not run code from the file.

    Args:
        folder: model folder.

    Raises:
        CheckpointError: the folder has no weights; a shard named by the index is missing, truncated or not a file of weights; a
            tensor is not in the shard that the index names; there is a single file beside the index of others.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pickle: tuple[Path, dict[str, Tensor]] | None = None
        # The prefetching thread may read at the same time.
        self._lock = threading.Lock()
        for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
            index, single = folder / f"{stem}{suffix}.index.json", folder / f"{stem}{suffix}"
            if index.is_file() or single.is_file():
                break
        else:
            raise CheckpointError(
                f"{folder}: contains none of model.safetensors, model.safetensors.index.json, pytorch_model.bin and "
                "pytorch_model.bin.index.json; give a folder written by save_pretrained"
            )
        self._is_pickle = suffix == ".bin"
        self._tensors = self._find_indexed(index) if index.is_file() else self._describe(single)
        if index.is_file() and single.is_file() and {info.file for info in self._tensors.values()} != {single}:
            # transformers reads the single file, vLLM the shards.
            raise CheckpointError(
                f"{folder}: contains {single.name} beside {index.name}, which names other files; remove the weights that are not "
                "the model's"
            )

    def _find_indexed(self, index: Path) -> dict[str, _TensorInfo]:
        try:
            weight_map = dict(read_json(index, largest_size(MAX_INDEX_BYTES))["weight_map"])
            files = sorted(set(weight_map.values()))
        except TooLarge as error:
            raise CheckpointError(f"{index}: {error}; download the model again, or raise model_size_factor") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: cannot be read ({one_line(error)}); download the model again") from None
        found = {}
        for file in files:
            if not isinstance(file, str) or file in ("", ".", "..") or os.path.basename(file) != file or "\0" in file:
                raise CheckpointError(
                    f"{index}: names {one_line(repr(file), 100)}, which is not the name of a file in its folder; download the "
                    "model again"
                )
            for name, info in self._describe(self.folder / file).items():
                if weight_map.get(name, file) == file:
                    found[name] = info
        for name, file in weight_map.items():
            if name not in found:
                raise CheckpointError(
                    f"{self.folder / file}: does not contain {name}, although {index.name} says so; download it again"
                )
        return found

    def _describe(self, path: Path) -> dict[str, _TensorInfo]:
        if self._is_pickle:
            return {k: _TensorInfo(path, tuple(v.shape), v.dtype) for k, v in self._unpickle(path).items()}
        found = {}
        with self._open(path) as tensors:
            for name in tensors.keys():  # noqa: SIM118
                part = tensors.get_slice(name)
                stored = part.get_dtype()
                found[name] = _TensorInfo(path, tuple(part.get_shape()), _SAFETENSORS_DTYPES.get(stored, stored))
        return found

    def _open(self, path: Path) -> Any:
        try:
            return safe_open(str(path), framework="pt", device="cpu")
        except FileNotFoundError:
            raise _missing_shard(path) from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: cannot be read ({error}), so it is truncated or damaged; download it again"
            ) from None

    def _unpickle(self, path: Path) -> dict[str, Tensor]:
        """Map all tensors of a pickle into memory without reading them; the last file stays open."""
        if self._pickle is None or self._pickle[0] != path:
            self._pickle = None
            try:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except FileNotFoundError:
                raise _missing_shard(path) from None
            except pickle.UnpicklingError as error:
                raise CheckpointError(
                    f"{path}: contains more than weights, so it is not loaded ({one_line(error)}); save the model with "
                    "safe_serialization"
                ) from None
            except MemoryError:
                raise
            except Exception as error:  # torch looks up whatever a damaged pickle asks for
                raise CheckpointError(
                    f"{path}: cannot be read ({one_line(error)}), so it is truncated or damaged, or was saved by torch "
                    "before 1.6; download it again, or save it again with safe_serialization"
                ) from None
            if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
                raise CheckpointError(f"{path}: is not a state dict of tensors; save the model with save_pretrained")
            for name, tensor in content.items():
                # A tensor of a few bytes could otherwise claim any size.
                if (
                    tensor.layout != torch.strided
                    or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.itemsize
                ):
                    raise CheckpointError(
                        f"{path}: {name} is not stored element by element; save the model with save_pretrained"
                    )
            self._pickle = (path, content)
        return self._pickle[1]

    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a weight.

        Raises:
            CheckpointError: the weight is quantised, or is not a floating-point number.
        """
        info = self._tensors[name]
        if not isinstance(info.dtype, torch.dtype) or info.dtype not in _SAFETENSORS_NAMES:
            raise CheckpointError(
                f"{info.file}: {name} has dtype {info.dtype}, but only {', '.join(map(dtype_name, _SAFETENSORS_NAMES))} can be "
                "converted; use the model from before quantisation"
            )
        return info.dtype

    def read(self, name: str) -> Tensor:
        """Read one tensor from its file; nothing is cached."""
        path = self._tensors[name].file
        with self._lock:
            if self._is_pickle:
                return self._unpickle(path)[name].clone()
            with self._open(path) as tensors:
                return tensors.get_tensor(name)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read a range of rows (of the first dimension) of a tensor from its file."""
        path = self._tensors[name].file
        with self._lock:
            if self._is_pickle:
                return self._unpickle(path)[name][start:stop].clone()
            with self._open(path) as tensors:
                rows: Tensor = tensors.get_slice(name)[start:stop]
                return rows


def _missing_shard(path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: is named by the index but missing; download the model again")


@dataclass(frozen=True)
class LazyTensor:
    """A tensor to be written to a safetensors file: described in advance; its values are made when they are written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


AnyLazyTensor = TypeVar("AnyLazyTensor", bound=LazyTensor)


def plan_shards(tensors: Sequence[AnyLazyTensor], max_shard_bytes: int) -> list[list[AnyLazyTensor]]:
    """Divide tensors into shards, in order. A shard exceeds the limit only if it is a single tensor that does."""
    shards: list[list[AnyLazyTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.bytes
    return shards


def shard_name(number: int, count: int) -> str:
    """``model-00002-of-00007.safetensors`` for shard 1 of 7, counted from 0."""
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path, shards: Sequence[Sequence[LazyTensor]]) -> None:
    """Write model.safetensors.index.json if there are several shards."""
    if len(shards) == 1:
        return
    weight_map = {t.name: shard_name(i, len(shards)) for i, shard in enumerate(shards) for t in shard}
    index = {"metadata": {"total_size": sum(t.bytes for shard in shards for t in shard)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_shard(path: Path, tensors: Sequence[LazyTensor], values: Iterator[Tensor]) -> None:
    """Write a safetensors file, cast to the dtypes described.

    The format (safetensors' README): header length as 64 bits little-endian, JSON header, raw values.

    Args:
        path: new file.
        tensors: what the file contains, in order.
        values: their values, taken one at a time in the same order.

    Raises:
        CheckpointError: a value becomes infinite in its new dtype.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": _SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.bytes],
        }
        offset += tensor.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    with open(path, "wb", buffering=0) as stream, flushing(path):
        _write_all(stream, struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            value = next(values)
            assert tuple(value.shape) == tensor.shape
            for block in blocks_of(value):
                cast = block.to(tensor.dtype)
                if cast.dtype != block.dtype and not is_finite(cast):
                    raise CheckpointError(
                        f"{tensor.name}: values do not fit {dtype_name(tensor.dtype)}; use --dtype bfloat16 or float32"
                    )
                _write_all(stream, cast.view(torch.uint8).numpy().data)
            # Drop the references before the next value is made.
            del value, block, cast
        os.fsync(stream.fileno())


def _write_all(stream: Any, content: Any) -> None:
    view = memoryview(content)
    while len(view):
        view = view[stream.write(view) :]
