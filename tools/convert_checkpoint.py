"""Convert checkpoints between Hugging Face and this project; the same as ``megatron-longpo convert``."""

from __future__ import annotations

from megatron_longpo.cli import run


def main() -> None:
    run("convert", prog="convert_checkpoint.py")


if __name__ == "__main__":
    main()
