"""Command lines and launches as a user starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def environment(**extra: str) -> dict[str, str]:
    """Environment of a launched process: one thread each, since layouts share two cores."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **extra}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def torchrun(processes: int, *arguments: str) -> list[str]:
    """Command line of a launch on this machine."""
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={processes}",
        "--master-addr=127.0.0.1",
        f"--master-port={free_port()}",
        *arguments,
    ]


def run(
    command: Sequence[str], *, timeout: float = 600, expect: int | None = 0, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command line; its output is in the failure message where the exit status is not as expected."""
    done = subprocess.run(
        list(command), capture_output=True, text=True, timeout=timeout, env=dict(env or environment()), cwd=ROOT
    )
    if expect is not None and done.returncode != expect:
        raise AssertionError(
            f"exit status {done.returncode} of {command}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
        )
    return done
