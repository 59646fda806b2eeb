"""``megatron-longpo status``: where a run is, for people, batch scripts and liveness probes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from megatron_longpo.command_line import parse
from megatron_longpo.runtime.log import log
from megatron_longpo.runtime.signals import STOPPED
from megatron_longpo.runtime.status import read_status, silent_seconds
from megatron_longpo.schema import PositiveFloat, check_ranges

_FAILED = 2
_SILENT = 1


@dataclass(frozen=True)
class StatusOptions:
    """Flags of status."""

    run: Annotated[str, tyro.conf.Positional]
    """Output folder of the run (--save)."""
    alive: PositiveFloat | None = None
    """Only ask whether the run is finished or its last heartbeat is at most this many seconds old: exit status 0, else 1. The
    heartbeat is written after a step, so allow for the longest step, evaluation and checkpoint."""


def status(arguments: Sequence[str], *, prog: str) -> None:
    """Show where a run is. Exit status 0: it is finished; 75: it goes on when it is run again; 2: something must be changed
    first."""
    options = parse(StatusOptions, arguments, prog=prog, description=status.__doc__ or "")
    check_ranges(options)
    found, seconds = read_status(Path(options.run)), silent_seconds(Path(options.run))
    line = f"{found.state}, step {found.step} of {found.train_iters}, {seconds:.0f} s ago on {found.host}"
    log(f"{options.run}: {line}{f' ({found.message})' if found.message else ''}")
    if found.slow:
        log(f"{options.run}: {found.slow}")
    if options.alive is not None:
        sys.exit(0 if found.state == "finished" or seconds <= options.alive else _SILENT)
    sys.exit({"finished": 0, "failed": _FAILED}.get(found.state, STOPPED))
