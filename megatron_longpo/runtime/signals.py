"""Signals that ask a program to stop are noted, and acted on where it can stop: between two steps."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from types import FrameType
from typing import Any

# Exit status of a program that was asked to stop, saved what it had done, and goes on when it is run again: EX_TEMPFAIL.
STOPPED = 75


def heed(names: Iterable[str]) -> None:
    """Let signals that the parent left ignored end this process, until they are caught.

    A batch script lets torchrun ignore SIGUSR1, and its processes inherit that: before the first step, when there is nothing to
    save, the signal would be lost, and with it the time that is left.
    """
    for number in (signal.Signals[name] for name in names):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


class Signals:
    """Notes signals between ``catch`` and ``release`` instead of dying of them.

    Args:
        names: names of the signals, such as SIGTERM.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._numbers = [signal.Signals[name] for name in names]
        self._before: dict[int, Any] = {}
        self.received: signal.Signals | None = None

    def catch(self) -> None:
        """Note the signals from now on."""
        for number in self._numbers:
            self._before[number] = signal.signal(number, self._note)

    def release(self) -> None:
        """Give the signals back the effect that they had before."""
        while self._before:
            number, handler = self._before.popitem()
            # None: a handler that was not installed from Python, which cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        # The first one counts: whoever stops a job often sends more than one.
        self.received = self.received or signal.Signals(number)
