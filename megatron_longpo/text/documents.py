"""Finds documents and reads them as a stream: files, tables, encodings, domains."""

from __future__ import annotations

import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, cast, get_args

import pyarrow
import pyarrow.parquet

from megatron_longpo.errors import DataError

Domain = Literal["book", "arxiv", "code", "other"]
DOMAINS: tuple[Domain, ...] = get_args(Domain)

_TEXT = (".txt", ".md", ".tex")
_TABLES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
# fmt: off
_CODE = (
    ".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".java", ".js", ".jsx", ".ts", ".tsx", ".go", ".rs", ".rb", ".php",
    ".cs", ".scala", ".kt", ".swift", ".jl", ".lua", ".pl", ".r", ".sh", ".sql", ".hs", ".ml",
)
# fmt: on
# A document with a larger share of bytes that are not UTF-8 is not text.
MOST_BROKEN = 0.01
_PARQUET_ROWS = 64
_STREAM_BUFFER_BYTES = 2**20


@dataclass(frozen=True)
class RawDocument:
    """A document as found.

    Attributes:
        number: number over all input, from 0.
        name: file name, followed by the row in a table.
        domain: decides how the document is cut.
        text: decoded text without NUL; U+FFFD stands for bytes that are not UTF-8.
        broken: number of such bytes.
        error: why there is no text, or None.
    """

    number: int
    name: str
    domain: Domain
    text: str
    broken: int = 0
    error: str | None = None


# --------------------------------------------------------------------------------------------------
# Finding and reading
# --------------------------------------------------------------------------------------------------


def find_files(documents: Sequence[str], domain: str) -> list[tuple[Path, Domain]]:
    """Find files in order, each once, with the domain of its documents.

    Args:
        documents: files, folders or globs.
        domain: a domain for all files, or ``auto``: by a folder named like a domain, else by the file name's ending.

    Raises:
        DataError: there is no such file, or one of an unknown kind.
    """
    found: dict[Path, Domain] = {}
    for name in documents:
        if not name.strip():
            raise DataError("--documents '': is empty (an unset variable?); name files, folders or globs")
        path = Path(name)
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
            files = [p for p in files if _is_read(p, domain)]
        elif path.is_file():
            if not _is_read(path, "code"):
                raise DataError(
                    f"--documents {path}: is of an unknown kind; use {', '.join((*_TEXT, *_TABLES))} or source code"
                )
            files = [path]
        else:
            files = sorted(Path(p) for p in glob.glob(name, recursive=True))
            files = [p for p in files if p.is_file() and _is_read(p, "code")]
            if not files:
                raise DataError(f"--documents {name}: no such file or folder, and no file matches it; check the path")
        for file in files:
            found.setdefault(file, _domain_of(file, domain))
    if not found:
        raise DataError(
            f"--documents {' '.join(documents)}: no file of a known kind; use {', '.join((*_TEXT, *_TABLES))}, or source code "
            "with --domain code or in a folder named code"
        )
    return list(found.items())


def _is_read(path: Path, domain: str) -> bool:
    name = path.name.lower()
    is_code = name.endswith(_CODE) and (domain == "code" or (domain == "auto" and "code" in map(str.lower, path.parts)))
    return name.endswith((*_TEXT, *_TABLES)) or is_code


def _domain_of(path: Path, domain: str) -> Domain:
    if domain in DOMAINS:
        return domain
    for folder in reversed(path.parts[:-1]):
        for known in DOMAINS:
            if folder.lower() in (known, known + "s"):
                return known
    name = path.name.lower()
    return "arxiv" if name.endswith(".tex") else "code" if name.endswith(_CODE) else "other"


def read_documents(files: Sequence[tuple[Path, Domain]], text_column: str) -> Iterator[RawDocument]:
    """Read the documents of all files, in order; each row of a table is a document.

    Args:
        files: files with their domains (``find_files``).
        text_column: column of the text in tables.

    Raises:
        DataError: a file cannot be read, or a table lacks the column.
    """
    number = 0
    for path, domain in files:
        for name, value, error in _values_of(path, text_column):
            text, broken = _decoded(value)
            yield RawDocument(number=number, name=name, domain=domain, text=text, broken=broken, error=error)
            number += 1


def _values_of(path: Path, column: str) -> Iterator[tuple[str, bytes, str | None]]:
    """Name, raw text and error of each document of a file."""
    name = path.name.lower()
    try:
        if name.endswith(".parquet"):
            yield from _rows_of_parquet(path, column)
        elif name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
            yield from _rows_of_jsonl(path, column)
        else:
            yield path.name, path.read_bytes(), None
    except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
        raise DataError(f"--documents {path}: cannot be read ({error}); give a whole file") from None


def _rows_of_jsonl(path: Path, column: str) -> Iterator[tuple[str, bytes, str | None]]:
    with _opened(path) as stream:
        for line, raw in enumerate(stream, 1):
            name = f"{path.name}:{line}"
            if line == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            try:
                row = json.loads(raw.decode("utf-8", errors="surrogateescape"))
            except (ValueError, RecursionError):
                yield name, b"", "not_json"
                continue
            value = row.get(column) if isinstance(row, dict) else None
            if not isinstance(value, str):
                yield name, b"", "no_text_column"
                continue
            yield name, _raw(value), None


def _raw(text: str) -> bytes:
    """A text of a JSON line as bytes: those that were not UTF-8 as they were, surrogates written as escapes replaced."""
    try:
        return text.encode("utf-8", errors="surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", errors="replace")


def _opened(path: Path) -> BinaryIO:
    if path.name.lower().endswith(".gz"):
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.name.lower().endswith(".zst"):
        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), _STREAM_BUFFER_BYTES)
    return open(path, "rb")


def _rows_of_parquet(path: Path, column: str) -> Iterator[tuple[str, bytes, str | None]]:
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise DataError(f"--documents {path}: is not a parquet file ({error}); give a whole one") from None
    if column not in file.schema_arrow.names:
        raise DataError(
            f"--documents {path}: has no column {column!r}; name the text's column with --text-column, one of "
            f"{', '.join(file.schema_arrow.names)}"
        )
    row = 0
    for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[column]):
        # As bytes, since a text column may hold bytes that are not UTF-8.
        values = batch.column(0)
        if pyarrow.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        kind = values.type
        if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
            values = values.cast(pyarrow.large_binary())
        for value in values.to_pylist():
            row += 1
            name = f"{path.name}:{row}"
            yield (name, value, None) if isinstance(value, bytes) else (name, b"", "no_text_column")


def _decoded(value: bytes) -> tuple[str, int]:
    """Text without NUL and byte-order mark, and how many of its bytes were not UTF-8."""
    broken = 0
    try:
        text = value.decode("utf-8")
    except UnicodeDecodeError:
        text = value.decode("utf-8", errors="replace")
        broken = text.count("\ufffd")
    return text.replace("\x00", "").removeprefix("\ufeff").replace("\r\n", "\n"), broken
