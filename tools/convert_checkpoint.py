"""Convert checkpoints: ``import`` from Hugging Face, ``export`` to Hugging Face, ``verify`` that both are the same model.

python tools/convert_checkpoint.py import --hf MODEL --output CKPT
python tools/convert_checkpoint.py verify --checkpoint CKPT --hf MODEL
python tools/convert_checkpoint.py export --checkpoint RUN --output TRAINED
torchrun --nproc-per-node 8 tools/convert_checkpoint.py import --hf MODEL --output CKPT     (the processes share the work)
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from megatron_longpo.checkpoint.folders import ASSETS, resolve
from megatron_longpo.conversion.convert import Changes, Comparison, Conversion, compare, export_hf, import_hf
from megatron_longpo.conversion.verification import Agreement, compare_logits
from megatron_longpo.errors import CheckpointError
from megatron_longpo.model.shape import ModelShape
from megatron_longpo.runtime.collectives import rank
from megatron_longpo.runtime.failure import run_or_fail

DTYPES = ("float32", "float16", "bfloat16")
_LINE_SECONDS = 10.0


def main() -> None:
    """Parse, convert or verify, report."""
    arguments = parse()
    check_report(arguments)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo", timeout=datetime.timedelta(hours=24))
    {"import": import_, "export": export, "verify": verify}[arguments.command](arguments)
    if dist.is_initialized():
        dist.destroy_process_group()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="convert_checkpoint.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    to_ours = commands.add_parser("import", help="Hugging Face folder -> layout-free distributed checkpoint")
    to_ours.add_argument(
        "--hf", required=True, metavar="DIR", help="model folder: config.json, safetensors (or .bin), tokenizer"
    )
    to_ours.add_argument("--output", required=True, metavar="CKPT", help="new folder of the checkpoint")
    to_ours.add_argument("--dtype", choices=DTYPES, help="cast the weights (default: keep)")
    to_ours.add_argument("--name", help="base model's name in the cards of models trained from it")
    to_hf = commands.add_parser("export", help="checkpoint -> Hugging Face folder, verified")
    to_hf.add_argument("--checkpoint", required=True, metavar="CKPT", help="converted checkpoint, run folder or iter_*")
    to_hf.add_argument("--output", required=True, metavar="DIR", help="new model folder")
    to_hf.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: that of the imported model)")
    to_hf.add_argument(
        "--max-shard-size", type=size_in_bytes, default=5 * 10**9, metavar="SIZE", help="of a file: 5GB, 500MB or bytes"
    )
    to_hf.add_argument("--no-verify", action="store_true", help="do not compare what was written with the checkpoint")
    both = commands.add_parser("verify", help="compare all tensors bit by bit, and logits")
    both.add_argument("--checkpoint", required=True, metavar="CKPT", help="converted checkpoint, run folder or iter_*")
    both.add_argument("--hf", required=True, metavar="DIR", help="model folder")
    for command in (to_ours, to_hf, both):
        add_changes(command)
    for command in (to_hf, both):
        command.add_argument("--no-logits", action="store_true", help="compare tensors alone")
        command.add_argument("--text", metavar="FILE", help="run the models on this text (default: random tokens)")
        command.add_argument("--tokens", type=positive, default=64, help="of a row (default: 64)")
        command.add_argument("--rows", type=positive, default=1, help="rows of random tokens (default: 1)")
        command.add_argument("--seed", type=int, default=0, help="of the random tokens")
        command.add_argument("--first-position", type=int, default=0, help="position of each row's first token")
        command.add_argument("--bound", type=float, default=1e-4, help="of the logits' largest relative difference")
        command.add_argument("--whole", action="store_true", help="keep both models in memory instead of a layer")
        command.add_argument("--report", metavar="FILE", help="write what was compared as JSON")
    return parser.parse_args()


def check_report(a: argparse.Namespace) -> None:
    """Whether the report can be written, before any long work.

    Raises:
        CheckpointError: it cannot.
    """
    if getattr(a, "report", None):
        try:
            with open(a.report, "a", encoding="utf-8"):
                pass
        except OSError as error:
            raise CheckpointError(f"--report {a.report}: cannot be written ({error}); name another file") from None


def add_changes(command: argparse.ArgumentParser) -> None:
    """Flags of RoPE and the longest context, by the names of the training configuration."""
    group = command.add_argument_group(
        "changes on the way (verify: those that import or export was given)", "default: as the model is"
    )
    group.add_argument("--rotary-base", type=float, help="RoPE theta")
    group.add_argument("--rope-type", choices=("default", "linear", "llama3", "yarn"), help="RoPE scaling")
    for flag in ("rotary-scaling-factor", "attention-factor", "beta-fast", "beta-slow"):
        group.add_argument(f"--{flag}", type=float)
    for flag in ("low-freq-factor", "high-freq-factor"):
        group.add_argument(f"--{flag}", type=float)
    group.add_argument("--original-max-position-embeddings", type=int)
    group.add_argument("--max-position-embeddings", type=int, help="longest context the model claims")


def changes_of(a: argparse.Namespace) -> Changes:
    names = "original_max_position_embeddings attention_factor beta_fast beta_slow low_freq_factor high_freq_factor"
    numbers = {"factor": a.rotary_scaling_factor, **{name: getattr(a, name) for name in names.split()}}
    return Changes(a.rotary_base, a.rope_type, numbers, a.max_position_embeddings)


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def size_in_bytes(text: str) -> int:
    """``5GB`` (10^9 bytes), ``500MB`` or plain bytes; a bare number below 1000 means GB."""
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
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 5GB, 500MB or bytes") from None
    if number == 1 and value < 1000:
        number = 10**9
    if value * number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; it must be positive")
    return int(value * number)


# --------------------------------------------------------------------------------------------------
# Progress
# --------------------------------------------------------------------------------------------------


class Work:
    """Progress of one piece of work over all processes: a bar on a terminal, now and then a line elsewhere.

    Args:
        name: of the work.
    """

    def __init__(self, name: str) -> None:
        self.name, self.began = name, time.monotonic()
        self.active = rank() == 0
        self._alone = not dist.is_initialized() or dist.get_world_size() == 1
        self._ended: float | None = None
        self._unsent = self._done = 0
        self._told = self.began
        self._line = self.began
        console = Console(file=sys.stderr)
        columns = (TextColumn(name), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self._bar = Bar(*columns, console=console, disable=not (self.active and console.is_terminal))
        self._task = self._bar.add_task(name, total=None)

    def __enter__(self) -> Callable[[int, int], None]:
        self._bar.start()
        return self._report

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def stop(self) -> None:
        """What comes now is other work."""
        self._bar.stop()
        self._ended = time.monotonic()

    @property
    def seconds(self) -> float:
        return (self._ended or time.monotonic()) - self.began

    def _report(self, more: int, total: int) -> None:
        self._unsent += more
        now = time.monotonic()
        if not self._alone and now - self._told < 0.5:
            return
        self._told = now
        if self._alone:
            self._done += self._unsent
        else:
            store = dist.distributed_c10d._get_default_store()
            self._done = store.add(f"megatron_longpo/{self.name}", self._unsent)
        self._unsent = 0
        if not self.active:
            return
        self._bar.update(self._task, completed=self._done, total=total)
        if self._bar.disable and now - self._line >= _LINE_SECONDS and self._done:
            self._line = now
            rate = self._done / self.seconds
            print(
                f"{self.name}: {self._done / 1e9:.2f} of {total / 1e9:.2f} GB, {rate / 1e9:.2f} GB/s, "
                f"{(total - self._done) / rate:.0f} s left",
                flush=True,
            )


def print_rank0(text: str) -> None:
    """A line of the first process."""
    if rank() == 0:
        print(text, flush=True)


def report_conversion(work: Work, result: Conversion, output: str) -> None:
    print_rank0(
        f"{work.name}: {result.tensors} tensors, {result.bytes / 1e9:.2f} GB in {work.seconds:.2f} s "
        f"({result.bytes / 1e9 / work.seconds:.2f} GB/s) -> {output}"
    )


# --------------------------------------------------------------------------------------------------
# Commands
# --------------------------------------------------------------------------------------------------


def import_(a: argparse.Namespace) -> None:
    """Import."""
    work = Work("import")
    with work as report:
        result = import_hf(a.hf, a.output, changes=changes_of(a), dtype=a.dtype, name=a.name, progress=report)
    report_conversion(work, result, a.output)


def export(a: argparse.Namespace) -> None:
    """Export, and verify before the folder appears under its name."""

    def check(checkpoint: Path, written: Path, _shape: ModelShape) -> None:
        work.stop()
        if not a.no_verify:
            verify_conversion(a, checkpoint, written)

    work = Work("export")
    with work as report:
        result = export_hf(
            a.checkpoint,
            a.output,
            changes=changes_of(a),
            dtype=a.dtype,
            max_shard_bytes=a.max_shard_size,
            check=check,
            progress=report,
        )
    report_conversion(work, result, a.output)


def verify(a: argparse.Namespace) -> None:
    """Compare, and fail where there is a difference."""
    verify_conversion(a, Path(a.checkpoint), Path(a.hf))


def verify_conversion(a: argparse.Namespace, checkpoint: Path, hf: Path) -> None:
    """Bits, then logits; a table of the layers where they differ.

    Raises:
        CheckpointError: they do.
    """
    changes = changes_of(a)
    work = Work("verify")
    with work as report:
        found = compare(checkpoint, hf, changes=changes, progress=report)
    print_rank0(
        f"verify: {found.tensors} tensors, {found.bytes / 1e9:.2f} GB compared bit by bit in {work.seconds:.2f} s: "
        + ("equal" if found.is_equal else f"{len(found.differences)} differ")
    )
    if not found.is_equal:
        print_differences(found)
    # Other tensors altogether: nothing to run side by side.
    agreement = None if a.no_logits or not found.tensors else logits(a, checkpoint, hf, changes)
    if agreement is not None:
        print_rank0(
            f"verify: logits of {agreement.tokens} tokens differ by at most {agreement.distances[-1]:.1e} of the largest one "
            f"(bound {agreement.bound:g}); the same next token at {agreement.same_choice:.1%} of the places"
        )
        if not agreement.is_close:
            print_rank0(f"verify: the first place beyond the bound is {agreement.first_beyond}")
    if a.report and rank() == 0:
        write_report(Path(a.report), found, agreement)
    if not found.is_equal or (agreement is not None and not agreement.is_close):
        reasons = found.settings[:1] + [f"{d.name} at {list(d.index)}" for d in found.differences[:1]]
        reasons += [] if agreement is None or agreement.is_close else [f"logits by {agreement.distances[-1]:.1e}"]
        raise CheckpointError(
            f"{resolve(checkpoint)} and {hf.name.removeprefix('.').removesuffix('.writing')} are not the same model: "
            f"{'; '.join(reasons)}; convert again (a change on the way is to be given to verify too)"
        )


def logits(a: argparse.Namespace, checkpoint: Path, hf: Path, changes: Changes) -> Agreement:
    """Both models on a text's tokens, or on random ones."""
    folder = resolve(checkpoint)
    if a.text:
        from megatron_longpo.text.chat import load_tokenizer

        try:
            text = Path(a.text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"--text {a.text}: cannot be read ({error}); name a UTF-8 text file") from None
        rows = [load_tokenizer(folder / ASSETS).encode(text, continues=False)[: a.tokens]]
    else:
        generator = torch.Generator().manual_seed(a.seed)
        vocabulary = ModelShape.read(folder).vocab_size
        rows = [torch.randint(0, vocabulary, (a.tokens,), generator=generator).tolist() for _ in range(a.rows)]
    console = Console(file=sys.stderr)
    columns = (TextColumn("layers"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn())
    with Bar(*columns, console=console, disable=not (console.is_terminal and rank() == 0)) as bar:
        task = bar.add_task("layers")
        return compare_logits(
            checkpoint,
            hf,
            rows,
            changes=changes,
            first_position=a.first_position,
            bound=a.bound,
            whole=a.whole,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def print_differences(found: Comparison) -> None:
    """What differs, by layer: how many tensors, and the first element of the first."""
    if rank() != 0:
        return
    console = Console(width=160)
    for line in found.settings:
        console.print(f"differs: {line}", soft_wrap=True, highlight=False)
    if not found.differences:
        return
    table = Table("layer", "tensors that differ", "first", "at", "checkpoint", "Hugging Face", "largest difference")
    layers: list[int | None] = [None, *range(found.layers)]
    for layer in layers:
        here = [d for d in found.differences if d.layer == layer]
        name = "outside" if layer is None else str(layer)
        if not here:
            table.add_row(name, "0", "", "", "", "", "")
            continue
        d = here[0]
        largest = max(x.largest for x in here)
        table.add_row(
            name, str(len(here)), d.name, str(list(d.index)), f"{d.ours:.6g}", f"{d.theirs:.6g}", f"{largest:.3g}"
        )
    console.print(table)


def write_report(path: Path, found: Comparison, agreement: Agreement | None) -> None:
    content: dict[str, Any] = {
        "tensors": found.tensors,
        "bytes": found.bytes,
        "settings": found.settings,
        "differences": [vars(d) for d in found.differences],
    }
    if agreement is not None:
        content["logits"] = vars(agreement)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_or_fail(main)
