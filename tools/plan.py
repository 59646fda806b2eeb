"""Plan a run before GPUs are rented; the same as ``megatron-longpo plan``."""

from __future__ import annotations

from megatron_longpo.cli import run


def main() -> None:
    run("plan", prog="plan.py")


if __name__ == "__main__":
    main()
