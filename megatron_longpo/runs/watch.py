"""Shows a run on the terminal, from what it has written into its folder: on the machine itself, over ssh, or after it ended."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_longpo.config import read_yaml
from megatron_longpo.errors import ConfigError, DataError
from megatron_longpo.runs.records import METRICS, VALIDATION, read_metrics
from megatron_longpo.runtime.progress import duration
from megatron_longpo.runtime.status import HEARTBEAT_FILE, Status, read_status, silent_seconds

_BLOCKS = "▁▂▃▄▅▆▇█"
_CURVE = 24
_EVENTS = 6
# Steps that the present speed is the mean of.
_RECENT = 20
# Metric, its format, and whether it is a curve of held-out data.
_SHOWN = (
    ("loss", ".4f"),
    ("nll", ".4f"),
    ("preference", ".4f"),
    ("rewards/margins", "+.4f"),
    ("rewards/accuracies", ".2f"),
    ("grad_norm", ".3f"),
    ("lr", ".2e"),
    ("tokens_per_second", ",.0f"),
    ("tflops_per_rank", ",.4g"),
    ("mfu", ".1%"),
    ("peak_memory_gb", ".2f"),
)


@dataclass(frozen=True)
class Event:
    """Something that happened in a run.

    Attributes:
        time: seconds since the epoch.
        text: what.
    """

    time: float
    text: str


@dataclass(frozen=True)
class View:
    """What a run has written so far.

    Attributes:
        folder: its output folder.
        records: metrics of its steps.
        validations: metrics of its held-out data.
        status: what it last said of itself; None: a run of an earlier version says nothing.
        silent_seconds: seconds since it said that.
        train_iters: steps of the whole run, or None if they are not known.
        events: last events, oldest first.
    """

    folder: Path
    records: Sequence[dict[str, Any]]
    validations: Sequence[dict[str, Any]]
    status: Status | None
    silent_seconds: float
    train_iters: int | None
    events: Sequence[Event]

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self.records[-1]["step"]) if self.records else 0

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will come."""
        if self.status is not None and self.status.state in ("finished", "failed", "stopped"):
            return True
        return self.train_iters is not None and self.step >= self.train_iters


def watch_run(folder: Path, *, once: bool, interval: float, console: Console | None = None) -> None:
    """Show a run until it ends.

    Args:
        folder: output folder of the run.
        once: show it once and stop.
        interval: seconds between two looks at the folder.
        console: where to show it; by default standard output.

    Raises:
        DataError: the folder is not that of a run.
    """
    console = console or Console()
    view = look(folder)
    if once or view.has_ended or not console.is_terminal:
        console.print(render(view))
        return
    with Live(render(view), console=console, screen=False, auto_refresh=False) as live:
        while not view.has_ended:
            time.sleep(interval)
            view = look(folder)
            live.update(render(view), refresh=True)


def look(folder: Path) -> View:
    """Read what a run has written.

    Raises:
        DataError: the folder is not that of a run.
    """
    if not any((folder / name).exists() for name in (METRICS, HEARTBEAT_FILE)):
        raise DataError(f"{folder}: holds no {METRICS}; name the output folder of a run (--save)")
    status = read_status(folder) if (folder / HEARTBEAT_FILE).exists() else None
    return View(
        folder=folder,
        records=read_metrics(folder / METRICS),
        validations=read_metrics(folder / VALIDATION),
        status=status,
        silent_seconds=0.0 if status is None else silent_seconds(folder),
        train_iters=_configured_iters(folder) if status is None else status.train_iters,
        events=sorted(_events(folder), key=lambda event: event.time)[-_EVENTS:],
    )


def _configured_iters(folder: Path) -> int | None:
    try:
        found = read_yaml(folder / "run.yaml")["training"]["train_iters"]
    except (ConfigError, KeyError, TypeError):
        return None
    return found if isinstance(found, int) else None


def _events(folder: Path) -> list[Event]:
    """Files that a run leaves when something happens, by their times."""
    kinds = (
        ("iter_*", "checkpoint {}"),
        ("damaged_iter_*", "{} is damaged, and was passed over"),
        ("hf_*", "exported {}"),
        ("best.json", "a new best checkpoint"),
        ("traceback_rank_*.txt", "a rank failed: {}"),
        (VALIDATION, "held-out data evaluated"),
    )
    found = []
    for pattern, text in kinds:
        for path in folder.glob(pattern):
            try:
                found.append(Event(path.stat().st_mtime, text.format(path.name)))
            except OSError:
                continue  # removed in between
    return found


def render(view: View) -> RenderableType:
    """A run as the terminal shows it."""
    parts: list[RenderableType] = [_headline(view)]
    if view.train_iters:
        bar = Table.grid()
        bar.add_row(ProgressBar(total=view.train_iters, completed=view.step, width=60))
        parts.append(bar)
    if view.status is not None and view.status.slow and not view.has_ended:
        parts.append(Text(view.status.slow, style="yellow"))
    if view.records:
        parts.append(_speed(view))
        table = Table()
        for heading in ("metric", "now", f"last {_RECENT}", "curve", "held out"):
            table.add_column(heading, no_wrap=True)
        for name, form in _SHOWN:
            values = [record[name] for record in view.records if name in record]
            if values:
                recent = values[-_RECENT:]
                held_out = [format(r[name], form) for r in view.validations if name in r]
                numbers = (values[-1], sum(recent) / len(recent))
                table.add_row(
                    name,
                    *(format(number, form) for number in numbers),
                    curve(values),
                    " to ".join(dict.fromkeys([*held_out[:1], *held_out[-1:]])),
                )
        parts.append(table)
    for event in view.events:
        parts.append(Text(f"{datetime.fromtimestamp(event.time):%Y-%m-%d %H:%M:%S}  {event.text}"))
    return Group(*parts)


def _headline(view: View) -> Text:
    of = f" of {view.train_iters}" if view.train_iters else ""
    words = [f"{view.folder}: step {view.step}{of}"]
    if view.status is not None:
        words.append(f"{view.status.state} on {view.status.host}")
        if not view.has_ended:
            words.append(f"last sign of life {duration(view.silent_seconds)} ago")
        if view.status.message:
            words.append(view.status.message)
    elif view.has_ended:
        words.append("finished")
    return Text(", ".join(words), style="bold")


def _speed(view: View) -> Text:
    recent = view.records[-_RECENT:]
    seconds = sum(record.get("step_seconds", 0.0) for record in recent) / len(recent)
    if not seconds:
        return Text("")
    words = [
        f"{seconds:.2f} s per step",
        f"{sum(r.get('tokens', 0) for r in recent) / len(recent) / seconds:,.0f} tokens/s",
    ]
    if view.train_iters and not view.has_ended:
        words.append(f"{duration(seconds * (view.train_iters - view.step))} left")
    return Text(", ".join(words))


def curve(values: Sequence[float], width: int = _CURVE) -> str:
    """A line of block characters: the mean of each of ``width`` stretches, between the smallest and the largest of them."""
    count = min(width, len(values))
    means = []
    for index in range(count):
        part = values[index * len(values) // count : (index + 1) * len(values) // count]
        means.append(sum(part) / len(part))
    finite = [mean for mean in means if math.isfinite(mean)]
    if not finite:
        return " " * count
    low, high = min(finite), max(finite)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((mean - low) * scale)] if math.isfinite(mean) else " " for mean in means)
