"""Reads files that others wrote: only regular files, in bounded memory, with one reader of JSON.

A damaged or hostile file must cost no more than a buffer: lines have a largest length and are read piece by piece, compressed
files may grow only so far, and JSON that is nested too deeply is refused in the same words everywhere.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NamedTuple, cast

from megatron_longpo.errors import ConfigError
from megatron_longpo.runtime.files import open_regular
from megatron_longpo.schema import Count, Range

# Nesting of JSON. No format that is read here has more than eight levels; Python's own limit depends on its version.
MAX_JSON_DEPTH = 64
# Python's own limit, which depends on its version, is hardly lower than this.
_DEEPEST = 900
# Bytes of an overlong line that are kept to show it.
_SHOWN_BYTES = 1000
_BLOCK_BYTES = 2**20
# A compressed file may always grow to this size, whatever the factor: a small file of equal rows compresses well.
FREE_BYTES = 2**28


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
    max_json_depth: Annotated[int, Range(ge=8, le=_DEEPEST)] = MAX_JSON_DEPTH
    """Deepest nesting of JSON, in levels. Rows with deeper ones are skipped; of files that are read whole, it is an error."""


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


class WrongFormat(ValueError):
    """A file is not of the format that its name says."""


_SPACE = re.compile(r"\s*")
_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def read_json_rows(stream: BinaryIO, limits: ReadingConfig = DEFAULT_READING) -> Iterator[Line]:
    """Rows of JSON Lines; or of a JSON array or objects over several lines, which are read whole. A byte-order mark is dropped.

    Args:
        stream: binary stream.
        limits: what is too long for a row, or too large to be read whole.

    Raises:
        WrongFormat: the file is in UTF-16, or JSON over several lines that is broken.
        TooLarge: JSON over several lines is too large to be read whole.
    """
    lines = read_lines(stream, limits)
    head: list[Line] = []
    for line in lines:
        if not head:
            if line.raw.startswith(_UTF16_MARKS) and b"\0" in line.raw:
                raise WrongFormat("it is in UTF-16; save it as UTF-8")
            line = line._replace(raw=line.raw.removeprefix(_UTF8_MARK))
        head.append(line)
        if line.raw.strip():
            break
    if not head or not _spans_lines(head[-1]):
        yield from head
        yield from lines
        return
    most = limits.max_json_bytes
    content = b"".join(line.raw for line in head)
    content += stream.read(max(0, most + 1 - len(content)))
    if len(content) > most:
        raise TooLarge(
            f"it is JSON over several lines of more than {most} bytes (max_json_bytes); write one row per line"
        )
    for value in _values(content, limits.max_json_depth):
        raw = json.dumps(value).encode()
        long = f"the row has {len(raw)} bytes; max_row_bytes is {limits.max_row_bytes}"
        yield Line(raw[:_SHOWN_BYTES], long) if len(raw) > limits.max_row_bytes else Line(raw, None)


def _spans_lines(line: Line) -> bool:
    """Whether a file that begins with a line is a JSON array, or objects over several lines, and not JSON Lines."""
    text = line.raw.strip()
    if line.too_long:
        if text.startswith(b"[{"):
            raise WrongFormat(
                f"it is a JSON array on one line ({line.too_long}); write one row per line, or raise the limit"
            )
        return False
    if text == b"{":
        return True
    if not text.startswith(b"["):
        return False
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        # The beginning of an array.
        return text.startswith((b"[{", b"[ {")) or text == b"["
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _values(content: bytes, depth: int) -> Iterator[Any]:
    """Values of an array, or of objects one after the other."""
    try:
        text = content.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise WrongFormat(f"it is not UTF-8 ({error}); save it as UTF-8") from None
    if text.startswith("["):
        try:
            values = parse_json(text, depth)
        except ValueError as error:
            raise WrongFormat(
                f"it begins as a JSON array and is none ({error}); correct it, or write one row per line"
            ) from None
        yield from values
        return
    decoder, place = json.JSONDecoder(), 0
    while place < len(text):
        try:
            _, end = decoder.raw_decode(text, place)
            # Once more, for the limit of nesting.
            value = parse_json(text[place:end], depth)
        except (ValueError, RecursionError) as error:
            raise WrongFormat(
                f"it begins as JSON over several lines and is broken ({error}); correct it, or write one row per line"
            ) from None
        yield value
        space = _SPACE.match(text, end)
        place = space.end() if space else end


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
        most = max(FREE_BYTES, limits.max_expansion * path.stat().st_size)
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
    most = max(FREE_BYTES, limits.max_expansion * file_bytes)
    for group in range(metadata.num_row_groups):
        size = metadata.row_group(group).total_byte_size
        if size > most:
            raise TooLarge(
                f"row group {group} decompresses to {size} bytes, more than {limits.max_expansion} times the size of the file; "
                "if it is what it should be, raise max_expansion"
            )


_OWN_JSON_VARIABLE = "MEGATRON_LONGPO_MAX_JSON_BYTES"


def largest_own_json() -> int:
    """Largest file of the package's own formats that is read whole, in bytes; an environment variable may raise it, since every
    command reads such files.

    Raises:
        ConfigError: the variable is not a number.
    """
    text = os.environ.get(_OWN_JSON_VARIABLE, "")
    if not text:
        return DEFAULT_READING.max_json_bytes
    if not text.isascii() or not text.isdigit() or not int(text):
        raise ConfigError(
            f"{_OWN_JSON_VARIABLE}={text} must be a number of bytes, such as {2**31}; correct or unset it"
        )
    return int(text)


def read_bytes(path: Path, most: int | None = None) -> bytes:
    """Content of a file, decompressed by its name.

    Args:
        path: the file.
        most: largest content in bytes; by default that of the package's own formats.

    Raises:
        OSError: it cannot be read.
        TooLarge: it is larger.
    """
    is_own, most = most is None, largest_own_json() if most is None else most
    with opened(path) as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise TooLarge(
            f"it has more than {most} bytes, the limit for a file that is read whole"
            + (f"; {_OWN_JSON_VARIABLE} may raise it" if is_own else "")
        )
    return content


def parse_json(text: str | bytes, depth: int | None = None) -> Any:
    """The value of a JSON text.

    Args:
        text: the text.
        depth: levels of nesting that an input of the user's may have; by default what the package's own formats may.

    Raises:
        ValueError: it is not JSON, or nested deeper.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(_too_deep(depth)) from None
    most = depth or MAX_JSON_DEPTH
    # Few texts have this many brackets, so most are not looked through.
    brackets = text.count(b"[") + text.count(b"{") if isinstance(text, bytes) else text.count("[") + text.count("{")
    if brackets > most and _is_deep(value, most):
        raise ValueError(_too_deep(depth))
    return value


def _too_deep(depth: int | None) -> str:
    return f"is nested more than {depth or MAX_JSON_DEPTH} levels deep" + ("; see max_json_depth" if depth else "")


def _is_deep(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth + 1):
        level = [
            child
            for container in level
            for child in (container.values() if isinstance(container, dict) else container)
            if isinstance(child, (dict, list)) and child
        ]
        if not level:
            return False
    return True


def read_json(path: Path, most: int | None = None) -> Any:
    """Content of a JSON file in UTF-8; it may be compressed.

    Args:
        path: the file.
        most: largest content in bytes; by default that of the package's own formats.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON in UTF-8, is too large, or is nested too deeply.
    """
    return parse_json(read_bytes(path, most).decode("utf-8"))
