"""Import: a Hugging Face model folder becomes a distributed checkpoint that any parallel layout can load."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_longpo.checkpoint.checksums import CHECKSUMS, verified, write_checksums
from megatron_longpo.checkpoint.distributed import LazyChunk, write_distributed
from megatron_longpo.checkpoint.folders import ASSETS
from megatron_longpo.checkpoint.huggingface import DTYPES, HuggingFaceWeights, dtype_name, read_hf_config
from megatron_longpo.conversion.changes import NO_CHANGES, Changes, Conversion
from megatron_longpo.conversion.fused import FusedTensor, check_finite, check_names, fused_tensors
from megatron_longpo.conversion.output import check_new, copy_assets, staging_folder
from megatron_longpo.conversion.source import check_plain, name_of
from megatron_longpo.data.vocabulary import folder_vocabulary, vocabulary_hash
from megatron_longpo.errors import CheckpointError
from megatron_longpo.model.families import shape_from_hf
from megatron_longpo.runtime.collectives import all_gather_objects, my_share, raise_on_all_ranks, rank
from megatron_longpo.runtime.log import log
from megatron_longpo.runtime.progress import OnProgress, ignore_progress

_EMBEDDING = "embedding.word_embeddings.weight"


def import_hf(
    hf: str | Path,
    output: str | Path,
    *,
    changes: Changes = NO_CHANGES,
    dtype: str | None = None,
    name: str | None = None,
    check: Callable[[Path, Path], None] | None = None,
    progress: OnProgress = ignore_progress,
) -> Conversion:
    """Convert a Hugging Face model folder into a distributed checkpoint; collective.

    The processes of a process group share the tensors.

    Args:
        hf: model folder with config.json and weights.
        output: new folder of the checkpoint; it appears when it is complete.
        changes: changes to RoPE and the longest context.
        dtype: dtype to cast the weights to, ``float32``, ``float16`` or ``bfloat16``. Default: keep theirs.
        name: name of the base model in the cards of models trained from it. Default: that of its place in the hub's cache, what
            its config.json says, or the folder's name.
        check: called with the written folder and the model folder before the former gets its name; what it raises prevents that.
        progress: called with the bytes that this process has converted since the last call, and the total of all processes.

    Raises:
        CheckpointError: the folder's files are missing, unknown or damaged, a weight is not finite, the output exists, or the
            disk is too small.
    """
    hf, output = Path(hf), Path(os.path.abspath(output))
    check_new(output)
    config = read_hf_config(hf)
    check_plain(hf, config)
    shape = changes.apply(shape_from_hf(config, str(hf / "config.json")), "import")
    model = name_of(hf, config)
    source = HuggingFaceWeights(hf)
    check_names(source, shape)
    vocabulary = folder_vocabulary(hf)
    largest = max((vocabulary or {}).values(), default=0)
    if largest >= shape.vocab_size:
        log(
            f"note: {hf}: its tokenizer has ids up to {largest}, but the model has vocab_size={shape.vocab_size}, so data of "
            "this tokenizer will be refused; use the model's own, or enlarge the model (transformers' resize_token_embeddings)",
            active=rank() == 0,
        )
    every = fused_tensors(shape)
    importer = _Importer(source, every, dtype, progress)
    chunks = [importer.chunk(fused) for fused in every]
    with staging_folder(output, importer.total) as staging:
        # An exported model has checksums of its own.
        has_checksums = all_gather_objects((hf / CHECKSUMS).is_file())[0]
        with verified(hf) if has_checksums else nullcontext(), raise_on_all_ranks(output):
            write_distributed(staging, my_share(chunks, [c.bytes for c in chunks]))
        weights_hash = _hash_of(all_gather_objects(importer.digests))
        with raise_on_all_ranks(output):
            shape = shape.replace(
                dtype=dtype_name(importer.dtypes[_EMBEDDING]),
                tokenizer_hash=None if vocabulary is None else vocabulary_hash(vocabulary),
                weights_hash=weights_hash,
                base_model=name or model.name,
                base_revision=model.revision,
            )
            if rank() == 0:
                shape.write(staging)
                copy_assets(hf, staging / ASSETS)
                write_checksums(staging)
        if check is not None:
            check(staging, hf)
    return Conversion(sum(len(fused.names) for fused in every), importer.total, shape)


class _Importer:
    """Makes our tensors from a Hugging Face folder.

    Args:
        source: weights of the folder.
        every: all tensors of the model.
        dtype: name of the dtype to cast to; None keeps theirs.
        progress: see ``import_hf``.

    Attributes:
        dtypes: dtype of each stored tensor, by key.
        digests: SHA-256 of each Hugging Face tensor that was read, cast, by name.
        total: bytes of all tensors as stored.
    """

    def __init__(
        self, source: HuggingFaceWeights, every: Sequence[FusedTensor], dtype: str | None, progress: OnProgress
    ) -> None:
        self._source, self._progress = source, progress
        self.dtypes = _dtypes_of(source, every) if dtype is None else {f.entry.ours: DTYPES[dtype] for f in every}
        self.digests: dict[str, str] = {}
        self.total = sum(self._bytes(fused) for fused in every)

    def _bytes(self, fused: FusedTensor) -> int:
        return fused.numel * self.dtypes[fused.entry.ours].itemsize

    def chunk(self, fused: FusedTensor) -> LazyChunk:
        """A tensor of ours as a chunk of the checkpoint, which is made when it is written."""
        return LazyChunk(
            key=fused.entry.ours,
            global_shape=fused.stored_shape,
            offsets=fused.stored_offsets,
            sizes=fused.stored_sizes,
            dtype=self.dtypes[fused.entry.ours],
            make=partial(self._make, fused),
        )

    def _make(self, fused: FusedTensor) -> Tensor:
        tensor = fused.entry.fuse(self._read(fused), fused.model)
        self._progress(self._bytes(fused), total=self.total)
        return tensor if fused.layer is None else tensor[None]

    def _read(self, fused: FusedTensor) -> Iterator[Tensor]:
        dtype = self.dtypes[fused.entry.ours]
        for name in fused.names:
            tensor = self._source.read(name)
            label = f"{self._source.folder}: {name}"
            check_finite(tensor, label, "the model is damaged; download it again")
            if tensor.dtype != dtype:
                tensor = tensor.to(dtype)
                label = f"{label}, cast to {dtype_name(dtype)},"
                check_finite(tensor, label, "its values do not fit; use --dtype bfloat16 or float32")
            self.digests[name] = _digest(tensor)
            yield tensor
            # Drop the reference before the next tensor is read.
            del tensor


def _dtypes_of(source: HuggingFaceWeights, every: Sequence[FusedTensor]) -> dict[str, torch.dtype]:
    """Dtype of each stored tensor. Ours are fused and stacked, so those of theirs must be the same.

    Raises:
        CheckpointError: two tensors of one of ours have different dtypes.
    """
    found: dict[str, tuple[str, torch.dtype]] = {}
    for fused in every:
        for name in fused.names:
            dtype = source.dtype(name)
            first, expected = found.setdefault(fused.entry.ours, (name, dtype))
            if dtype != expected:
                raise CheckpointError(
                    f"{source.folder}: {first} is {dtype_name(expected)}, but {name} is {dtype_name(dtype)}; give --dtype to "
                    "cast all weights to one dtype"
                )
    return {key: dtype for key, (_, dtype) in found.items()}


def _digest(tensor: Tensor) -> str:
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(raw.data).hexdigest()


def _hash_of(digests: Sequence[dict[str, str]]) -> str:
    """One hash of all processes' digests."""
    merged = {name: digest for part in digests for name, digest in part.items()}
    text = "".join(f"{name} {digest}\n" for name, digest in sorted(merged.items()))
    return hashlib.sha256(text.encode()).hexdigest()
