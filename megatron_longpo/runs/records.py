"""The lines of metrics.jsonl and validation.jsonl: one object per step or evaluation, whose values are numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from megatron_longpo.errors import DataError
from megatron_longpo.runtime.files import open_regular
from megatron_longpo.runtime.json_lines import decode_line
from megatron_longpo.runtime.reading import read_lines

METRICS = "metrics.jsonl"
VALIDATION = "validation.jsonl"
# Larger whole numbers are damage, and no floating-point numbers.
_MOST = 2**63


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the whole lines of a metrics.jsonl; a line that is damaged, or that a killed run left half-written, is skipped."""
    return [line.record for line in read_metric_lines(path).lines]


class MetricsLine(NamedTuple):
    """A line that holds metrics, and its bytes."""

    record: dict[str, Any]
    raw: bytes


class MetricsFile(NamedTuple):
    """The lines that hold metrics, and the number of others."""

    lines: list[MetricsLine]
    skipped: int


def read_metric_lines(path: Path) -> MetricsFile:
    """Read a file of metrics.

    Raises:
        DataError: there is something else than a file.
    """
    lines: list[MetricsLine] = []
    skipped = 0
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: is not a file; move it away, the run writes its metrics there")
    if not path.exists():
        return MetricsFile(lines, skipped)
    with open_regular(path) as stream:
        for line in read_lines(stream):
            try:
                record = decode_line(line.raw)
            except ValueError:
                record = {}
            if type(record.get("step")) is int and _are_figures(record):
                lines.append(MetricsLine(record, line.raw.rstrip(b"\n") + b"\n"))
            else:
                skipped += 1
    return MetricsFile(lines, skipped)


def _are_figures(record: dict[str, Any]) -> bool:
    """Whether all values are numbers. Those by length, of held-out data, have a level of their own."""
    values = [v for name, v in record.items() if name != "by_length"]
    return all(isinstance(v, float) or (type(v) is int and abs(v) < _MOST) for v in values)
