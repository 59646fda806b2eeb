"""Generate preference pairs from documents; the same as ``megatron-longpo generate``."""

from __future__ import annotations

from megatron_longpo.cli import run


def main() -> None:
    run("generate", prog="generate_preference_data.py")


if __name__ == "__main__":
    main()
