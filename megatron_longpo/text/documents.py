"""Finds documents and reads them as a stream: files, tables, encodings, domains."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import pyarrow
import pyarrow.parquet

from megatron_longpo.errors import DataError, one_line
from megatron_longpo.runtime.files import open_regular
from megatron_longpo.runtime.log import log
from megatron_longpo.runtime.parquet import check_pages
from megatron_longpo.runtime.reading import (
    DEFAULT_READING,
    ReadingConfig,
    TooLarge,
    WrongFormat,
    check_expansion,
    opened,
    parse_json,
    read_json_rows,
)
from megatron_longpo.text.inputs import files_of_split, is_beside_data

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
# Links that a message names.
_NAMED_LINKS = 3


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


def find_files(
    documents: Sequence[str],
    domain: str,
    limits: ReadingConfig = DEFAULT_READING,
    *,
    split: str | None = None,
) -> list[tuple[Path, Domain]]:
    """Find files in order, each once, with the domain of its documents.

    Args:
        documents: files, folders or globs.
        domain: a domain for all files, or ``auto``: by a folder named like a domain, else by the file name's ending.
        limits: whether symbolic links are followed that lead out of a folder.
        split: split to read of folders whose tables are of several; ``all`` reads all.

    Raises:
        DataError: there is no such file, or one of an unknown kind, or tables are of several splits and none is chosen.
    """
    found: dict[Path, Domain] = {}
    for name in documents:
        if not name.strip():
            raise DataError("--documents '': is empty (an unset variable?); name files, folders or globs")
        path = Path(name)
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.is_file() and not is_beside_data(p, path))
            files = files_inside(path, _of_split(path, [p for p in files if _is_read(p, domain)], split), limits)
        elif path.is_file():
            if not _is_read(path, "code"):
                raise DataError(
                    f"--documents {path}: is of an unknown kind; use {', '.join((*_TEXT, *_TABLES))} or source code"
                )
            files = [path]
        elif path.exists():
            _refuse_special(path)
        else:
            root, matches = _matches(name)
            files = files_inside(root, (p for p in matches if _is_read(p, "code")), limits)
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


def _of_split(folder: Path, files: list[Path], split: str | None) -> list[Path]:
    """The files, of the tables among them only those of one split."""
    tables = [p for p in files if p.name.lower().endswith(_TABLES)]
    kept = set(files_of_split(folder, tables, f"--documents {folder}", split)) if tables else set()
    return [p for p in files if p in kept or p not in tables]


def _refuse_special(path: Path) -> None:
    """Raise DataError for a path that is neither a file nor a folder, and name its kind."""
    try:
        open_regular(path).close()
    except OSError as error:
        raise DataError(f"--documents {path}: cannot be read ({error}); name files, folders or globs") from None


def _matches(pattern: str) -> tuple[Path, list[Path]]:
    """Folder that a glob starts in, and the regular files that it matches, in order.

    Like a shell's, a pattern matches hidden names only where it begins with a dot. ``**`` does not descend into symbolic
    links: two links that lead back would double the files at every level.
    """
    parts = Path(pattern).parts
    fixed = list(itertools.takewhile(lambda part: not any(sign in part for sign in "*?["), parts))
    # Within a name, ** is an ordinary *.
    wild = [part if part == "**" else part.replace("**", "*") for part in parts[len(fixed) :]]
    root = Path(*fixed)
    if not wild:
        return root, []
    if wild[-1] == "**":
        wild.append("*")
    shows_hidden = any(part.startswith(".") for part in wild)
    return root, sorted(
        path
        for path in root.glob(str(Path(*wild)))
        if path.is_file() and (shows_hidden or not any(part.startswith(".") for part in path.relative_to(root).parts))
    )


def files_inside(root: Path, files: Iterable[Path], limits: ReadingConfig) -> list[Path]:
    """The files that are inside a folder once symbolic links are followed, each once. Others are logged.

    A link could otherwise bring any file of the machine, a key for example, into the documents and to a server.

    Args:
        root: the folder.
        files: files found in it.
        limits: whether links may lead out of it.
    """
    inside, outside, seen = [], [], set()
    home = root.resolve()
    for file in files:
        real = file.resolve()
        if not limits.follow_symlinks and not real.is_relative_to(home):
            outside.append(file)
        elif real not in seen:
            seen.add(real)
            inside.append(file)
    if outside:
        names = ", ".join(str(path) for path in outside[:_NAMED_LINKS])
        log(
            f"{root}: {len(outside)} symbolic link(s) lead out of the folder and are left out ({names}"
            f"{', ...' if len(outside) > _NAMED_LINKS else ''}); --follow-symlinks reads them"
        )
    return inside


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


def read_documents(
    files: Sequence[tuple[Path, Domain]], text_column: str, limits: ReadingConfig = DEFAULT_READING
) -> Iterator[RawDocument]:
    """Read the documents of all files, in order; each row of a table is a document.

    Args:
        files: files with their domains (``find_files``).
        text_column: column of the text in tables.
        limits: what is too large.

    Raises:
        DataError: a file cannot be read, or a table lacks the column.
    """
    number = 0
    for path, domain in files:
        for name, value, error in _values_of(path, text_column, limits):
            text, broken = _decoded(value)
            yield RawDocument(number=number, name=name, domain=domain, text=text, broken=broken, error=error)
            number += 1


# Name, raw text and error of a document.
_Value = tuple[str, bytes, str | None]
_TOO_LARGE = "document_too_large"


def _values_of(path: Path, column: str, limits: ReadingConfig) -> Iterator[_Value]:
    """Documents of a file."""
    name = path.name.lower()
    try:
        if name.endswith(".parquet"):
            yield from _rows_of_parquet(path, column, limits)
        elif name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
            yield from _rows_of_jsonl(path, column, limits)
        else:
            with open_regular(path) as stream:
                content = stream.read(limits.max_row_bytes + 1)
            is_large = len(content) > limits.max_row_bytes
            yield (path.name, b"", _TOO_LARGE) if is_large else (path.name, content, None)
    except (TooLarge, WrongFormat) as error:
        raise DataError(f"--documents {path}: {error}") from None
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, pyarrow.ArrowException) as error:
        raise DataError(f"--documents {path}: cannot be read ({one_line(error)}); give a whole file") from None


def _rows_of_jsonl(path: Path, column: str, limits: ReadingConfig) -> Iterator[_Value]:
    with opened(path, limits) as stream:
        for number, line in enumerate(read_json_rows(stream, limits), 1):
            name = f"{path.name}:{number}"
            if line.too_long:
                yield name, b"", _TOO_LARGE
                continue
            try:
                row = parse_json(line.raw.decode("utf-8", errors="surrogateescape"), limits.max_json_depth)
            except ValueError:
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


def _rows_of_parquet(path: Path, column: str, limits: ReadingConfig) -> Iterator[_Value]:
    with open_regular(path) as stream:
        try:
            file = pyarrow.parquet.ParquetFile(stream, buffer_size=_PARQUET_BUFFER_BYTES, pre_buffer=False)
        except (UnicodeDecodeError, pyarrow.ArrowException) as error:
            raise DataError(
                f"--documents {path}: is not a parquet file ({one_line(error)}); give a whole one"
            ) from None
        check_expansion(file.metadata, path.stat().st_size, limits)
        check_pages(path, limits)
        if column not in file.schema_arrow.names:
            raise DataError(
                f"--documents {path}: has no column {column!r}; name the text's column with --text-column, one of "
                f"{', '.join(file.schema_arrow.names)}"
            )
        # One row at a time: a dictionary can repeat a large text at no cost in the file.
        for row, batch in enumerate(file.iter_batches(batch_size=1, columns=[column]), 1):
            # Offsets of a damaged file may lead anywhere in memory. The bytes of texts are looked at later.
            batch.validate()
            name = f"{path.name}:{row}"
            value = _bytes_of(batch.column(0), limits.max_row_bytes)
            yield (name, b"", value) if isinstance(value, str) else (name, value, None)


_PARQUET_BUFFER_BYTES = 2**20


def _bytes_of(values: pyarrow.Array, most: int) -> bytes | str:
    """The only text of a column as bytes, since it may not be UTF-8; or the reason why there is none."""
    if pyarrow.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    kind = values.type
    if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
        values = values.cast(pyarrow.large_binary())
    if not pyarrow.types.is_binary(values.type) and not pyarrow.types.is_large_binary(values.type):
        return "no_text_column"
    if not values[0].is_valid:
        return "no_text_column"
    buffer = values[0].as_buffer()
    return _TOO_LARGE if buffer.size > most else buffer.to_pybytes()


def _decoded(value: bytes) -> tuple[str, int]:
    """Text without NUL and byte-order mark, and how many of its bytes were not UTF-8."""
    broken = 0
    try:
        text = value.decode("utf-8")
    except UnicodeDecodeError:
        text = value.decode("utf-8", errors="replace")
        broken = text.count("\ufffd")
    return text.replace("\x00", "").removeprefix("\ufeff").replace("\r\n", "\n"), broken
