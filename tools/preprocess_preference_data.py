"""Preference JSONL, or rows tokenised already, into Megatron's indexed binaries."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_longpo.data.indexed import Manifest, path_of
from megatron_longpo.runtime.failure import run_or_fail
from megatron_longpo.text.preprocess import Settings, draw_histogram, preprocess


def main() -> None:
    """Parse, preprocess, report."""
    parser = argparse.ArgumentParser(prog="preprocess_preference_data.py", description=__doc__)
    parser.add_argument(
        "--input", required=True, nargs="+", help=".jsonl, .jsonl.gz, .parquet, .arrow or datasets folder"
    )
    parser.add_argument("--output-prefix", required=True, help="PREFIX of .bin, .idx, .json and .rejects.jsonl")
    parser.add_argument("--tokenizer", help="tokenizer folder or SentencePiece .model file (text input)")
    parser.add_argument("--chat-template", help="template file, or mistral, mistral-v3, llama-2, chatml")
    parser.add_argument("--vocab-size", type=int, help="vocabulary of rows that are tokenised already")
    parser.add_argument("--seq-length", type=int, help="longest long row in tokens (default: no limit)")
    parser.add_argument(
        "--short-seq-length", type=int, default=32768, help="longest short row in tokens (default 32768)"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that tokenise")
    parser.add_argument("--restart", action="store_true", help="throw away what is there and begin again")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code from the tokenizer's folder")
    arguments = parser.parse_args()
    began = said = time.monotonic()

    def progress(rows: int, manifest: Manifest) -> None:
        nonlocal said
        if time.monotonic() - said > 5:
            said = time.monotonic()
            rate = manifest.tokens / (said - began)
            print(
                f"{rows} rows, {manifest.samples} samples, {manifest.tokens:,} tokens, {rate:,.0f} tokens/s", flush=True
            )

    manifest = preprocess(
        arguments.input,
        arguments.output_prefix,
        Settings(
            tokenizer=arguments.tokenizer,
            chat_template=arguments.chat_template,
            vocab_size=arguments.vocab_size,
            seq_length=arguments.seq_length,
            short_seq_length=arguments.short_seq_length,
            trust_remote_code=arguments.trust_remote_code,
        ),
        workers=arguments.workers,
        restart=arguments.restart,
        progress=progress,
        log=print,
    )
    draw_histogram(manifest, Path(f"{arguments.output_prefix}.lengths.png"))
    table = Table("samples", "turns", "tokens", "longest row", "kept aside", title=arguments.output_prefix)
    rejected = ", ".join(f"{reason} {count}" for reason, count in sorted(manifest.skip_reasons.items())) or "nothing"
    table.add_row(str(manifest.samples), str(manifest.turns), f"{manifest.tokens:,}", f"{manifest.longest:,}", rejected)
    Console().print(table)
    if manifest.skip_reasons:
        print(f"kept aside, with line numbers: {path_of(arguments.output_prefix, 'rejects.jsonl')}")


if __name__ == "__main__":
    run_or_fail(main)
