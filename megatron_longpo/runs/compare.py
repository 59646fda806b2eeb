"""Compares what two runs have written: the first step and metric that differ, and what else does from then on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_longpo.config import read_yaml
from megatron_longpo.errors import ConfigError, DataError
from megatron_longpo.runs.records import METRICS, VALIDATION, read_metrics

_HELD_OUT = "held-out "
# What two runs with the same numbers still differ in: the clock, the machine's memory.
_OF_THE_MACHINE = frozenset(
    {"tokens_per_second", "step_seconds", "peak_memory_gb", "tflops_per_rank", "mfu", f"{_HELD_OUT}seconds"}
)
_KINDS_OF_THE_MACHINE = ("seconds/", "memory/", "straggler/")


@dataclass(frozen=True)
class Difference:
    """A metric, at the first step at which two runs differ in it.

    Attributes:
        step: that step.
        metric: name of the metric; held-out ones have ``held-out`` before it.
        first: value of the first run.
        other: value of the other run.
    """

    step: int
    metric: str
    first: float
    other: float

    @property
    def relative(self) -> float:
        """Their distance by the larger of the two."""
        if not (math.isfinite(self.first) and math.isfinite(self.other)):
            return math.inf
        return abs(self.first - self.other) / max(abs(self.first), abs(self.other))


@dataclass(frozen=True)
class Comparison:
    """Two runs, compared.

    Attributes:
        steps: steps that both have.
        further: steps that only one of them has: of the first run, of the other.
        metrics: number of metrics that were compared.
        differences: one per metric that differs, in the order of steps, and within a step in the order in which a step
            computes its metrics. The first one is where to look.
        only: metrics that only one of them has, which are not compared: of the first run, of the other.
        settings: settings that differ, by ``section.key``: values of the first run and of the other.
    """

    steps: int
    further: tuple[int, int]
    metrics: int
    differences: tuple[Difference, ...]
    only: tuple[tuple[str, ...], tuple[str, ...]]
    settings: Mapping[str, tuple[Any, Any]]


def compare_runs(first: Path, other: Path, *, tolerance: float = 0.0) -> Comparison:
    """Compare two runs by their metrics.

    Args:
        first, other: output folders.
        tolerance: relative difference up to which two values count as equal.

    Raises:
        DataError: a folder has no metrics, or the runs have no step in common.
    """
    runs = [_by_step(folder) for folder in (first, other)]
    common = sorted(runs[0].keys() & runs[1].keys())
    if not common:
        raise DataError(
            f"{first} has steps {_range(runs[0])} and {other} {_range(runs[1])}, none in common; let the shorter one go on, or "
            "name other runs"
        )
    names = [_names(run.values()) for run in runs]
    shared = [name for name in names[0] if name in names[1]]
    found: dict[str, Difference] = {}
    for step in common:
        records = [run[step] for run in runs]
        for name in shared:
            if name not in found and name in records[0] and name in records[1]:
                values = [float(record[name]) for record in records]
                if not _equal(*values, tolerance=tolerance):
                    found[name] = Difference(step, name, *values)
    return Comparison(
        steps=len([step for step in common if "loss" in runs[0][step]]),
        further=(_further(runs[0], runs[1]), _further(runs[1], runs[0])),
        metrics=len(shared),
        # Sorting keeps the order of a step's metrics.
        differences=tuple(sorted(found.values(), key=lambda difference: difference.step)),
        only=(
            tuple(name for name in names[0] if name not in names[1]),
            tuple(name for name in names[1] if name not in names[0]),
        ),
        settings=_settings(first, other),
    )


def _by_step(folder: Path) -> dict[int, dict[str, Any]]:
    """Step -> its metrics, with those of held-out data among them."""
    records = {record["step"]: record for record in read_metrics(folder / METRICS)}
    if not records:
        raise DataError(
            f"{folder / METRICS}: there is no step in it; name the output folder of a run (--save) that has trained"
        )
    found = {step: _order(record) for step, record in records.items()}
    for record in read_metrics(folder / VALIDATION):
        held_out = {f"{_HELD_OUT}{name}": value for name, value in record.items() if name not in ("step", "by_length")}
        found.setdefault(record["step"], {}).update(held_out)
    return found


def _order(record: Mapping[str, Any]) -> dict[str, Any]:
    """A step's metrics in the order in which they come about: first the samples, at the end the new weights."""
    place = {"fingerprint/batch": 0, "fingerprint/gradients": 2, "grad_norm": 3, "fingerprint/weights": 4}
    names = sorted((name for name in record if name not in ("step", "by_length")), key=lambda name: place.get(name, 1))
    return {name: record[name] for name in names}


def _names(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Metrics that are compared, in the order in which a step computes them."""
    names: dict[str, None] = {}
    for record in records:
        names.update(dict.fromkeys(record))
    plain = [name for name in names if not is_of_the_machine(name)]
    # What is held out is evaluated after the step.
    return sorted(plain, key=lambda name: name.startswith(_HELD_OUT))


def is_of_the_machine(name: str) -> bool:
    """Whether a metric is of the clock or the machine, and so differs between runs that are equal."""
    return name in _OF_THE_MACHINE or name.startswith(_KINDS_OF_THE_MACHINE)


def _equal(first: float, other: float, *, tolerance: float) -> bool:
    if first == other or (math.isnan(first) and math.isnan(other)):
        return True
    return abs(first - other) <= tolerance * max(abs(first), abs(other))


def _further(run: Mapping[int, Mapping[str, Any]], other: Mapping[int, Any]) -> int:
    return len([step for step, record in run.items() if "loss" in record and step not in other])


def _range(steps: Mapping[int, Any]) -> str:
    return f"{min(steps)} to {max(steps)}"


def _settings(first: Path, other: Path) -> dict[str, tuple[Any, Any]]:
    """Settings of run.yaml that differ; none where a run has no readable one."""
    contents = []
    for folder in (first, other):
        try:
            content = read_yaml(folder / "run.yaml")
        except ConfigError:
            return {}
        contents.append(dict(_flat(content)))
    names = list(dict.fromkeys([*contents[0], *contents[1]]))
    values = {name: (contents[0].get(name), contents[1].get(name)) for name in names}
    return {name: pair for name, pair in values.items() if pair[0] != pair[1]}


def _flat(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(content, dict) and content:
        for key, value in content.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, content


def print_comparison(comparison: Comparison, first: str, other: str) -> None:
    """Print where two runs differ first, a table of all metrics that differ, and the settings that do."""
    console = Console(soft_wrap=True, highlight=False)
    for line in describe(comparison, first, other):
        console.print(line, markup=False)
    if comparison.differences:
        table = Table()
        for heading in ("metric", "step", Path(first).name, Path(other).name, "relative"):
            table.add_column(heading, overflow="fold", no_wrap=heading == "metric")
        for found in comparison.differences:
            values = (_value(found.first), _value(found.other), f"{found.relative:.1e}")
            table.add_row(found.metric, str(found.step), *values)
        console.print(table)
        for name, (before, after) in comparison.settings.items():
            console.print(f"{name}: {before} and {after}", markup=False)


def describe(comparison: Comparison, first: str, other: str) -> list[str]:
    """The comparison in sentences."""
    counts = f"{comparison.steps} steps and {comparison.metrics} metrics"
    if comparison.differences:
        at = comparison.differences[0]
        values = f"{_value(at.first)} and {_value(at.other)}"
        lines = [f"{first} and {other} differ first in {at.metric} of step {at.step}: {values}"]
    else:
        lines = [f"{first} and {other} are equal in {counts}"]
    lines += [
        f"{name} has {count} further steps"
        for name, count in zip((first, other), comparison.further, strict=True)
        if count
    ]
    lines += [
        f"only {name} has {', '.join(only)}" for name, only in zip((first, other), comparison.only, strict=True) if only
    ]
    return lines


def _value(value: float) -> str:
    """All digits: two values that differ must not look alike."""
    return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)
