"""Errors that a user can act on: each names the value, the rule it breaks and the fix."""

from __future__ import annotations

import unicodedata

# Characters of a message at its beginning and at its end, where the fix stands, if it is shortened.
_HEAD_CHARACTERS, _TAIL_CHARACTERS = 1400, 400


class LongPOError(Exception):
    """Base of all errors that the user can fix. Printed without a traceback, on one line.

    Args:
        message: value, rule and fix. Values come from files of others, so control characters are escaped and long ones are cut.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(message))


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


def printable(message: object) -> str:
    """A message on one line of bounded length: a text from a file could otherwise forge lines or move a terminal's cursor."""
    text = str(message)
    if len(text) > _HEAD_CHARACTERS + _TAIL_CHARACTERS:
        left_out = len(text) - _HEAD_CHARACTERS - _TAIL_CHARACTERS
        text = f"{text[:_HEAD_CHARACTERS]} ... ({left_out} characters) ... {text[-_TAIL_CHARACTERS:]}"
    if text.isprintable():
        return text
    # Controls, directions of writing, halves of pairs; separators of lines and paragraphs.
    return "".join(
        ascii(c)[1:-1] if (kind := unicodedata.category(c))[0] == "C" or kind in ("Zl", "Zp") else c for c in text
    )


def one_line(message: object, characters: int = 300) -> str:
    """A library's message on one line, shortened, to stand within ours."""
    return " ".join(str(message).split())[:characters]
