"""Errors that a user can act on: each names the value, the rule it breaks and the fix."""

from __future__ import annotations


class LongPOError(Exception):
    """Base of all errors that the user can fix. Printed without a traceback."""


class ConfigError(LongPOError):
    """A configuration value, or a combination of values, that cannot work."""


class DataError(LongPOError):
    """An input file, indexed binary, manifest or cache that cannot be used."""


class CheckpointError(LongPOError):
    """A checkpoint, on disk or about to be written, that cannot be used."""


class DamagedError(CheckpointError):
    """A checkpoint that is damaged. An older one of the same run may be whole."""


class PlatformError(LongPOError):
    """The machine, or a library on it, cannot do what is asked of it."""


def one_line(message: object, characters: int = 300) -> str:
    """A library's message on one line, shortened, to stand within ours."""
    return " ".join(str(message).split())[:characters]
