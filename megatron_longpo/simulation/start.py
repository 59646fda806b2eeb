"""Simulations in a process of their own, which is started here; and what is left where none can be run."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron_longpo.errors import ConfigError, LongPOError, PlatformError
from megatron_longpo.simulation import shim
from megatron_longpo.simulation.request import Card, Report, Request


def simulate(requests: Sequence[Request], card: Card | None = None, *, quiet: bool = False) -> list[Report]:
    """Simulate steps, one after another in one process.

    Args:
        requests: what is simulated.
        card: the GPU; by default one with 80 GiB, such as an H100.
        quiet: discard what the training code logs.

    Raises:
        PlatformError: this machine cannot simulate.
        LongPOError: a request cannot be run, for the same reasons as a training run.
    """
    # Here and not in the other process, for a clean message.
    shim.build()
    for request in requests:
        if not 0 <= request.rank < request.world_size:
            raise ConfigError(
                f"rank={request.rank} must be from 0 to world_size - 1 = {request.world_size - 1}; choose one of those"
            )
    with tempfile.TemporaryDirectory() as folder:
        reports = Path(folder) / "reports"
        done = subprocess.run(
            [sys.executable, "-m", "megatron_longpo.simulation", str(reports), (card or Card()).as_json()],
            input="".join(request.as_json() + "\n" for request in requests),
            stdout=subprocess.DEVNULL if quiet else None,
            stderr=subprocess.PIPE,
            text=True,
            env=_environment(),
        )
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
            message = lines[-1].removeprefix("error: ") if lines else done.stderr.strip()[-2000:]
            raise (ConfigError if done.returncode == 2 else LongPOError)(message)
        return [Report.from_json(line) for line in reports.read_text(encoding="utf-8").splitlines()]


def can_simulate() -> str | None:
    """None if this machine can simulate; otherwise why not."""
    try:
        shim.build()
    except PlatformError as error:
        return str(error)
    return None


def _environment() -> dict[str, str]:
    """The environment without what a launcher put there, which would make the process a rank of a real world."""
    launcher = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "TORCHELASTIC_RUN_ID",
        "MASTER_ADDR",
        "MASTER_PORT",
    )
    kept = {k: v for k, v in os.environ.items() if k not in launcher}
    root = str(Path(__file__).parent.parent.parent)
    return {**kept, "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
