"""Reads Arrow files; how far compressed buffers grow is known before any of them is decompressed.

A record batch is decompressed as a whole when it is read, and pyarrow has no limit. Each compressed buffer begins with its length
after decompression, and where the buffers are stands in the batch's metadata, a flatbuffer whose layout is fixed by Arrow's
format (Message.fbs).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from megatron_longpo.runtime.reading import DEFAULT_READING, FREE_BYTES, ReadingConfig, TooLarge

_MAGIC = b"ARROW1"
# The stream within a file of the random-access format begins after the magic and its padding.
_STREAM_START = 8
# Numbers of fields in Message, RecordBatch and DictionaryBatch.
_HEADER, _BUFFERS, _COMPRESSION, _DATA = 2, 2, 3, 1
_BUFFER = struct.Struct("<qq")


def read_batches(source: Any, file_bytes: int, limits: ReadingConfig = DEFAULT_READING) -> Iterator[Any]:
    """Record batches of an Arrow file, of the streaming or the random-access format.

    Args:
        source: ``pyarrow.NativeFile`` at its beginning.
        file_bytes: size of the file.
        limits: how far compressed buffers may grow.

    Raises:
        TooLarge: the buffers of a batch grow too far.
        ValueError, pyarrow.ArrowException: the file is damaged.
    """
    # Not before it is needed: commands that only print their help should not wait for it.
    import pyarrow

    # The footer of the random-access format is not read: it could name other batches than those that were looked at.
    start = _STREAM_START if source.read(len(_MAGIC)) == _MAGIC else 0
    check_batches(source, file_bytes, limits)
    source.seek(start)
    yield from pyarrow.ipc.open_stream(source)


def check_batches(source: Any, file_bytes: int, limits: ReadingConfig = DEFAULT_READING) -> None:
    """Check how far the compressed buffers of an Arrow file grow.

    Args:
        source: ``pyarrow.NativeFile``.
        file_bytes: size of the file.
        limits: how far compressed buffers may grow.

    Raises:
        TooLarge: the buffers of a batch grow too far.
        ValueError, pyarrow.ArrowException: the file is damaged.
    """
    import pyarrow

    source.seek(0)
    source.seek(_STREAM_START if source.read(len(_MAGIC)) == _MAGIC else 0)
    most = max(FREE_BYTES, limits.max_expansion * file_bytes)
    for number, message in enumerate(pyarrow.ipc.MessageReader.open_stream(source)):
        size = _decompressed_bytes(message)
        if size > most:
            raise TooLarge(
                f"batch {number} decompresses to {size} bytes, more than {limits.max_expansion} times the size of the file; "
                "if it is what it should be, raise max_expansion"
            )


def _decompressed_bytes(message: Any) -> int:
    """Bytes that the compressed buffers of a message take once they are decompressed."""
    if message.type not in ("record batch", "dictionary") or message.body is None:
        return 0
    metadata, body = memoryview(message.metadata), memoryview(message.body)
    try:
        (root,) = struct.unpack_from("<I", metadata)
        batch = _table(metadata, _field(metadata, root, _HEADER))
        if message.type == "dictionary":
            batch = _table(metadata, _field(metadata, batch, _DATA))
        if not _field(metadata, batch, _COMPRESSION):
            return 0
        buffers = _table(metadata, _field(metadata, batch, _BUFFERS))
        (count,) = struct.unpack_from("<I", metadata, buffers)
        total = 0
        for index in range(count):
            place, length = _BUFFER.unpack_from(metadata, buffers + 4 + index * _BUFFER.size)
            if length >= 8:
                # -1: this buffer is stored as it is.
                total += max(0, struct.unpack_from("<q", body, place)[0])
        return total
    except struct.error as error:
        raise ValueError(f"its metadata are damaged: {error}") from None


def _field(metadata: memoryview, table: int, number: int) -> int:
    """Place of a field of a table in a flatbuffer; 0 if the table lacks it."""
    (back,) = struct.unpack_from("<i", metadata, table)
    vtable = table - back
    if vtable < 0:
        raise ValueError("its metadata are damaged: a table outside of them")
    (size,) = struct.unpack_from("<H", metadata, vtable)
    place = 4 + 2 * number
    offset = struct.unpack_from("<H", metadata, vtable + place)[0] if place + 2 <= size else 0
    return table + offset if offset else 0


def _table(metadata: memoryview, field: int) -> int:
    """Place of the table or vector that a field refers to."""
    if not field:
        raise ValueError("its metadata are damaged: a batch without buffers")
    return int(field + struct.unpack_from("<I", metadata, field)[0])
