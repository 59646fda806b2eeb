"""Convert checkpoints: ``import`` from Hugging Face, ``export`` to Hugging Face."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_longpo.checkpoint.convert import Conversion, export_hf, import_hf
from megatron_longpo.failure import run_or_fail


def main() -> None:
    """Parse, convert, report."""
    parser = argparse.ArgumentParser(prog="convert_checkpoint.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    dtypes = ("float32", "float16", "bfloat16")
    to_ours = commands.add_parser("import", help="Hugging Face folder -> layout-free distributed checkpoint")
    to_ours.add_argument("--hf", required=True, metavar="DIR", help="model folder: config.json, safetensors, tokenizer")
    to_ours.add_argument("--output", required=True, metavar="CKPT", help="new folder of the checkpoint")
    to_ours.add_argument("--rotary-base", type=float, help="RoPE theta of the checkpoint, instead of the model's")
    to_ours.add_argument("--dtype", choices=dtypes, help="cast the weights (default: keep)")
    to_hf = commands.add_parser("export", help="checkpoint -> Hugging Face folder")
    to_hf.add_argument("--checkpoint", required=True, metavar="CKPT", help="converted checkpoint, run folder or iter_*")
    to_hf.add_argument("--output", required=True, metavar="DIR", help="new model folder")
    to_hf.add_argument("--dtype", choices=dtypes, help="dtype of the weights (default: that of the imported model)")
    to_hf.add_argument(
        "--max-shard-size", type=float, default=5.0, metavar="GB", help="of a safetensors file (10^9 bytes)"
    )
    arguments = parser.parse_args()

    def work(report: Callable[[int, int], None]) -> Conversion:
        if arguments.command == "import":
            return import_hf(
                arguments.hf,
                arguments.output,
                rotary_base=arguments.rotary_base,
                dtype=arguments.dtype,
                progress=report,
            )
        return export_hf(
            arguments.checkpoint,
            arguments.output,
            dtype=arguments.dtype,
            max_shard_bytes=int(arguments.max_shard_size * 10**9),
            progress=report,
        )

    began = time.monotonic()
    console = Console()
    columns = (
        TextColumn(arguments.command),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(arguments.command)
        result = work(lambda done, total: bar.update(task, completed=done, total=total))
    seconds = time.monotonic() - began
    print(
        f"{arguments.command}: {result.tensors} tensors, {result.bytes / 1e9:.2f} GB in {seconds:.1f} s "
        f"({result.bytes / 1e9 / seconds:.2f} GB/s) -> {arguments.output}"
    )


if __name__ == "__main__":
    run_or_fail(main)
