"""Training as a module: ``torchrun ... -m megatron_longpo.train --config FILE.yaml [--flag value ...]``."""

from __future__ import annotations

from megatron_longpo.cli import run

if __name__ == "__main__":
    run("train", prog="megatron_longpo.train")
