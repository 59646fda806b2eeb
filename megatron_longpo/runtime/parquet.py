"""How far the pages of a parquet file grow, known before any of them is decompressed.

pyarrow decompresses a page as a whole, into as many bytes as the page's header says, up to 2 GiB. What the file's footer says of
a row group may be less than that, so the headers of all pages are looked at. Both are structs of Thrift's compact protocol; which
field has which number is fixed by parquet's format (parquet.thrift).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_longpo.runtime.files import open_regular
from megatron_longpo.runtime.reading import DEFAULT_READING, FREE_BYTES, ReadingConfig, TooLarge, WrongFormat

_MAGIC = b"PAR1"
_TAIL = struct.Struct("<I4s")
# Thrift's types in the compact protocol.
_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT, _UUID = 1, 2, 3, 7, 8, 9, 10, 11, 12, 13
_INTEGERS = (4, 5, 6)
_FIXED_BYTES = {_BYTE: 1, _DOUBLE: 8, _UUID: 16}
_DEEPEST = 32
# A footer may always have this size. It is read in Python, a megabyte or two per second.
_FREE_FOOTER_BYTES = 2**26
# pyarrow's own limits.
_MOST_ELEMENTS = 10**6
_MOST_PAGE_HEADER_BYTES = 2**24
# Field numbers: FileMetaData.row_groups, RowGroup.columns, ColumnChunk.meta_data.
_ROW_GROUPS, _COLUMNS, _META_DATA = 4, 1, 3
# ColumnMetaData: num_values, total_compressed_size, data_page_offset, dictionary_page_offset.
_NUM_VALUES, _COMPRESSED, _DATA_PAGE, _DICTIONARY_PAGE = 5, 7, 9, 11
# PageHeader: uncompressed_page_size, compressed_page_size, data_page_header, data_page_header_v2; of both of these, num_values.
_PAGE_UNCOMPRESSED, _PAGE_COMPRESSED, _DATA_HEADER, _DATA_HEADER_V2, _PAGE_VALUES = 2, 3, 5, 8, 1


def check_pages(path: Path, limits: ReadingConfig = DEFAULT_READING) -> None:
    """Check how far the pages of each row group grow.

    Args:
        path: a parquet file.
        limits: how far they may grow.

    Raises:
        OSError: it cannot be read.
        TooLarge: the pages of a row group grow too far.
        WrongFormat: the file is damaged.
    """
    with open_regular(path) as stream:
        size = path.stat().st_size
        most = max(FREE_BYTES, limits.max_expansion * size)
        if size < 2 * _TAIL.size:
            raise _damaged("too short for one")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for number, group in enumerate(_row_groups(content, size, limits)):
                total = sum(_page_bytes(content, size, column, most) for column in _items(group.get(_COLUMNS)))
                if total > most:
                    raise TooLarge(
                        f"the pages of row group {number} decompress to more than {most} bytes, {limits.max_expansion} times the "
                        "size of the file; if it is what it should be, raise max_expansion"
                    )


def _row_groups(content: mmap.mmap, size: int, limits: ReadingConfig) -> Iterator[dict[int, Any]]:
    length, magic = _TAIL.unpack_from(content, size - _TAIL.size)
    if magic != _MAGIC or length > size - _TAIL.size:
        raise _damaged("no footer")
    most = max(_FREE_FOOTER_BYTES, limits.max_row_bytes)
    if length > most:
        raise TooLarge(f"its footer has {length} bytes, more than {most}; raise max_row_bytes")
    footer = _Reader(content, size - _TAIL.size - length, size - _TAIL.size).struct()
    yield from _items(footer.get(_ROW_GROUPS))


def _page_bytes(content: mmap.mmap, size: int, column: dict[int, Any], most: int) -> int:
    """Bytes that the pages of a column chunk decompress to; above ``most`` it is not counted on."""
    meta = column.get(_META_DATA)
    if not isinstance(meta, dict):
        return 0
    starts = [value for key in (_DATA_PAGE, _DICTIONARY_PAGE) if (value := _number(meta, key)) > 0]
    place = min(starts, default=0)
    end = min(size, place + _number(meta, _COMPRESSED))
    left, total = _number(meta, _NUM_VALUES), 0
    while place < end and left > 0 and total <= most:
        reader = _Reader(content, place, min(size, place + _MOST_PAGE_HEADER_BYTES))
        header = reader.struct()
        total += _number(header, _PAGE_UNCOMPRESSED)
        for key in (_DATA_HEADER, _DATA_HEADER_V2):
            if isinstance(header.get(key), dict):
                left -= _number(header[key], _PAGE_VALUES)
        place = reader.place + _number(header, _PAGE_COMPRESSED)
    return total


def _damaged(reason: str) -> WrongFormat:
    return WrongFormat(f"it is not a whole parquet file ({reason}); give a whole one")


def _items(value: Any) -> list[dict[int, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _number(fields: dict[int, Any], key: int) -> int:
    """A field that counts something; 0 if it is missing."""
    value = fields.get(key, 0)
    if type(value) is not int or value < 0:
        raise _damaged("a size is negative or none")
    return value


class _Reader:
    """Reads structs of Thrift's compact protocol.

    Args:
        content: the file.
        place: where to begin.
        end: where to stop.

    Attributes:
        place: where the next byte is read.
    """

    def __init__(self, content: mmap.mmap, place: int, end: int) -> None:
        self._content, self.place, self._end = content, place, end

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Fields of a struct, by number. Texts and the like are left out."""
        fields: dict[int, Any] = {}
        number = 0
        while kind := self._byte():
            number = number + (kind >> 4) if kind >> 4 else self._signed()
            fields[number] = self._value(kind & 15, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if depth > _DEEPEST:
            raise _damaged("metadata nested too deeply")
        if kind in (_TRUE, _FALSE):
            return kind == _TRUE
        if kind in _INTEGERS:
            return self._signed()
        if kind in _FIXED_BYTES:
            return self._skip(_FIXED_BYTES[kind])
        if kind == _BINARY:
            return self._skip(self._unsigned())
        if kind in (_LIST, _SET):
            return self._list(depth)
        if kind == _MAP:
            return self._map(depth)
        if kind == _STRUCT:
            return self.struct(depth + 1)
        raise _damaged(f"metadata of type {kind}")

    def _list(self, depth: int) -> list[Any]:
        head = self._byte()
        count = self._unsigned() if head >> 4 == 15 else head >> 4
        return [self._element(head & 15, depth) for _ in range(self._counted(count))]

    def _map(self, depth: int) -> None:
        count = self._counted(self._unsigned())
        kinds = self._byte() if count else 0
        for _ in range(count):
            self._element(kinds >> 4, depth)
            self._element(kinds & 15, depth)

    def _element(self, kind: int, depth: int) -> Any:
        # In a container a truth value has a byte of its own, in a struct it is the type.
        return self._skip(1) if kind in (_TRUE, _FALSE) else self._value(kind, depth + 1)

    def _counted(self, count: int) -> int:
        """Every element has at least a byte."""
        if count > min(self._end - self.place, _MOST_ELEMENTS):
            raise _damaged("a list longer than the metadata")
        return count

    def _byte(self) -> int:
        if not 0 <= self.place < self._end:
            raise _damaged("metadata that end too early")
        self.place += 1
        return self._content[self.place - 1]

    def _unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise _damaged("a number that is too long")

    def _signed(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)

    def _skip(self, count: int) -> None:
        self.place += count
        if self.place > self._end:
            raise _damaged("metadata that end too early")
