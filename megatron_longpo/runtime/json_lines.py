"""Files of JSON lines that are read again: each line carries the CRC-32 of its content, so that damage is found.

A line is a JSON object whose last key is ``crc32``, eight hexadecimal digits over the line as it would be without that key. Lines
without it, as version 0.1.0 wrote them, are read as they are.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from typing import Any

from megatron_longpo.runtime.reading import ReadingConfig, parse_json

# A document, with what JSON has to escape in it.
OWN_LINES = ReadingConfig(max_row_bytes=2**29)
_CHECKSUM = re.compile(rb', "crc32": "([0-9a-f]{8})"\}\r?\n?$')


def encode_line(row: Mapping[str, Any]) -> bytes:
    """A line with its checksum and a line feed.

    Args:
        row: at least one key. Text that UTF-8 cannot encode (half a surrogate pair) becomes ``?``.
    """
    raw = json.dumps(row, ensure_ascii=False).encode("utf-8", errors="replace")
    return raw[:-1] + f', "crc32": "{zlib.crc32(raw):08x}"}}\n'.encode()


def decode_line(raw: bytes) -> dict[str, Any]:
    """The object of a line, without its checksum.

    Raises:
        ValueError: it is not a JSON object, or does not have its checksum.
    """
    found = _CHECKSUM.search(raw[-64:])
    if found:
        raw = raw[: len(raw) - len(raw[-64:]) + found.start()] + b"}"
        if zlib.crc32(raw) != int(found[1], 16):
            raise ValueError("its checksum differs")
    row = parse_json(raw.decode("utf-8"))
    if not isinstance(row, dict):
        raise ValueError("not an object")
    return row
