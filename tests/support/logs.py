"""What the package logs."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator

from megatron_longpo.runtime.log import LOGGER


@contextlib.contextmanager
def said() -> Iterator[io.StringIO]:
    """What is logged within this context."""
    handler = logging.StreamHandler(io.StringIO())
    LOGGER.addHandler(handler)
    try:
        yield handler.stream
    finally:
        LOGGER.removeHandler(handler)
