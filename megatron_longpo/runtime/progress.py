"""How far a long piece of work is: a bar on a terminal, plain lines now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

_LINE_SECONDS = 10.0


def duration(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    hours, rest = divmod(round(max(0.0, seconds)), 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"


class Progress:
    """Rows done of a total, with rates and the time left.

    Args:
        name: of the work.
        total: rows in all, or None where nobody knows.
        done: rows done before, which say nothing about the speed.
        unit: of the rows.
    """

    def __init__(self, name: str, total: int | None, *, done: int = 0, unit: str = "documents") -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.name, self.total, self.done, self.unit = name, total, done, unit
        self._first, self._tokens, self._said = done, 0, -1
        self._began = self._line = time.monotonic()
        console = Console(file=sys.stderr)
        columns = (
            TextColumn(name),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        self._bar: Any = Bar(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task(name, total=total, completed=done, note="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._bar.stop()
        # Not again what the last line said.
        if kind is None and self.done > self._first and self.done != self._said:
            print(self._text(), flush=True)

    def add(self, rows: int, tokens: int = 0) -> None:
        """So many rows more, with so many tokens read or written."""
        self.done += rows
        self._tokens += tokens
        self._bar.update(self._task, completed=self.done, note=self._rates())
        now = time.monotonic()
        if self._bar.disable and now - self._line >= _LINE_SECONDS:
            self._line, self._said = now, self.done
            print(self._text(), flush=True)

    def _rates(self) -> str:
        seconds = max(1e-9, time.monotonic() - self._began)
        text = f"{(self.done - self._first) / seconds:,.2f} {self.unit}/s"
        return text + (f", {self._tokens / seconds:,.0f} tokens/s" if self._tokens else "")

    def _text(self) -> str:
        of = "" if self.total is None else f" of {self.total}"
        text = f"{self.name}: {self.done}{of} {self.unit}, {self._rates()}"
        if self.total is not None and self._first < self.done < self.total:
            seconds = time.monotonic() - self._began
            text += f", {duration(seconds / (self.done - self._first) * (self.total - self.done))} left"
        return text
