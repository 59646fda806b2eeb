"""Documents in: found, read as a stream, decoded, told apart."""

from __future__ import annotations

import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pyarrow.parquet

from megatron_longpo.errors import DataError

Domain = Literal["book", "arxiv", "code", "other"]
DOMAINS: tuple[Domain, ...] = ("book", "arxiv", "code", "other")

_TEXT = (".txt", ".md", ".tex")
_TABLES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_CODE = (
    *(".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".java", ".js", ".jsx", ".ts", ".tsx", ".go", ".rs", ".rb"),
    *(".php", ".cs", ".scala", ".kt", ".swift", ".jl", ".lua", ".pl", ".r", ".sh", ".sql", ".hs", ".ml"),
)
# More of a document than this that is not text in UTF-8 makes it no text.
MOST_BROKEN = 0.01


@dataclass(frozen=True)
class RawDocument:
    """A document as found.

    Attributes:
        number: from 0 over all input.
        name: file, with the row in a table.
        domain: what its units are.
        text: decoded, without NUL; bytes that are not UTF-8 stand as U+FFFD.
        broken: such bytes.
        error: why there is no text.
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
    """Files of folders, globs and names, in order, each once, with the domain of its documents.

    Args:
        documents: files, folders or globs.
        domain: ``auto``: by a folder named like a domain, else by the file's kind; or a domain for all.

    Raises:
        DataError: nothing there, or a file of a kind that is not read.
    """
    found: dict[Path, Domain] = {}
    for name in documents:
        if not name.strip():
            raise DataError("--documents '': is empty (a variable that is not set?); name files, folders or globs")
        path = Path(name)
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
            files = [p for p in files if _is_read(p, domain)]
        elif path.is_file():
            if not _is_read(path, "code"):
                raise DataError(
                    f"--documents {path}: is of no kind that is read; give {', '.join((*_TEXT, *_TABLES))} or source code"
                )
            files = [path]
        else:
            files = sorted(Path(p) for p in glob.glob(name, recursive=True))
            files = [p for p in files if p.is_file() and _is_read(p, "code")]
            if not files:
                raise DataError(f"--documents {name}: there is no such file or folder, and no file that it matches")
        for file in files:
            found.setdefault(file, _domain_of(file, domain))
    if not found:
        raise DataError(
            f"--documents {' '.join(documents)}: no file there that is read ({', '.join((*_TEXT, *_TABLES))}; source code "
            "with --domain code, or in a folder named code)"
        )
    return list(found.items())


def _is_read(path: Path, domain: str) -> bool:
    name = path.name.lower()
    is_code = name.endswith(_CODE) and (domain == "code" or (domain == "auto" and "code" in map(str.lower, path.parts)))
    return name.endswith((*_TEXT, *_TABLES)) or is_code


def _domain_of(path: Path, domain: str) -> Domain:
    if domain in DOMAINS:
        return domain  # type: ignore[return-value]
    for folder in reversed(path.parts[:-1]):
        for known in DOMAINS:
            if folder.lower() in (known, known + "s"):
                return known
    name = path.name.lower()
    return "arxiv" if name.endswith(".tex") else "code" if name.endswith(_CODE) else "other"


def read_documents(files: Sequence[tuple[Path, Domain]], text_column: str) -> Iterator[RawDocument]:
    """Documents of all files in order; of tables row by row.

    Raises:
        DataError: a file that cannot be read, or a table without the column.
    """
    number = 0
    for path, domain in files:
        for name, value, error in _values_of(path, text_column):
            text, broken = _decoded(value)
            yield RawDocument(number, name, domain, text, broken, error)
            number += 1


def _values_of(path: Path, column: str) -> Iterator[tuple[str, str | bytes, str | None]]:
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


def _rows_of_jsonl(path: Path, column: str) -> Iterator[tuple[str, str | bytes, str | None]]:
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
            yield name, value.encode("utf-8", errors="surrogateescape" if _escapes(value) else "replace"), None


def _escapes(text: str) -> bool:
    try:
        text.encode("utf-8", errors="surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def _opened(path: Path) -> Any:
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rb")
    if path.name.lower().endswith(".zst"):
        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), 2**20)
    return open(path, "rb")


def _rows_of_parquet(path: Path, column: str) -> Iterator[tuple[str, str | bytes, str | None]]:
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise DataError(f"--documents {path}: is no parquet file ({error})") from None
    if column not in file.schema_arrow.names:
        raise DataError(
            f"--documents {path}: has no column {column!r}; name the text's with --text-column, one of "
            f"{', '.join(file.schema_arrow.names)}"
        )
    row = 0
    for batch in file.iter_batches(batch_size=64, columns=[column]):
        # As bytes: a text column may hold what is not UTF-8.
        values = batch.column(0)
        if pyarrow.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        kind = values.type
        if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
            values = values.cast(pyarrow.large_binary())
        for value in values.to_pylist():
            row += 1
            good = isinstance(value, bytes)
            yield f"{path.name}:{row}", value if good else b"", None if good else "no_text_column"


def _decoded(value: str | bytes) -> tuple[str, int]:
    """Text without NUL, and how many bytes of it were not UTF-8."""
    if isinstance(value, str):
        value = value.encode("utf-8", errors="replace")
    broken = 0
    try:
        text = value.decode("utf-8")
    except UnicodeDecodeError:
        text = value.decode("utf-8", errors="replace")
        broken = text.count("\ufffd")
    # A byte-order mark is no text either.
    return text.replace("\x00", "").removeprefix("\ufeff").replace("\r\n", "\n"), broken
