"""What the doctor reports: a line per thing that was looked at, as a table and as ``doctor.json``."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from megatron_longpo.runtime.files import write_atomically

Status = Literal["pass", "slow", "fail", "skipped"]
# From good to bad; what is left out is no fault.
_ORDER: tuple[Status, ...] = ("skipped", "pass", "slow", "fail")
_STYLES = {"pass": "green", "slow": "yellow", "fail": "bold red", "skipped": "dim"}
# 0, 1 and 2 have the meanings that they have for every command.
EXIT_STATUS = {"pass": 0, "skipped": 0, "slow": 3, "fail": 4}
_VERSION = 1


@dataclass(frozen=True)
class Line:
    """What was found of one thing.

    Attributes:
        name: what was looked at; the same on every rank.
        status: ``pass``, ``slow``, ``fail``, or ``skipped``.
        detail: what was found, or why it was skipped.
        remedy: what to do; for a kernel, the flag that avoids it.
        kernel: name of the kernel that training refuses if this fails; empty: none.
        seconds: how long it took.
        figures: numbers by name, for ``doctor.json``.
        ranks: ranks that the status is of; empty: all that looked.
    """

    name: str
    status: Status
    detail: str = ""
    remedy: str = ""
    kernel: str = ""
    seconds: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)
    ranks: tuple[int, ...] = ()

    @classmethod
    def of(cls, row: dict[str, Any]) -> Line:
        """A line that went through JSON."""
        return cls(**{**row, "ranks": tuple(row["ranks"])})


def by_error(name: str, errors: dict[str, float], bound: float, *, remedy: str, kernel: str = "") -> Line:
    """A line on relative errors of values: right if all are within a bound.

    Args:
        name: what was looked at.
        errors: relative error by name of the value.
        bound: largest error that is rounding.
        remedy: what to do if one is larger.
        kernel: name of the kernel.
    """
    # NaN is too large as well.
    wrong = {what: error for what, error in errors.items() if not error <= bound}
    if not wrong:
        worst = max(errors.values(), default=0.0)
        return Line(name, "pass", f"errors up to {worst:.1e}", kernel=kernel, figures=errors)
    detail = ", ".join(f"{what} is off by {error:.1e}" for what, error in wrong.items())
    return Line(name, "fail", f"{detail} (rounding: {bound:.0e})", remedy, kernel, figures=errors)


def merged(found: Sequence[Sequence[Line]]) -> list[Line]:
    """One line per name, of the lines of all ranks: the worst of them, with the ranks that it is of.

    Args:
        found: lines by rank.
    """
    by_name: dict[str, list[tuple[int, Line]]] = {}
    for rank, lines in enumerate(found):
        for line in lines:
            by_name.setdefault(line.name, []).append((rank, line))
    return [_worst(lines) for lines in by_name.values()]


def _worst(lines: list[tuple[int, Line]]) -> Line:
    worst = max((line.status for _, line in lines), key=_ORDER.index)
    ranks = tuple(rank for rank, line in lines if line.status == worst)
    line = next(line for _, line in lines if line.status == worst)
    seconds = max(line.seconds for _, line in lines)
    # The figures of the worst rank: the largest of each error, the smallest of each rate and room.
    figures: dict[str, float] = {}
    for _, other in lines:
        for name, value in other.figures.items():
            better = min if name.endswith(("_per_second", "available_bytes", "free_bytes")) else max
            figures[name] = better(figures[name], value) if name in figures else value
    if len(ranks) == len(lines):
        return dataclasses.replace(line, seconds=seconds, figures=figures)
    return dataclasses.replace(line, seconds=seconds, figures=figures, ranks=ranks)


def _finite(figures: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


@dataclass
class Report:
    """Everything that was found.

    Attributes:
        facts: versions, cards and choices, by name.
        lines: what was looked at, in order.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)

    @property
    def status(self) -> Status:
        return max((line.status for line in self.lines), key=_ORDER.index, default="skipped")

    def write(self, path: Path) -> None:
        """Write ``doctor.json``, whole or not at all."""
        content = {
            "version": _VERSION,
            "status": self.status,
            "facts": self.facts,
            # JSON has no NaN and no infinities.
            "lines": [{**dataclasses.asdict(line), "figures": _finite(line.figures)} for line in self.lines],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())

    def print(self, console: Console) -> None:
        """Print facts, the table, and what to do."""
        for name, value in self.facts.items():
            console.print(f"{name}: {value}", highlight=False, markup=False)
        table = Table(title="doctor")
        for column in ("", "what", "found", "s"):
            table.add_column(column, overflow="fold", justify="right" if column == "s" else "left")
        for line in self.lines:
            table.add_row(line.status, line.name, _found(line), f"{line.seconds:.1f}", style=_STYLES[line.status])
        console.print(table)
        for line in self.lines:
            if line.remedy and line.status in ("slow", "fail"):
                console.print(f"{line.status}: {line.name}: {line.remedy}", highlight=False, markup=False)
        counts = {status: sum(line.status == status for line in self.lines) for status in reversed(_ORDER)}
        console.print(", ".join(f"{count} {status}" for status, count in counts.items() if count), highlight=False)


def _found(line: Line) -> str:
    return f"{line.detail} (rank {ranges(line.ranks)})" if line.ranks else line.detail


def ranges(numbers: Iterable[int]) -> str:
    """Numbers in short: ``0-3, 7``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
