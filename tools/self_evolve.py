"""Evolve a model through rounds; the same as ``megatron-longpo evolve``."""

from __future__ import annotations

from megatron_longpo.cli import run


def main() -> None:
    run("evolve", prog="self_evolve.py")


if __name__ == "__main__":
    main()
