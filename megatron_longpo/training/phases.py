"""Where the time of a step goes."""

from __future__ import annotations

import time


class Phases:
    """A clock of the phases of steps: each ends where the next one begins.

    Phases are the host's. On CUDA it waits for the device at the end of ``forward_backward`` and of the step, so that these are
    the device's, too.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._began = self._last = time.monotonic()

    def begin(self) -> None:
        """A step begins. What has passed since the one before it was spent between steps: evaluating, saving, logging."""
        now = time.monotonic()
        self._seconds = {"between_steps": now - self._last}
        self._began = self._last = now

    def end(self, name: str) -> None:
        """A phase ends."""
        now = time.monotonic()
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._last
        self._last = now

    @property
    def step_seconds(self) -> float:
        """Seconds from the beginning of the step to the end of the last phase."""
        return self._last - self._began

    def as_metrics(self) -> dict[str, float]:
        """Seconds of each phase."""
        return {f"seconds/{name}": seconds for name, seconds in self._seconds.items()}
