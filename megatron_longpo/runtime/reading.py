"""Reads files that others wrote: only regular files, in bounded memory, with one reader of JSON.

A damaged or hostile file must cost no more than a buffer: lines have a largest length and are read piece by piece, compressed
files may grow only so far, and JSON that is nested too deeply is refused in the same words everywhere.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NamedTuple, cast

from megatron_longpo.runtime.files import open_regular
from megatron_longpo.schema import Count, Range

# Nesting of JSON. No format that is read here has more than eight levels; Python's own limit depends on its version.
MAX_JSON_DEPTH = 64
# Bytes of an overlong line that are kept to show it.
_SHOWN_BYTES = 1000
_BLOCK_BYTES = 2**20
# A compressed file may always grow to this size, whatever the factor: a small file of equal rows compresses well.
_FREE_BYTES = 2**28


@dataclass(frozen=True)
class ReadingConfig:
    """How input files are read, and what is too large to be read."""

    follow_symlinks: bool = False
    """Follow symbolic links that lead out of a folder, or out of the folder of a pattern. Off: what they lead to is left out."""
    max_row_bytes: Count = 2**26
    """Largest text file, or row of a table (line of a .jsonl, row of a .parquet or .arrow), in bytes after decompression. Larger
    ones are skipped."""
    max_expansion: Count = 200
    """Largest factor by which a compressed file may grow once it has grown to 256 MiB. Beyond it reading stops with an error."""
    max_json_bytes: Annotated[int, Range(ge=1)] = 2**30
    """Largest file that is read whole (JSON), in bytes after decompression."""


DEFAULT_READING = ReadingConfig()


class TooLarge(ValueError):
    """A file, or what it decompresses to, is larger than a limit."""


class Line(NamedTuple):
    """A line of a file.

    Attributes:
        raw: its bytes with the line feed; only the first ones if it is too long.
        too_long: what is wrong with its length, or None.
    """

    raw: bytes
    too_long: str | None


def read_lines(stream: BinaryIO, limits: ReadingConfig = DEFAULT_READING) -> Iterator[Line]:
    """Lines of a stream. A line above the limit is read past, piece by piece, and only its beginning is given.

    Args:
        stream: binary stream.
        limits: what is too long.
    """
    most = limits.max_row_bytes
    while raw := stream.readline(most + 1):
        if len(raw) <= most or (len(raw) == most + 1 and raw.endswith(b"\n")):
            yield Line(raw, None)
            continue
        size, begin, piece = len(raw), raw[:_SHOWN_BYTES], raw
        del raw
        while piece and not piece.endswith(b"\n"):
            piece = stream.readline(_BLOCK_BYTES)
            size += len(piece)
        yield Line(begin, f"the line has {size} bytes; max_row_bytes is {most}")


@contextlib.contextmanager
def opened(path: Path, limits: ReadingConfig = DEFAULT_READING) -> Iterator[BinaryIO]:
    """Open a file for reading, decompressed by its name (.gz, .zst).

    Args:
        path: a regular file.
        limits: how far a compressed file may grow; reading beyond it raises ``TooLarge``.

    Raises:
        OSError: there is no such file, or it is not a regular file.
    """
    name = path.name.lower()
    with open_regular(path) as raw:
        if not name.endswith((".gz", ".zst")):
            yield raw
            return
        most = max(_FREE_BYTES, limits.max_expansion * path.stat().st_size)
        if name.endswith(".gz"):
            stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw, mode="rb"))
        else:
            # Not before it is needed: commands that only print their help should not wait for it.
            import pyarrow

            stream = cast(BinaryIO, pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd"))
        with stream:
            yield cast(BinaryIO, io.BufferedReader(_Counted(stream, most, limits), _BLOCK_BYTES))


class _Counted(io.RawIOBase):
    """A decompressing stream that ends with an error when it has grown too far."""

    def __init__(self, stream: BinaryIO, most: int, limits: ReadingConfig) -> None:
        self._stream, self._most, self._limits, self._read = stream, most, limits, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._stream.read(min(len(buffer), _BLOCK_BYTES))
        self._read += len(piece)
        if self._read > self._most:
            raise TooLarge(
                f"it decompresses to more than {self._most} bytes, {self._limits.max_expansion} times its size; if it is what "
                "it should be, raise max_expansion"
            )
        buffer[: len(piece)] = piece
        return len(piece)


def check_expansion(metadata: Any, file_bytes: int, limits: ReadingConfig = DEFAULT_READING) -> None:
    """Check how far the row groups of a parquet file grow. A group may be a single page, which is decompressed at once.

    The sizes of single columns are not looked at: pyarrow (26.0.1) aborts the process as it reads them from a damaged file.

    Args:
        metadata: the file's ``pyarrow.parquet.FileMetaData``.
        file_bytes: size of the file.
        limits: how far they may grow.

    Raises:
        TooLarge: a row group declares more.
    """
    most = max(_FREE_BYTES, limits.max_expansion * file_bytes)
    for group in range(metadata.num_row_groups):
        size = metadata.row_group(group).total_byte_size
        if size > most:
            raise TooLarge(
                f"row group {group} decompresses to {size} bytes, more than {limits.max_expansion} times the size of the file; "
                "if it is what it should be, raise max_expansion"
            )


def read_bytes(path: Path, most: int = DEFAULT_READING.max_json_bytes) -> bytes:
    """Content of a file, decompressed by its name.

    Raises:
        OSError: it cannot be read.
        TooLarge: it has more than ``most`` bytes.
    """
    with opened(path) as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise TooLarge(f"it has more than {most} bytes, the limit for a file that is read whole")
    return content


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON, or nested more than ``MAX_JSON_DEPTH`` deep.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    # Few texts have this many brackets, so most are not looked through.
    brackets = text.count(b"[") + text.count(b"{") if isinstance(text, bytes) else text.count("[") + text.count("{")
    if brackets > MAX_JSON_DEPTH and _is_deep(value):
        raise ValueError(_TOO_DEEP)
    return value


_TOO_DEEP = f"is nested more than {MAX_JSON_DEPTH} levels deep"


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_JSON_DEPTH + 1):
        level = [
            child
            for container in level
            for child in (container.values() if isinstance(container, dict) else container)
            if isinstance(child, (dict, list)) and child
        ]
        if not level:
            return False
    return True


def read_json(path: Path, most: int = DEFAULT_READING.max_json_bytes) -> Any:
    """Content of a JSON file in UTF-8; it may be compressed.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON in UTF-8, is too large, or is nested too deeply.
    """
    return parse_json(read_bytes(path, most).decode("utf-8"))
