"""Where a run is: a small file that says step and time, for whoever watches the run, restarts it or takes it for dead."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from megatron_longpo.errors import DataError, one_line
from megatron_longpo.runtime.checked_json import read_checked, write_checked
from megatron_longpo.schema import convert_fields

HEARTBEAT_FILE = "heartbeat.json"
# A short step would otherwise write a file per step.
_WRITE_SECONDS = 5.0

State = Literal["starting", "running", "stopped", "failed", "finished"]


@dataclass(frozen=True)
class Status:
    """Content of the file.

    Attributes:
        state: starting, running; stopped: it goes on when it is run again; failed: something must be changed first; finished.
        step: optimizer steps done.
        train_iters: optimizer steps of the whole run.
        time: when this was written, with the time zone.
        host: machine of rank 0, or of the rank that failed.
        pid: its process.
        message: why the run stopped or failed.
        slow: ranks that are slower than others while it runs, and in what.
    """

    state: State
    step: int
    train_iters: int
    time: str
    host: str
    pid: int
    message: str = ""
    slow: str = ""


class StatusFile:
    """Writes OUTPUT/heartbeat.json. A run does not fail because this file cannot be written.

    Args:
        output: the run's folder; None: nothing is written.
        train_iters: optimizer steps of the whole run.
        only_failures: whether this rank writes only why it failed; rank 0 writes the rest.

    Attributes:
        slow: see ``Status``.
    """

    def __init__(self, output: Path | None, *, train_iters: int, only_failures: bool = False) -> None:
        self._output, self._train_iters, self._only_failures = output, train_iters, only_failures
        self._step, self._written = 0, 0.0
        self.slow = ""

    def beat(self, step: int) -> None:
        """Say that a step is done; at most once in some seconds."""
        self._step = step
        if time.monotonic() - self._written >= _WRITE_SECONDS:
            self.write("running", step=step)

    def fail(self, message: str) -> None:
        """Say that the run failed. A run that has said nothing yet may be a second one on another's folder."""
        if self._written:
            self.write("failed", message=message)

    def write(self, state: State, *, step: int | None = None, message: str = "") -> None:
        """Say what the run does now."""
        self._step = self._step if step is None else step
        if self._output is None:
            return
        self._written = time.monotonic()
        if self._only_failures and state != "failed":
            return
        if state == "running" and self._has_failed():
            # Another rank has just said why the run ends; it ends this one, too.
            return
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        slow = self.slow if state == "running" else ""
        status = Status(state, self._step, self._train_iters, now, socket.gethostname(), os.getpid(), message, slow)
        with contextlib.suppress(OSError):
            write_checked(self._output / HEARTBEAT_FILE, asdict(status), indent=None)

    def _has_failed(self) -> bool:
        assert self._output is not None
        try:
            return bool(read_checked(self._output / HEARTBEAT_FILE).get("state") == "failed")
        except (OSError, ValueError):
            return False


def silent_seconds(output: Path) -> float:
    """Seconds since a run wrote its file, by the clock of the file system that both are on: those of two machines may differ.

    Where nothing can be written into the folder, it falls back to this machine's clock.

    Raises:
        DataError: the folder has no such file.
    """
    try:
        written = os.stat(output / HEARTBEAT_FILE).st_mtime
    except OSError as error:
        raise DataError(f"{output / HEARTBEAT_FILE}: cannot be read ({one_line(error)}); run this again") from None
    try:
        with tempfile.TemporaryFile(dir=output) as probe:
            now = os.fstat(probe.fileno()).st_mtime
    except OSError:
        now = time.time()
    return max(0.0, now - written)


def read_status(output: Path) -> Status:
    """Read what a run last said.

    Raises:
        DataError: the folder has no such file, or it cannot be read.
    """
    path = output / HEARTBEAT_FILE
    if not path.is_file():
        raise DataError(
            f"{path}: there is no such file; name the output folder of a run (--save) that has been started"
        )
    try:
        status = Status(**convert_fields(Status, read_checked(path), "", DataError))
        datetime.fromisoformat(status.time)
        return status
    except (OSError, ValueError, TypeError, DataError) as error:
        raise DataError(
            f"{path}: cannot be read ({one_line(error)}); the run writes it again with its next step"
        ) from None
