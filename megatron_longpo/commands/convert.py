"""``megatron-longpo convert import|verify|export``, or ``tools/convert_checkpoint.py``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import tyro

from megatron_longpo.command_line import parse
from megatron_longpo.config import RopeChanges, is_url, scaling_numbers
from megatron_longpo.errors import CheckpointError, ConfigError
from megatron_longpo.runtime.log import log
from megatron_longpo.schema import Count, ModelSizeFactor, check_ranges

if TYPE_CHECKING:
    from megatron_longpo.conversion.changes import Changes, Conversion
    from megatron_longpo.runtime.progress import Progress

Folder = Annotated[str, tyro.conf.arg(metavar="DIR")]
Dtype = Literal["float32", "float16", "bfloat16"]
Options = TypeVar("Options", "ImportOptions", "ExportOptions", "VerifyOptions")


def size_in_bytes(text: str) -> int:
    """``5GB`` (10^9 bytes), ``500MB`` or plain bytes; a bare number below 1000 means GB.

    Raises:
        ValueError: not a size.
    """
    upper = text.strip().upper()
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if upper.endswith(unit):
            upper, number = upper.removesuffix(unit), factor
            break
    else:
        number = 1
    try:
        value = float(upper)
    except ValueError:
        raise ValueError(f"{text!r} is not a size; write 5GB, 500MB or a number of bytes") from None
    if number == 1 and value < 1000:
        number = 10**9
    if not 1 <= value * number < float("inf"):
        raise ValueError(f"{text!r} is not a size; it must be positive")
    return int(value * number)


Size = Annotated[
    int,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="SIZE",
        instance_from_str=lambda texts: size_in_bytes(texts[0]),
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    ),
]


@dataclass(frozen=True)
class ComparisonOptions:
    """How the two sides are compared. All tensors are always compared bit by bit."""

    logits: bool = True
    """Compare the logits of the two models too."""
    text: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Text file that the models are run on. Default: random tokens."""
    tokens: Count = 64
    """Tokens per row."""
    rows: Count = 1
    """Rows of random tokens."""
    seed: int = 0
    """Seed of the random tokens."""
    first_position: int = 0
    """Position of each row's first token, to try RoPE beyond the model's context."""
    beyond: bool = True
    """Also run the rows across the end of every context that either side names, original or claimed, and the first layer on rows
    longer than each sliding window."""
    bound: float = 1e-4
    """Largest difference allowed between logits, relative to the largest logit."""
    whole: bool = False
    """Keep both models in memory, instead of one layer at a time."""
    report: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """JSON file that the findings are written to."""

    def check(self) -> None:
        """Check the numbers, and before any long work that the report can be written.

        Raises:
            ConfigError, CheckpointError: the first thing that does not fit.
        """
        check_ranges(self)
        if self.text is not None and not os.path.isfile(self.text):
            raise CheckpointError(f"--text {self.text}: there is no such file; name a UTF-8 text file")
        if self.report is None:
            return
        try:
            with open(self.report, "a", encoding="utf-8"):
                pass
        except OSError as error:
            raise CheckpointError(f"--report {self.report}: cannot be written ({error}); name another file") from None


@dataclass(frozen=True)
class SizeOptions:
    """How large a model may be."""

    model_size_factor: ModelSizeFactor = 1.0
    """Factor by which a model may exceed the limits of its numbers (SECURITY.md), such as 4096 layers."""


@dataclass(frozen=True)
class ImportOptions:
    """Flags of import."""

    hf: Folder
    """Hugging Face model folder: config.json, safetensors (or .bin), tokenizer; or a model of the hub, org/name or
    org/name@revision."""
    output: Folder
    """New folder of the checkpoint."""
    sizes: SizeOptions
    changes: RopeChanges
    comparison: ComparisonOptions
    dtype: Dtype | None = None
    """Cast the weights to this type. Default: keep theirs."""
    revision: str | None = None
    """Branch, tag or commit of a model of the hub."""
    name: str | None = None
    """Name of the base model in the model cards of what is trained from it. Default: that of its place in the hub's cache, what
    its config.json says, or the folder's."""
    verify: bool = True
    """Compare what was written with the model folder before the checkpoint gets its name."""


@dataclass(frozen=True)
class ExportOptions:
    """Flags of export."""

    checkpoint: Folder
    """Converted checkpoint, run folder, or one iteration of a run (iter_*); or a URL of one, such as s3://BUCKET/RUN."""
    output: Folder
    """New Hugging Face model folder."""
    sizes: SizeOptions
    changes: RopeChanges
    comparison: ComparisonOptions
    dtype: Dtype | None = None
    """Type of the weights. Default: that of the imported model."""
    max_shard_size: Size = 5 * 10**9
    """Largest safetensors file: 5GB, 500MB, or a number of bytes."""
    verify: bool = True
    """Compare what was written with the checkpoint before the folder gets its name."""


@dataclass(frozen=True)
class VerifyOptions:
    """Flags of verify."""

    checkpoint: Folder
    """Converted checkpoint, run folder, or one iteration of a run (iter_*); or a URL of one, such as s3://BUCKET/RUN."""
    hf: Folder
    """Hugging Face model folder, or a model of the hub, org/name or org/name@revision."""
    sizes: SizeOptions
    changes: RopeChanges
    comparison: ComparisonOptions
    revision: str | None = None
    """Branch, tag or commit of a model of the hub."""


def import_(arguments: Sequence[str], *, prog: str) -> None:
    """Convert a Hugging Face folder to a distributed checkpoint that any parallel layout can load, compared with the folder
    before it gets its name. Launched with torchrun, the processes share the work."""
    options = _parse(ImportOptions, arguments, prog, import_)
    options.comparison.check()
    # Not before the flags are read: it imports torch and megatron-core.
    from megatron_longpo.conversion.import_hf import import_hf

    with _processes() as first:
        hf = _model_folder(options.hf, options.revision)

        def check(written: Path, source: Path) -> None:
            progress.stop()
            if options.verify:
                _verify(written, source, options.changes, options.comparison)

        with _progress("import", first) as progress:
            result = import_hf(
                hf,
                options.output,
                changes=_changes(options.changes),
                dtype=options.dtype,
                name=options.name,
                check=check,
                progress=progress.add,
            )
        _report(progress, result, options.output)


def export(arguments: Sequence[str], *, prog: str) -> None:
    """Convert a checkpoint to a Hugging Face folder, compared with the checkpoint before it gets its name. Launched with
    torchrun, the processes share the work."""
    options = _parse(ExportOptions, arguments, prog, export)
    options.comparison.check()
    from megatron_longpo.conversion.export_hf import export_hf

    with _processes() as first:

        def check(checkpoint: Path, written: Path) -> None:
            progress.stop()
            if options.verify:
                _verify(checkpoint, written, options.changes, options.comparison)

        with _progress("export", first) as progress:
            result = export_hf(
                options.checkpoint,
                options.output,
                changes=_changes(options.changes),
                dtype=options.dtype,
                max_shard_bytes=options.max_shard_size,
                check=check,
                progress=progress.add,
            )
        _report(progress, result, options.output)


def verify(arguments: Sequence[str], *, prog: str) -> None:
    """Compare a checkpoint with a Hugging Face folder: every tensor bit by bit, then logits. Fails where they differ."""
    options = _parse(VerifyOptions, arguments, prog, verify)
    options.comparison.check()
    with _processes():
        hf = _model_folder(options.hf, options.revision)
        _verify(_checkpoint(options.checkpoint), hf, options.changes, options.comparison)


def _parse(cls: type[Options], arguments: Sequence[str], prog: str, command: Callable[..., None]) -> Options:
    description = " ".join((command.__doc__ or "").split())
    options = parse(cls, arguments, prog=prog, description=description, quiet=os.environ.get("RANK", "0") != "0")
    check_ranges(options.sizes)
    output = getattr(options, "output", "")
    if is_url(output):
        raise ConfigError(
            f"output={output}: is a URL, but conversions write to a folder; name one, and copy it with your store's own tool "
            "(aws s3 cp --recursive)"
        )
    from megatron_longpo.model.shape import allow_model_sizes

    allow_model_sizes(options.sizes.model_size_factor)
    return options


def _checkpoint(text: str) -> Path:
    """The checkpoint that an option names, brought here if it is a URL."""
    if not is_url(text):
        return Path(text)
    from megatron_longpo.checkpoint.folders import resolve

    return resolve(text, name="checkpoint")


@contextmanager
def _processes() -> Iterator[bool]:
    """A process group of the processes that torchrun launched, if it did; yields whether this is the first of them."""
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo", timeout=timedelta(hours=24))
    yield not dist.is_initialized() or dist.get_rank() == 0
    if dist.is_initialized():
        dist.destroy_process_group()


def _model_folder(text: str, revision: str | None) -> Path:
    """The folder of a model, downloaded by one process if it is named by its place on a hub."""
    import torch.distributed as dist

    from megatron_longpo.runtime.collectives import raise_on_all_ranks, rank
    from megatron_longpo.runtime.hub import model_folder

    folder = Path(text)
    with raise_on_all_ranks(folder):
        if rank() == 0:
            folder = model_folder(text, revision)
    if dist.is_initialized():
        found = [str(folder)]
        dist.broadcast_object_list(found, src=0)
        folder = Path(found[0])
    return folder


def _progress(name: str, first: bool) -> Progress:
    from megatron_longpo.runtime.progress import Progress

    return Progress(name, unit="bytes", active=first, shared=True, last_line=False)


def _report(progress: Progress, result: Conversion, output: str) -> None:
    gigabytes = result.bytes / 1e9
    log(
        f"{progress.name}: {result.tensors} tensors, {gigabytes:.2f} GB in {progress.seconds:.2f} s "
        f"({gigabytes / progress.seconds:.2f} GB/s) -> {output}",
        active=progress.active,
    )


def _changes(options: RopeChanges) -> Changes:
    from megatron_longpo.conversion.changes import Changes

    return Changes(
        rotary_base=options.rotary_base,
        rope_type=options.rope_type,
        scaling=scaling_numbers(options),
        max_position_embeddings=options.max_position_embeddings,
    )


def _verify(checkpoint: Path, hf: Path, changes: RopeChanges, comparison: ComparisonOptions) -> None:
    from megatron_longpo.conversion.verify import LogitsCheck, verify

    logits = LogitsCheck(
        text=comparison.text,
        tokens=comparison.tokens,
        rows=comparison.rows,
        seed=comparison.seed,
        first_position=comparison.first_position,
        bound=comparison.bound,
        whole=comparison.whole,
        beyond=comparison.beyond,
    )
    verify(
        checkpoint,
        hf,
        changes=_changes(changes),
        logits=logits if comparison.logits else None,
        report=Path(comparison.report) if comparison.report else None,
    )
