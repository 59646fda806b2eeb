"""Hugging Face checkpoints in and out, tensor by tensor, by the tables of ``model/families.py``.

One process or several: where there is a process group, its processes share the tensors.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_longpo.checkpoint.card import RUN_CONFIG, write_card
from megatron_longpo.checkpoint.folders import ASSETS, resolve
from megatron_longpo.checkpoint.stream import (
    DTYPES,
    DistributedReader,
    HuggingFaceWeights,
    LazyChunk,
    LazyTensor,
    Prefetcher,
    dtype_name,
    plan_shards,
    shard_name,
    write_distributed,
    write_index,
    write_shard,
)
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
from megatron_longpo.model.rotary import changed_scaling
from megatron_longpo.model.shape import FILE_NAME, ModelShape
from megatron_longpo.runtime.collectives import all_gather_objects, my_share, raise_on_all_ranks, rank

# Called with the bytes that this process has done since the last call, and the bytes of all processes in all.
Progress = Callable[[int, int], None]
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
# Buffers that old versions of transformers saved; made from the config.
_IGNORED_SUFFIX = "rotary_emb.inv_freq"
# Tensors are checked and compared in pieces of this many elements.
_PIECE = 2**24


@dataclass(frozen=True)
class Conversion:
    """What a conversion did: tensors, bytes and the resulting shape."""

    tensors: int
    bytes: int
    shape: ModelShape


@dataclass(frozen=True)
class Changes:
    """What of a model's configuration is to be another on the way.

    Attributes:
        rotary_base: RoPE theta.
        rope_type: of another RoPE scaling; ``scaling`` holds its numbers by Hugging Face's names.
        max_position_embeddings: longest context that the model claims.
    """

    rotary_base: float | None = None
    rope_type: str | None = None
    scaling: dict[str, Any] = dataclasses.field(default_factory=dict)
    max_position_embeddings: int | None = None

    def of(self, shape: ModelShape, source: str) -> ModelShape:
        """The shape with these changes.

        Raises:
            CheckpointError: numbers that make no scaling.
        """
        for name in ("rotary_base", "max_position_embeddings"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise CheckpointError(f"{name}={value} must be positive")
        return shape.replace(
            rotary_base=self.rotary_base or shape.rotary_base,
            rope_scaling=changed_scaling(shape, self.rope_type, self.scaling, source),
            max_position_embeddings=self.max_position_embeddings or shape.max_position_embeddings,
        )


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


# --------------------------------------------------------------------------------------------------
# In
# --------------------------------------------------------------------------------------------------


def import_hf(
    hf: str | Path,
    output: str | Path,
    *,
    changes: Changes = Changes(),
    dtype: str | None = None,
    name: str | None = None,
    progress: Progress = lambda *_: None,
) -> Conversion:
    """Convert a Hugging Face model folder into a layout-free distributed checkpoint; collective.

    Args:
        hf: folder with config.json and weights.
        output: new folder; appears when it is whole.
        changes: of RoPE and the longest context.
        dtype: cast to ``float32``, ``float16`` or ``bfloat16``; by default kept.
        name: what the model is called in the cards of what is trained from it; by default what its config.json says, or the
            folder's name.
        progress: called with bytes done and in all.

    Raises:
        CheckpointError: what the model's files lack or have too much, a weight that is not finite, an output that is there
            already, or too small a disk.
    """
    hf, output = Path(hf), Path(os.path.abspath(output))
    _refuse_existing(output)
    config = read_hf_config(hf)
    shape = changes.of(shape_from_hf(config, str(hf / "config.json")), "import")
    source = HuggingFaceWeights(hf)
    _check_names(source, shape, hf)
    wanted = DTYPES[dtype] if dtype else None
    stored = {entry.ours: wanted or _dtype_of(source, entry, shape) for entry in entries_of(shape)}
    digests: dict[str, str] = {}
    chunks: list[LazyChunk] = []
    total = 0

    def make(entry: Entry, layer: int | None, size: int) -> Tensor:
        def theirs() -> Iterator[Tensor]:
            for pattern in entry.theirs:
                tensor = source.read(pattern.format(layer=layer))
                _check_finite(tensor, f"{hf}: {pattern.format(layer=layer)}", "the model is damaged")
                if tensor.dtype != stored[entry.ours]:
                    tensor = tensor.to(stored[entry.ours])
                    what = f"{hf}: {pattern.format(layer=layer)}, cast to {dtype},"
                    _check_finite(tensor, what, "its values do not fit; give --dtype bfloat16 or float32")
                digests[pattern.format(layer=layer)] = _digest(tensor)
                yield tensor
                del tensor

        fused = fuse(entry, theirs(), shape)
        progress(size, total)
        return fused if layer is None else fused[None]

    for entry, layer in _steps(shape):
        sizes = our_shape(entry, shape)
        chunk = LazyChunk(
            key=entry.ours,
            global_shape=sizes if layer is None else (shape.num_layers, *sizes),
            offsets=(*(() if layer is None else (layer,)), *(0 for _ in sizes)),
            sizes=sizes if layer is None else (1, *sizes),
            dtype=stored[entry.ours],
            make=lambda: torch.empty(0),
        )
        work = lambda e=entry, n=layer, b=chunk.bytes: make(e, n, b)  # type: ignore[misc] # noqa: E731
        chunks.append(dataclasses.replace(chunk, make=work))
        total += chunk.bytes
    mine = my_share(chunks, [c.bytes for c in chunks])
    with _whole_or_nothing(output, total) as writing:
        with raise_on_all_ranks(output):
            write_distributed(writing, mine)
        parts = all_gather_objects(digests)
        text = "".join(f"{n} {d}\n" for n, d in sorted(x for part in parts for x in part.items()))
        with raise_on_all_ranks(output):
            shape = shape.replace(
                dtype=dtype_name(stored["embedding.word_embeddings.weight"]),
                tokenizer_hash=folder_vocabulary_hash(hf),
                weights_hash=hashlib.sha256(text.encode()).hexdigest(),
                base_model=name or config.get("_name_or_path") or hf.resolve().name,
            )
            if rank() == 0:
                shape.write(writing)
                _copy_assets(hf, writing / ASSETS)
    return Conversion(sum(len(e.theirs) for e, _ in _steps(shape)), total, shape)


# --------------------------------------------------------------------------------------------------
# Out
# --------------------------------------------------------------------------------------------------


def export_hf(
    checkpoint: str | Path,
    output: str | Path,
    *,
    changes: Changes = Changes(),
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    check: Callable[[Path, Path, ModelShape], None] | None = None,
    progress: Progress = lambda *_: None,
) -> Conversion:
    """Convert a converted or trained checkpoint into a Hugging Face folder that transformers loads as it is; collective.

    Optimizer states of a training checkpoint are not read. A trained model gets a card, README.md.

    Args:
        checkpoint: a converted checkpoint, one iteration of a run, or a run's folder (its newest iteration).
        output: new folder; appears when it is whole.
        changes: of RoPE and the longest context, in config.json.
        dtype: of the weights; by default that of the model which was imported.
        max_shard_bytes: of a safetensors file.
        check: called with the checkpoint's folder, the new folder and the shape before the new one appears under its name;
            what it raises prevents that.
        progress: called with bytes done and in all.

    Raises:
        CheckpointError: the checkpoint lacks a tensor, a weight is not finite, the output is there already, or too small a
            disk.
    """
    folder, output = resolve(checkpoint), Path(os.path.abspath(output))
    _refuse_existing(output)
    stored = ModelShape.read(folder)
    shape = changes.of(stored, "export")
    config = read_hf_config(folder / ASSETS)
    reader = DistributedReader(folder)
    described, origin = [], {}
    for entry, layer in _steps(shape):
        _check_stored(reader, entry, shape, folder)
        wanted = DTYPES[dtype or shape.dtype]
        if dtype is None and not (folder / RUN_CONFIG).is_file():
            # Converted, not trained: as imported. Training has a dtype of its own.
            wanted = reader.dtype(entry.ours)
        for number, (name, sizes) in enumerate(zip(entry.theirs, their_shapes(entry, shape), strict=True)):
            described.append(LazyTensor(name.format(layer=layer), sizes, wanted))
            origin[described[-1].name] = (entry, layer, number)
    total = sum(t.bytes for t in described)
    shards = plan_shards(described, max_shard_bytes)
    dtype = dtype_name(described[0].dtype)

    def values(shard: Sequence[LazyTensor]) -> Iterator[Tensor]:
        # A fused tensor that a shard's end cuts is read for both shards.
        runs: list[list[LazyTensor]] = []
        for tensor in shard:
            if runs and origin[runs[-1][0].name][:2] == origin[tensor.name][:2]:
                runs[-1].append(tensor)
            else:
                runs.append([tensor])

        def read(run: list[LazyTensor]) -> Tensor:
            entry, layer, _ = origin[run[0].name]
            ours = _read_ours(reader, entry, layer, shape)
            _check_finite(ours, f"{folder}: {entry.ours} (layer {layer})", "nothing was exported")
            return ours

        def size(run: list[LazyTensor]) -> int:
            entry = origin[run[0].name][0]
            return int(reader.dtype(entry.ours).itemsize * torch.Size(our_shape(entry, shape)).numel())

        made = iter(Prefetcher([(size(run), lambda run=run: read(run)) for run in runs]))  # type: ignore[misc]
        try:
            for run in runs:
                numbers = {origin[t.name][2]: t for t in run}
                # No name is left on a tensor when the next is made.
                parts = split(origin[run[0].name][0], next(made), shape)
                for number in range(len(origin[run[0].name][0].theirs)):
                    part = next(parts)
                    if number in numbers:
                        yield part
                        progress(numbers[number].bytes, total)
                    del part
                del parts
        finally:
            made.close()  # type: ignore[attr-defined]

    with _whole_or_nothing(output, total) as writing:
        with raise_on_all_ranks(output):
            for number, shard in my_share(list(enumerate(shards)), [sum(t.bytes for t in s) for s in shards]):
                with closing(values(shard)) as tensors:  # type: ignore[type-var]
                    write_shard(writing / shard_name(number, len(shards)), shard, tensors)
            if rank() == 0:
                write_index(writing, shards)
                _copy_assets(folder / ASSETS, writing)
                exported = config_for_export(config, shape, dtype, str(folder / ASSETS / "config.json"))
                (writing / "config.json").write_text(json.dumps(exported, indent=2) + "\n", encoding="utf-8")
                _raise_model_max_length(writing / "tokenizer_config.json", shape.max_position_embeddings)
                write_card(folder, writing, shape, dtype)
        if check is not None:
            check(folder, writing, shape)
    return Conversion(len(described), total, shape)


# --------------------------------------------------------------------------------------------------
# Comparison
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """First place where a tensor of the two sides differs.

    Attributes:
        name: Hugging Face's.
        layer: None outside the layers.
        index: of the first element that differs; ours, theirs: its values there.
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
    """What comparing a checkpoint with a Hugging Face folder found.

    Attributes:
        tensors, bytes: compared.
        layers: of the model.
        settings: lines on settings that differ.
        differences: of tensors, in file order.
    """

    tensors: int
    bytes: int
    layers: int
    settings: list[str]
    differences: list[Difference]

    @property
    def is_equal(self) -> bool:
        return not self.settings and not self.differences


def compare(
    checkpoint: str | Path,
    hf: str | Path,
    *,
    changes: Changes = Changes(),
    progress: Progress = lambda *_: None,
) -> Comparison:
    """Compare a checkpoint with a Hugging Face folder: settings, and every tensor bit by bit after the mapping; collective.

    Neither side is held whole. Where the dtypes differ, the wider side's values are cast first, as the conversion did.

    Args:
        checkpoint: as for ``export_hf``.
        hf: model folder.
        changes: that import or export was given: they are made to one side, which must then equal the other.
        progress: called with bytes (of the Hugging Face side) done and in all.

    Raises:
        CheckpointError: a side lacks a tensor or cannot be read.
    """
    hf = Path(hf)
    differences: list[tuple[int, Difference]] = []
    with raise_on_all_ranks(hf):
        folder = resolve(checkpoint)
        ours, theirs = sides(
            ModelShape.read(folder), shape_from_hf(read_hf_config(hf), str(hf / "config.json")), changes
        )
        settings = [
            f"{name}: {FILE_NAME} has {getattr(ours, name)}, config.json {getattr(theirs, name)}"
            for name in _unequal(ours, theirs)
        ]
        if set(_unequal(ours, theirs)) - _SETTINGS:
            # Of other tensors altogether.
            return Comparison(0, 0, ours.num_layers, settings, [])
        source, reader = HuggingFaceWeights(hf), DistributedReader(folder)
        _check_names(source, theirs, hf)
        steps = list(_steps(ours))
        for entry, _ in steps:
            _check_stored(reader, entry, ours, folder)
        sizes = [_bytes_of(entry, layer, source, ours) for entry, layer in steps]
    total = sum(sizes)
    mine = my_share(list(enumerate(steps)), sizes)
    items: list[tuple[int, Callable[[], Tensor]]] = [
        (
            torch.Size(our_shape(entry, ours)).numel() * reader.dtype(entry.ours).itemsize,
            lambda entry=entry, layer=layer: _read_ours(reader, entry, layer, ours),  # type: ignore[misc]
        )
        for _, (entry, layer) in mine
    ]
    with raise_on_all_ranks(hf), closing(iter(Prefetcher(items))) as made:  # type: ignore[type-var]
        for number, (entry, layer) in mine:
            # No name is left on a tensor when the next is made.
            parts = split(entry, next(made), ours)
            for pattern in entry.theirs:
                name = pattern.format(layer=layer)
                found = _difference(next(parts), source, name, layer)
                if found is not None:
                    differences.append((number, found))
            del parts
            progress(sizes[number], total)
    every = sorted((x for part in all_gather_objects(differences) for x in part), key=lambda x: x[0])
    count = sum(len(e.theirs) for e, _ in steps)
    return Comparison(count, total, ours.num_layers, settings, [x for _, x in every])


# What may differ between two checkpoints of the same tensors.
_SETTINGS = frozenset({"rotary_base", "rope_scaling", "max_position_embeddings", "layernorm_epsilon", "window_size"})
_NOT_COMPARED = ("dtype", "tokenizer_hash", "weights_hash", "base_model", "init_method_std")


def _unequal(ours: ModelShape, theirs: ModelShape) -> list[str]:
    names = [f.name for f in dataclasses.fields(ModelShape) if f.name not in _NOT_COMPARED]
    return [name for name in names if getattr(ours, name) != getattr(theirs, name)]


def sides(ours: ModelShape, theirs: ModelShape, changes: Changes) -> tuple[ModelShape, ModelShape]:
    """Both sides' shapes, one of them with the changes: export made them to ours, import to theirs. Whichever leaves less
    that differs."""
    exported, imported = (changes.of(ours, "verify"), theirs), (ours, changes.of(theirs, "verify"))
    return imported if len(_unequal(*imported)) < len(_unequal(*exported)) else exported


def _difference(ours: Tensor, source: HuggingFaceWeights, name: str, layer: int | None) -> Difference | None:
    """First difference of a tensor, theirs read some rows at a time."""
    rows = max(1, _PIECE * len(ours) // max(1, ours.numel()))
    index: tuple[int, ...] | None = None
    here = there = largest = 0.0
    for start in range(0, len(ours), rows):
        x = ours[start : start + rows]
        y = source.read_rows(name, start, start + rows)
        if _same_bits(x, y):
            continue
        narrow = x.dtype if x.dtype.itemsize <= y.dtype.itemsize else y.dtype
        a, b = x.to(narrow), y.to(narrow)
        # Of unequal bits some are equal as numbers: 0 and -0.
        gap = (a.double() - b.double()).abs().nan_to_num(float("inf"), posinf=float("inf"))
        largest = max(largest, float(gap.max()))
        if index is None:
            row, *rest = (_as_integers(a) != _as_integers(b)).nonzero()[0].tolist()
            index, here, there = (start + row, *rest), float(x[(row, *rest)]), float(y[(row, *rest)])
    return None if index is None else Difference(name, layer, index, here, there, largest)


def _same_bits(x: Tensor, y: Tensor) -> bool:
    x, y = x.contiguous(), y.contiguous()
    if x.dtype == y.dtype:
        return torch.equal(_as_integers(x), _as_integers(y))
    # Whichever side was cast: import casts theirs to ours, export ours to theirs.
    casts = []
    if x.dtype.itemsize >= y.dtype.itemsize:
        casts.append((x.to(y.dtype), y))
    if y.dtype.itemsize >= x.dtype.itemsize:
        casts.append((x, y.to(x.dtype)))
    return any(torch.equal(_as_integers(a), _as_integers(b)) for a, b in casts)


def _as_integers(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize])


# --------------------------------------------------------------------------------------------------
# Parts
# --------------------------------------------------------------------------------------------------


def layer_weights(
    reader: DistributedReader, shape: ModelShape, layer: int | None, prefix: str
) -> Iterator[tuple[str, Tensor]]:
    """Our weights of one layer, or those outside the layers, whose parameters' names in the model begin with a prefix."""
    for entry, n in _steps(shape):
        name = entry.ours if n is None else entry.ours.replace("decoder.layers.", f"decoder.layers.{n}.", 1)
        if n == layer and name.startswith(prefix):
            yield name, _read_ours(reader, entry, n, shape)


def _steps(shape: ModelShape) -> Iterator[tuple[Entry, int | None]]:
    """Entries layer by layer, so that shards hold whole layers."""
    entries = entries_of(shape)
    yield from ((e, None) for e in entries if not e.stacked)
    for layer in range(shape.num_layers):
        yield from ((e, layer) for e in entries if e.stacked)


def _read_ours(reader: DistributedReader, entry: Entry, layer: int | None, shape: ModelShape) -> Tensor:
    sizes = our_shape(entry, shape)
    if layer is None:
        return reader.read(entry.ours, [0] * len(sizes), sizes)
    return reader.read(entry.ours, [layer, *(0 for _ in sizes)], (1, *sizes))[0]


def _check_names(source: HuggingFaceWeights, shape: ModelShape, hf: Path) -> None:
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


def _dtype_of(source: HuggingFaceWeights, entry: Entry, shape: ModelShape) -> torch.dtype:
    """The one dtype of all tensors of an entry, since ours are stacked."""
    layers = range(shape.num_layers) if entry.stacked else (None,)
    found = {source.dtype(n.format(layer=layer)): n.format(layer=layer) for n in entry.theirs for layer in layers}
    if len(found) > 1:
        (first, a), (second, b) = list(found.items())[:2]
        raise CheckpointError(
            f"{source.folder}: {a} is {dtype_name(first)} and {b} is {dtype_name(second)}; give --dtype to have one"
        )
    return next(iter(found))


def _bytes_of(entry: Entry, layer: int | None, source: HuggingFaceWeights, shape: ModelShape) -> int:
    itemsize = source.dtype(entry.theirs[0].format(layer=layer)).itemsize
    return int(torch.Size(our_shape(entry, shape)).numel() * itemsize)


def _check_finite(tensor: Tensor, what: str, fix: str) -> None:
    flat = tensor.contiguous().view(-1)
    for start in range(0, flat.numel(), _PIECE):
        # NaN comes through, infinities are the extremes.
        low, high = torch.aminmax(flat[start : start + _PIECE])
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise CheckpointError(f"{what} holds NaN or Inf; {fix}")


def _digest(tensor: Tensor) -> str:
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(raw.data).hexdigest()


def _copy_assets(source: Path, target: Path) -> None:
    """Everything of a model folder but its weights and hidden files."""
    target.mkdir(exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(_WEIGHT_SUFFIXES):
            if path.name.endswith((".safetensors.index.json", ".bin.index.json")):
                continue
            shutil.copyfile(path, target / path.name)


def _raise_model_max_length(path: Path, length: int) -> None:
    if not path.is_file():
        return
    content = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(content.get("model_max_length"), int) and content["model_max_length"] < length:
        content["model_max_length"] = length
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------------------------------
# The output
# --------------------------------------------------------------------------------------------------


def _refuse_existing(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output}: is there already; choose another folder, or remove it")


@contextmanager
def _whole_or_nothing(output: Path, size: int) -> Iterator[Path]:
    """A folder to write to, which appears under its name when all processes are done; otherwise nothing is left.

    What a killed conversion left is removed. The folder is locked, so that two conversions cannot write the same.

    Raises:
        CheckpointError: no place for ``size`` bytes, a folder that not all processes see, or what any process raised.
    """
    writing = output.with_name(f".{output.name}.writing")
    lock: int | None = None
    with raise_on_all_ranks(output):
        if rank() == 0:
            lock = _start(writing, output, size)
    try:
        with raise_on_all_ranks(output):
            if not writing.is_dir():
                raise CheckpointError(
                    f"{output}: rank {rank()} does not see what rank 0 writes there; name a folder that all nodes share"
                )
        with raise_on_all_ranks(output):
            yield writing
        with raise_on_all_ranks(output):
            if rank() == 0:
                if output.is_dir():
                    output.rmdir()
                os.replace(writing, output)
    except BaseException:
        if rank() == 0:
            shutil.rmtree(writing, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _start(writing: Path, output: Path, size: int) -> int:
    writing.mkdir(parents=True, exist_ok=True)
    lock = os.open(writing, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            os.close(lock)
            raise CheckpointError(
                f"{output}: another conversion is writing it; wait for it, or choose another folder"
            ) from None
        # A file system without locks.
    for path in writing.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    free = shutil.disk_usage(writing).free
    if free < size * 1.01:
        os.close(lock)
        writing.rmdir()
        raise CheckpointError(
            f"{output}: needs {size / 1e9:.2f} GB, and its disk has {free / 1e9:.2f} GB free; free space or choose another"
        )
    return lock
