"""Small JSON files of the package's own that are read again: each carries the SHA-256 of its content, so that damage is found.

The key ``sha256`` is taken over the other keys, as JSON with sorted keys. Files without it, as earlier versions wrote them, are
read as they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_longpo.runtime.files import write_atomically
from megatron_longpo.runtime.reading import read_json

_KEY = "sha256"


def write_checked(path: Path, content: Mapping[str, Any], *, indent: int | None = 2) -> None:
    """Write an object with its checksum; the file appears whole or not at all.

    Args:
        path: the file.
        content: the object, without a key ``sha256`` of its own. Text that UTF-8 cannot encode becomes ``?``.
        indent: spaces per level; None: one line.
    """
    # As it will be read: JSON has no whole numbers as keys, and UTF-8 no half surrogate pairs.
    text = json.dumps(content, ensure_ascii=False).encode("utf-8", errors="replace")
    plain = json.loads(text)
    checked = json.dumps({**plain, _KEY: _checksum(plain)}, indent=indent, ensure_ascii=False)
    write_atomically(path, checked.encode() + b"\n")


def read_checked(path: Path) -> dict[str, Any]:
    """The object of a file, without its checksum.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a JSON object, or does not have its checksum.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    if content.pop(_KEY, None) not in (None, _checksum(content)):
        raise ValueError("its checksum differs, so it was changed or damaged")
    return content


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
