"""Hugging Face checkpoints in and out, tensor by tensor, by the tables of ``model/families.py``."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_longpo.checkpoint.stream import (
    DTYPES,
    DistributedReader,
    LazyChunk,
    LazyTensor,
    SafetensorsFolder,
    dtype_name,
    write_distributed,
    write_safetensors,
)
from megatron_longpo.checkpoint.training import ASSETS, resolve
from megatron_longpo.data.vocabulary import folder_vocabulary_hash
from megatron_longpo.errors import CheckpointError
from megatron_longpo.model.families import (
    Entry,
    config_for_export,
    entries_of,
    fuse,
    our_shape,
    shape_from_hf,
    split,
    their_shapes,
)
from megatron_longpo.model.shape import FILE_NAME, ModelShape

Progress = Callable[[int, int], None]
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
# Buffers that old versions of transformers saved; made from the config.
_IGNORED_SUFFIX = "rotary_emb.inv_freq"


@dataclass(frozen=True)
class Conversion:
    """What a conversion did: tensors, bytes and the resulting shape."""

    tensors: int
    bytes: int
    shape: ModelShape


def read_hf_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder.

    Raises:
        CheckpointError: missing or not JSON.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file; --hf is a Hugging Face model folder") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); download it again") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: is not a model's configuration")
    return config


def import_hf(
    hf: str | Path,
    output: str | Path,
    *,
    rotary_base: float | None = None,
    dtype: str | None = None,
    progress: Progress = lambda done, total: None,
) -> Conversion:
    """Convert a Hugging Face model folder into a layout-free distributed checkpoint.

    Args:
        hf: folder with config.json and safetensors.
        output: new folder; appears when it is whole.
        rotary_base: RoPE theta of the checkpoint, instead of the model's.
        dtype: cast to ``float32``, ``float16`` or ``bfloat16``; by default kept.
        progress: called with bytes done and in all.

    Raises:
        CheckpointError: what the model's files lack or have too much, or an output that is there already.
    """
    hf, output = Path(hf), Path(output)
    _refuse_existing(output)
    config = read_hf_config(hf)
    shape = shape_from_hf(config, str(hf / "config.json"))
    source = SafetensorsFolder(hf)
    names = _check_names(source, shape, hf)
    wanted = DTYPES[dtype] if dtype else None
    first = source.read(names[0]).dtype
    digests: dict[str, str] = {}
    total = _bytes_of(shape, wanted or first)
    done = 0

    def make(entry: Entry, layer: int | None) -> Tensor:
        nonlocal done
        tensors = []
        for name in entry.theirs:
            tensor = source.read(name.format(layer=layer))
            if not torch.isfinite(tensor).all():
                raise CheckpointError(f"{hf}: {name.format(layer=layer)} holds NaN or Inf; the model is damaged")
            tensor = tensor if wanted is None else tensor.to(wanted)
            digests[name.format(layer=layer)] = _digest(tensor)
            tensors.append(tensor)
        fused = fuse(entry, tensors, shape)
        done += fused.numel() * fused.element_size()
        progress(done, total)
        return fused if layer is None else fused[None]

    chunks = []
    for entry in entries_of(shape):
        sizes = our_shape(entry, shape)
        stored = wanted or _dtype_of(source, entry)
        for layer in range(shape.num_layers) if entry.stacked else (None,):
            lead = () if layer is None else (shape.num_layers,)
            chunks.append(
                LazyChunk(
                    key=entry.ours,
                    global_shape=(*lead, *sizes),
                    offsets=(*(() if layer is None else (layer,)), *(0 for _ in sizes)),
                    sizes=(*(() if layer is None else (1,)), *sizes),
                    dtype=stored,
                    make=lambda entry=entry, layer=layer: make(entry, layer),  # type: ignore[misc]
                )
            )
    writing = _writing_folder(output)
    with _whole_or_nothing(writing, output):
        write_distributed(writing, chunks)
        digest = hashlib.sha256("".join(f"{n} {d}\n" for n, d in sorted(digests.items())).encode()).hexdigest()
        shape = shape.replace(
            rotary_base=rotary_base or shape.rotary_base,
            dtype=dtype_name(wanted or first),
            tokenizer_hash=folder_vocabulary_hash(hf),
            weights_hash=digest,
        )
        shape.write(writing)
        _copy_assets(hf, writing / ASSETS)
    return Conversion(len(digests), done, shape)


def export_hf(
    checkpoint: str | Path,
    output: str | Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    progress: Progress = lambda done, total: None,
) -> Conversion:
    """Convert a converted or trained checkpoint into a Hugging Face model folder that transformers loads as it is.

    Args:
        checkpoint: a converted checkpoint, one iteration of a run, or a run's folder (its newest iteration).
        output: new folder; appears when it is whole.
        dtype: of the weights; by default that of the model which was imported.
        max_shard_bytes: of a safetensors file.
        progress: called with bytes done and in all.

    Raises:
        CheckpointError: the checkpoint lacks a tensor, a weight is not finite, or the output is there already.
    """
    folder, output = resolve(checkpoint), Path(output)
    _refuse_existing(output)
    shape = ModelShape.read(folder)
    assets = folder / ASSETS
    config = read_hf_config(assets)
    reader = DistributedReader(folder)
    wanted = DTYPES[dtype or shape.dtype]
    described = []
    for entry, layer in _steps(shape):
        _check_stored(reader, entry, shape, folder)
        for name, sizes in zip(entry.theirs, their_shapes(entry, shape), strict=True):
            described.append(LazyTensor(name.format(layer=layer), sizes, wanted))
    total = sum(t.bytes for t in described)
    done = 0

    def values() -> Iterator[Tensor]:
        nonlocal done
        for entry, layer in _steps(shape):
            sizes = our_shape(entry, shape)
            if layer is None:
                ours = reader.read(entry.ours, [0] * len(sizes), sizes)
            else:
                ours = reader.read(entry.ours, [layer, *(0 for _ in sizes)], (1, *sizes))[0]
            if not torch.isfinite(ours).all():
                raise CheckpointError(f"{folder}: {entry.ours} (layer {layer}) holds NaN or Inf; nothing was exported")
            for tensor in split(entry, ours, shape):
                yield tensor
                done += tensor.numel() * wanted.itemsize
                progress(done, total)

    writing = _writing_folder(output)
    with _whole_or_nothing(writing, output):
        write_safetensors(writing, described, values(), max_shard_bytes)
        _copy_assets(assets, writing)
        exported = config_for_export(config, shape, dtype_name(wanted))
        (writing / "config.json").write_text(json.dumps(exported, indent=2) + "\n", encoding="utf-8")
        _raise_model_max_length(writing / "tokenizer_config.json", shape.max_position_embeddings)
    return Conversion(len(described), total, shape)


def _steps(shape: ModelShape) -> Iterator[tuple[Entry, int | None]]:
    """Entries layer by layer, so that shards hold whole layers."""
    entries = entries_of(shape)
    yield from ((e, None) for e in entries if not e.stacked)
    for layer in range(shape.num_layers):
        yield from ((e, layer) for e in entries if e.stacked)


def _check_names(source: SafetensorsFolder, shape: ModelShape, hf: Path) -> list[str]:
    expected: dict[str, tuple[int, ...]] = {}
    for entry, layer in _steps(shape):
        for name, sizes in zip(entry.theirs, their_shapes(entry, shape), strict=True):
            expected[name.format(layer=layer)] = sizes
    present = {n for n in source.names() if not n.endswith(_IGNORED_SUFFIX)}
    if not shape.untie_embeddings_and_output_weights:
        # A tied output weight is the embedding again.
        present.discard("lm_head.weight")
    missing, extra = sorted(set(expected) - present), sorted(present - set(expected))
    if missing or extra:
        raise CheckpointError(
            f"{hf}: tensors do not fit config.json: missing {missing[:3] or 'none'} ({len(missing)}), unknown "
            f"{extra[:3] or 'none'} ({len(extra)}); download the model again, or mend config.json"
        )
    for name, sizes in expected.items():
        if source.shape(name) != sizes:
            raise CheckpointError(
                f"{hf}: {name} has shape {list(source.shape(name))}, config.json says {list(sizes)}; they are not of one "
                "model"
            )
    return list(expected)


def _check_stored(reader: DistributedReader, entry: Entry, shape: ModelShape, folder: Path) -> None:
    stored, sizes = reader.shape(entry.ours), our_shape(entry, shape)
    if entry.stacked:
        sizes = (shape.num_layers, *sizes)
    vocabulary = entry.ours.endswith(("word_embeddings.weight", "output_layer.weight"))
    # Training pads the vocabulary; export takes the true rows.
    fits = stored[0] >= sizes[0] and stored[1:] == sizes[1:] if vocabulary else stored == sizes
    if not fits:
        raise CheckpointError(
            f"{folder}: {entry.ours} has shape {list(stored)}, {FILE_NAME} says {list(sizes)}; they are not of one model"
        )


def _dtype_of(source: SafetensorsFolder, entry: Entry) -> torch.dtype:
    return source.read(entry.theirs[0].format(layer=0)).dtype


def _bytes_of(shape: ModelShape, dtype: torch.dtype) -> int:
    total = 0
    for entry in entries_of(shape):
        size = dtype.itemsize
        for n in our_shape(entry, shape):
            size *= n
        total += size * (shape.num_layers if entry.stacked else 1)
    return total


def _digest(tensor: Tensor) -> str:
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(raw.data).hexdigest()


def _copy_assets(source: Path, target: Path) -> None:
    """Everything of a model folder but its weights and hidden files."""
    target.mkdir(exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(_WEIGHT_SUFFIXES):
            if path.name.endswith(".safetensors.index.json"):
                continue
            shutil.copyfile(path, target / path.name)


def _raise_model_max_length(path: Path, length: int) -> None:
    if not path.is_file():
        return
    content = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(content.get("model_max_length"), int) and content["model_max_length"] < length:
        content["model_max_length"] = length
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _refuse_existing(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output}: is there already; choose another folder, or remove it")


def _writing_folder(output: Path) -> Path:
    writing = output.with_name(f".{output.name}.writing")
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    return writing


class _whole_or_nothing:
    """The folder appears under its name when all is written; otherwise nothing is left."""

    def __init__(self, writing: Path, output: Path) -> None:
        self._writing, self._output = writing, output

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            if self._output.is_dir():
                self._output.rmdir()
            os.replace(self._writing, self._output)
            return
        shutil.rmtree(self._writing, ignore_errors=True)
        for cause in _causes(error):
            if isinstance(cause, CheckpointError):
                raise cause
            if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
                raise CheckpointError(f"{self._output}: the disk is full; free space and convert again") from None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what it came of; torch.distributed.checkpoint keeps what its ranks raised in ``failures``."""
    current: BaseException | None = error
    while current is not None:
        yield current
        for failure, _ in getattr(current, "failures", {}).values():
            yield from _causes(failure)
        current = current.__cause__ or current.__context__
