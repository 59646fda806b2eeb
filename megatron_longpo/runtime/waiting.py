"""Seconds that a rank spends in collectives, so that its own work can be told from waiting for others.

Ranks that exchange end each exchange together, so all of them take the same time for a step, and the slow one waits least. What
names it is its own work: the time between the exchanges. All of torch's collectives go through methods of ProcessGroup and
end in Work.wait, in whichever library they are called, so that these are timed: on the host with gloo, which blocks it, and with
events on CUDA, where only the main stream's waiting counts, since an exchange on another stream runs beside the work.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from megatron_longpo.runtime import platform

_METHODS = (
    *("allreduce", "allreduce_coalesced", "allgather", "allgather_coalesced", "_allgather_base"),
    *("allgather_into_tensor_coalesced", "reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced"),
    *("broadcast", "reduce", "gather", "scatter", "alltoall", "alltoall_base", "send", "recv", "barrier"),
    *("_start_coalescing", "_end_coalescing"),
)


class Waits:
    """Times what this process waits for others, from ``open`` to ``close``, wherever ``resume`` was called and ``pause`` was not.

    One at a time: it replaces methods of torch's classes.
    """

    def __init__(self) -> None:
        self._marks: list[tuple[Any, Any]] = []
        self._is_inside, self._is_paused = False, True
        self._originals: list[tuple[type, str, Any]] = []

    def open(self) -> None:
        """Take the collectives over; they are timed after ``resume``."""
        for owner, names in ((dist.ProcessGroup, _METHODS), (dist.Work, ("wait",))):
            for name in names:
                if name in vars(owner):
                    # What the class holds, not what it gives: pybind11's functions would no longer be methods.
                    self._originals.append((owner, name, vars(owner)[name]))
                    setattr(owner, name, self._timed(getattr(owner, name)))

    def resume(self) -> None:
        """Time collectives from now on; what was waited before is forgotten."""
        self._is_paused, self._marks = False, []

    def pause(self) -> None:
        """Time no collectives until ``resume``: what nobody takes would pile up, on CUDA two events per collective."""
        self._is_paused, self._marks = True, []

    def close(self) -> None:
        """Leave the collectives alone again."""
        while self._originals:
            owner, name, original = self._originals.pop()
            setattr(owner, name, original)

    def _timed(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._is_inside or self._is_paused:
                return original(*args, **kwargs)
            began = platform.CURRENT.mark()
            self._is_inside = True
            try:
                return original(*args, **kwargs)
            finally:
                self._is_inside = False
                if began is not None:
                    self._marks.append((began, platform.CURRENT.mark()))

        return timed

    def take(self) -> list[tuple[Any, Any]]:
        """What was waited since the last call, for ``platform.CURRENT.seconds_between`` once the device has come so far."""
        taken, self._marks = self._marks, []
        return taken
