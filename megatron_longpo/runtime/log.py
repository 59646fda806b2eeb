"""Lines for people."""

from __future__ import annotations

import sys


def log(message: str, *, active: bool = True) -> None:
    """One plain line for people, on the rank that reports."""
    if active:
        print(message, flush=True, file=sys.stdout)
