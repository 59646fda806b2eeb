"""When a run stops before its last step: at an interval, after some minutes, or when a signal asks it to."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_longpo.config import CheckpointConfig
from megatron_longpo.runtime import platform
from megatron_longpo.runtime.signals import Signals


@dataclass(frozen=True)
class Stop:
    """Why a run stops before its last step.

    Attributes:
        reason: reason as the log says it.
        is_urgent: whether somebody waits for the end, who will not wait long: nothing but a checkpoint comes before it.
    """

    reason: str
    is_urgent: bool = False


class StopCondition:
    """Whether a run is to stop early.

    Args:
        config: exit_interval, exit_duration_in_mins, exit_signal_handler and exit_signal.
        began: value of ``time.monotonic()`` when the program began.
    """

    def __init__(self, config: CheckpointConfig, *, began: float) -> None:
        self._config, self._began = config, began
        self._signals = Signals(config.exit_signal if config.exit_signal_handler else ())

    def open(self) -> None:
        """Note signals from now on."""
        self._signals.catch()

    def close(self) -> None:
        """Leave signals alone again."""
        self._signals.release()

    def check(self, step: int) -> Stop | None:
        """Why to stop after this step, or None; the same on all ranks. Collective."""
        config = self._config
        received, is_over = int(self._signals.received or 0), 0
        if config.exit_duration_in_mins is not None and dist.get_rank() == 0:
            # Clocks differ between ranks; that of rank 0 counts.
            is_over = int(time.monotonic() - self._began > config.exit_duration_in_mins * 60)
        if config.exit_signal_handler or config.exit_duration_in_mins is not None:
            # A signal may have reached some of the ranks only, or come to the others a moment later.
            found = torch.tensor([received, is_over], dtype=torch.int32, device=platform.CURRENT.device)
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
            received, is_over = (int(value) for value in found.tolist())
        if received:
            return Stop(f"on {signal.Signals(received).name}", is_urgent=True)
        if config.exit_interval is not None and step % config.exit_interval == 0:
            return Stop("as requested")
        return Stop("as requested") if is_over else None
