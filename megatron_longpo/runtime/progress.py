"""Progress of long work: a bar with rates and the time left on a terminal, plain lines now and then in a log."""

from __future__ import annotations

import itertools
import sys
import time
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from megatron_longpo.runtime.log import log

_LINE_SECONDS = 10.0
# How often the processes of a shared count exchange it.
_EXCHANGE_SECONDS = 0.5
_UNITS_OF_BYTES = "GB"

_shared_counts = itertools.count()


class OnProgress(Protocol):
    """A function that long work calls with the amount done since the last call, and the amount in all: ``Progress.add``."""

    def __call__(self, amount: int, /, *, total: int) -> object: ...


def ignore_progress(_amount: int, /, *, total: int) -> None:
    """An ``OnProgress`` that shows nothing."""


def duration(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    hours, rest = divmod(round(max(0.0, seconds)), 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"


def _shared_store() -> Any:
    """The store of the process group, or None in a single process."""
    # Counts of one process need no torch, which takes seconds to import.
    from torch import distributed

    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return None
    return distributed.distributed_c10d._get_default_store()


class Progress:
    """Work done out of a total, with rates and the time left::

        with Progress("questions", len(documents)) as progress:
            for batch in batches:
                ...
                progress.add(len(batch), tokens=tokens_of(batch))

    A terminal shows a bar. Elsewhere a line is logged every ten seconds, and one at the end unless the last line said the
    same; work that fails logs no line at the end.

    Args:
        name: name of the work.
        total: amount in all; None while it is unknown.
        done: amount done by an earlier run, which does not count toward the rates.
        unit: what is counted, a plural noun; ``bytes`` are shown in GB.
        active: whether this process reports.
        shared: count the work of all processes of the process group together. All must create their shared ``Progress``
            objects in the same order.
        last_line: whether to log a line at the end; off where the caller logs the result.
    """

    def __init__(
        self,
        name: str,
        total: int | None = None,
        *,
        done: int = 0,
        unit: str = "documents",
        active: bool = True,
        shared: bool = False,
        last_line: bool = True,
    ) -> None:
        self.name, self.total, self.done, self.unit, self.active = name, total, done, unit, active
        self._first, self._tokens, self._last_line = done, 0, last_line
        self._began = self._line = self._exchanged = time.monotonic()
        self._ended: float | None = None
        self._logged = -1
        self._unsent = 0
        self._store = _shared_store() if shared else None
        self._key = "" if self._store is None else f"megatron_longpo/progress/{next(_shared_counts)}"
        console = Console(file=sys.stderr)
        self._has_bar = active and console.is_terminal
        # Lines that are logged meanwhile go above the bar, but stay where standard output is redirected to.
        self._bar = Bar(
            TextColumn(name, markup=False),
            BarColumn(),
            TextColumn("{task.fields[text]}", markup=False),
            console=console,
            disable=not self._has_bar,
            redirect_stdout=sys.stdout.isatty(),
        )
        self._task = self._bar.add_task(name, total=total, completed=done, text="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ended is None and self._unsent:
            self._exchange()
        self.stop()
        if self.active and self._last_line and kind is None and self.done > self._first and self.done != self._logged:
            log(self._line_text())

    def stop(self) -> None:
        """End the bar and the clock: what follows is other work."""
        self._bar.stop()
        if self._ended is None:
            self._ended = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the beginning, or until ``stop``."""
        return (self._ended or time.monotonic()) - self._began

    def add(self, amount: int, tokens: int = 0, *, total: int | None = None) -> None:
        """Count more work as done.

        Args:
            amount: how much, in the unit.
            tokens: tokens read or written for it.
            total: amount in all, where it was unknown before.
        """
        now = time.monotonic()
        self.total = self.total if total is None else total
        self._tokens += tokens
        self._unsent += amount
        if self._key and now - self._exchanged < _EXCHANGE_SECONDS:
            return
        self._exchanged = now
        self._exchange()
        if self._has_bar:
            self._bar.update(self._task, completed=self.done, total=self.total, text=self._text())
        elif self.active and now - self._line >= _LINE_SECONDS and self.done > self._first:
            self._line, self._logged = now, self.done
            log(self._line_text())

    def _exchange(self) -> None:
        if self._store is not None:
            self.done = self._first + self._store.add(self._key, self._unsent)
        else:
            self.done += self._unsent
        self._unsent = 0

    def _line_text(self) -> str:
        return f"{self.name}: {self._text()}"

    def _text(self) -> str:
        of = "" if self.total is None else f" of {self._amount(self.total)}"
        rate = (self.done - self._first) / max(1e-9, self.seconds)
        unit = _UNITS_OF_BYTES if self.unit == "bytes" else self.unit
        parts = [f"{self._amount(self.done)}{of} {unit}"]
        parts.append(f"{rate / 1e9:.2f} GB/s" if self.unit == "bytes" else f"{rate:,.2f} {unit}/s")
        if self._tokens:
            parts.append(f"{self._tokens / max(1e-9, self.seconds):,.0f} tokens/s")
        if self.total is not None and self._first < self.done < self.total:
            parts.append(f"{duration((self.total - self.done) / rate)} left")
        return ", ".join(parts)

    def _amount(self, amount: int) -> str:
        return f"{amount / 1e9:.2f}" if self.unit == "bytes" else str(amount)
