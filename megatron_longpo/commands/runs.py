"""``megatron-longpo watch`` and ``compare-runs``: runs seen from outside."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from megatron_longpo.command_line import Switch, parse
from megatron_longpo.schema import PositiveFloat, Range, check_ranges


@dataclass(frozen=True)
class WatchOptions:
    """Flags of watch."""

    run: Annotated[str, tyro.conf.Positional]
    """Output folder of the run (--save)."""
    once: Switch = False
    """Show it once and stop."""
    interval: PositiveFloat = 2.0
    """Seconds between two looks at the folder."""


@dataclass(frozen=True)
class CompareOptions:
    """Flags of compare-runs."""

    first: Annotated[str, tyro.conf.Positional]
    """Output folder of a run."""
    other: Annotated[str, tyro.conf.Positional]
    """Output folder of another run."""
    tolerance: Annotated[float, Range(ge=0, lt=1, fix="0 asks for the same bits")] = 0.0
    """Relative difference up to which two values count as equal: 1e-5 for another layout, 0 for the same bits."""


def watch(arguments: Sequence[str], *, prog: str) -> None:
    """Watch a run: curves, speed, time left, last events. Ends with the run, or by Ctrl-C."""
    options = parse(WatchOptions, arguments, prog=prog, description=watch.__doc__ or "")
    check_ranges(options)
    from megatron_longpo.runs.watch import watch_run

    watch_run(Path(options.run), once=options.once, interval=options.interval)


def compare_runs(arguments: Sequence[str], *, prog: str) -> None:
    """Find the first step and metric in which two runs differ. Exit status 0: they are equal in all steps that both have; 1: they
    differ."""
    description = " ".join((compare_runs.__doc__ or "").split())
    options = parse(CompareOptions, arguments, prog=prog, description=description)
    check_ranges(options)
    from megatron_longpo.runs import compare

    found = compare.compare_runs(Path(options.first), Path(options.other), tolerance=options.tolerance)
    compare.print_comparison(found, options.first, options.other)
    if found.differences:
        sys.exit(1)
