"""Command line of training: ``torchrun ... -m megatron_longpo.train --config FILE.yaml [--flag value ...]``."""

from __future__ import annotations

import os
import sys

from megatron_longpo.config import Config, from_command_line
from megatron_longpo.runtime.failure import run_or_fail
from megatron_longpo.training.trainer import run


def main() -> None:
    """Parse, run."""
    first = os.environ.get("RANK", "0") == "0"
    config: Config
    config, print_config = from_command_line(sys.argv[1:], prog="megatron_longpo.train", quiet=not first)
    if print_config:
        if first:
            print(config.as_yaml(), end="")
        return
    run(config)


if __name__ == "__main__":
    run_or_fail(main)
