"""Where the time of a step goes."""

from __future__ import annotations

import time
from typing import Any

from megatron_longpo.runtime import platform
from megatron_longpo.runtime.waiting import Waits


class Phases:
    """A clock of the phases of steps: each ends where the next one begins.

    Phases are the host's. On CUDA it waits for the device at the end of ``forward_backward`` and of the step, so that these are
    the device's, too.

    Args:
        waits: times what this rank waits for others, for ``own_seconds``; None: nothing does.
    """

    def __init__(self, waits: Waits | None = None) -> None:
        self._seconds: dict[str, float] = {}
        self._waits = waits
        self._waited: dict[str, list[tuple[Any, Any]]] = {}
        self._began = self._last = time.monotonic()

    def begin(self) -> None:
        """A step begins. What has passed since the one before it was spent between steps: evaluating, saving, logging."""
        now = time.monotonic()
        self._seconds = {"between_steps": now - self._last}
        self._began = self._last = now
        if self._waits is not None:
            self._waits.resume()
            self._waited = {}

    def end_step(self) -> None:
        """The step is over, and its last phase has ended: what is waited until the next one begins belongs to none."""
        if self._waits is not None:
            self._waits.pause()

    def end(self, name: str) -> None:
        """A phase ends."""
        now = time.monotonic()
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._last
        self._last = now
        if self._waits is not None:
            self._waited.setdefault(name, []).extend(self._waits.take())

    @property
    def step_seconds(self) -> float:
        """Seconds from the beginning of the step to the end of the last phase."""
        return self._last - self._began

    def as_metrics(self) -> dict[str, float]:
        """Seconds of each phase."""
        return {f"seconds/{name}": seconds for name, seconds in self._seconds.items()}

    def own_seconds(self) -> dict[str, float]:
        """Seconds of each phase of the step in which this rank did not wait for others. The device must have come to its end."""
        return {
            name: max(0.0, self._seconds[name] - platform.CURRENT.seconds_between(marks))
            for name, marks in self._waited.items()
        }
