"""Messages for people: one plain line each on standard output, through the standard logger ``megatron_longpo``.

For programs that collect logs, the lines can be JSON objects instead.

``logging.getLogger("megatron_longpo").setLevel(...)`` makes the package quieter or more talkative.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

LOGGER = logging.getLogger("megatron_longpo")


class _StandardOutput(logging.Handler):
    """Prints to the ``sys.stdout`` of the moment: tests and progress bars replace it.

    Errors are raised, not swallowed as ``logging.StreamHandler`` does: a program whose output nobody reads should end.
    """

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), flush=True)


class _ReportingRanks(logging.Filter):
    """Passes what a reporting rank says; from the other ranks only warnings and errors, or everything at DEBUG."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or getattr(record, "active", True) or LOGGER.level <= logging.DEBUG


class _Json(logging.Formatter):
    """One JSON object per line: time, level, message, and the fields that the message was logged with."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        content = {"time": time, "level": record.levelname.lower(), "message": record.getMessage()}
        return json.dumps({**content, **getattr(record, "fields", {})})


def use_json() -> None:
    """Log JSON objects from now on."""
    for handler in LOGGER.handlers:
        handler.setFormatter(_Json())


def _set_up() -> None:
    handler = _StandardOutput()
    handler.addFilter(_ReportingRanks())
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    # Libraries configure the root logger as they are imported; our lines are printed once, and plainly.
    LOGGER.propagate = False


_set_up()


def log(
    message: str, *, active: bool = True, level: int = logging.INFO, fields: Mapping[str, Any] | None = None
) -> None:
    """Log one line.

    Args:
        message: the line, printed as it is.
        active: whether this rank reports.
        level: level of the standard ``logging`` module.
        fields: what the message says, by name; only JSON has it.
    """
    LOGGER.log(level, "%s", message, extra={"active": active, "fields": fields or {}})
