"""Evaluate a model, or compare evaluations with --compare; the same as ``megatron-longpo evaluate``."""

from __future__ import annotations

from megatron_longpo.cli import run


def main() -> None:
    run("evaluate", prog="evaluate.py")


if __name__ == "__main__":
    main()
