"""The doctor as a module: ``torchrun ... -m megatron_longpo.doctor [--flag value ...]``."""

from __future__ import annotations

import importlib

if __name__ == "__main__":
    # By name, because the commands are above this package and import it.
    importlib.import_module("megatron_longpo.cli").run("doctor", prog="megatron_longpo.doctor")
