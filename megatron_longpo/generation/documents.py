"""Documents in: found, read as a stream, decoded, told apart, cut into units and chunks.

A chunk is a stretch of its document's text, so an exact substring always. Lengths are in tokens of the model's tokenizer.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pyarrow.parquet

from megatron_longpo.errors import DataError

Domain = Literal["book", "arxiv", "code", "other"]
DOMAINS: tuple[Domain, ...] = ("book", "arxiv", "code", "other")
Count = Callable[[Sequence[str]], list[int]]

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


def digest(text: str) -> str:
    """Name of a text: equal texts have the same."""
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()[:24]


# --------------------------------------------------------------------------------------------------
# Units and chunks
# --------------------------------------------------------------------------------------------------

# Where a unit ends, from coarse to fine. A pattern matches what comes between units, or the place (of no length) before
# one.
_BLANK_LINE = re.compile(r"\n[ \t]*\n\s*")
_LINE = re.compile(r"\n+")
# Also "sentence.Next sentence", as texts scraped from the web run together.
_SENTENCE = re.compile(r"(?<=[.!?。！？])[\"'”’)]*(?:\s+|(?=[A-Z]))|(?<=[。！？])")
_WORD = re.compile(r"\s+")
_UNITS: dict[str, tuple[re.Pattern[str], ...]] = {
    "book": (_BLANK_LINE, _LINE, _SENTENCE, _WORD),
    "other": (_BLANK_LINE, _LINE, _SENTENCE, _WORD),
    "arxiv": (
        re.compile(r"(?=\\(?:part|chapter|section|appendix|begin\{(?:abstract|thebibliography)\})\b)"),
        re.compile(r"(?=\\(?:subsection|subsubsection|paragraph)\b)"),
        *(_BLANK_LINE, _LINE, _SENTENCE, _WORD),
    ),
    "code": (
        # Files put one after the other, then definitions at the left margin.
        re.compile(r"(?m)(?=^(?:// ?|# ?|-- ?|/\* ?)?(?:={3,} ?)?(?:[Ff]ile(?:name)?|[Pp]ath): ?\S+)"),
        re.compile(
            r"(?m)(?=^(?:@\w|async def |def |class |func |fn |pub |impl |struct |enum |trait |interface |export |function |"
            r"public |private |protected |static |template ?<|namespace |module |type |typedef |"
            r"(?:[\w:<>*&]+ )+[\w:~]+\([^;\n]*$))"
        ),
        *(_BLANK_LINE, _LINE, _WORD),
    ),
}
_BATCH = 512
_LONGEST_COUNTED = 2**14


@dataclass(frozen=True)
class Span:
    """A stretch of a text, with its tokens."""

    start: int
    end: int
    tokens: int


def units_of(text: str, domain: Domain, count: Count, largest: int) -> list[Span]:
    """A text cut where its domain has its joints, no unit above ``largest`` tokens; what is too large is cut finer.

    The units are the text without the white space between them; a unit's tokens are those of the white space after it too,
    so that a stretch of units has at most their sum.
    """
    units = _counted(text, _pieces(text, 0, len(text), _UNITS[domain][0]), len(text), count)
    for pattern in (*_UNITS[domain][1:], None):
        if all(u.tokens <= largest for u in units):
            break
        finer: list[Span] = []
        for number, unit in enumerate(units):
            stop = units[number + 1].start if number + 1 < len(units) else len(text)
            if unit.tokens <= largest:
                finer.append(unit)
            elif pattern is not None:
                finer += _counted(text, _pieces(text, unit.start, unit.end, pattern), stop, count)
            else:
                # One word, or white space, of that length: cut anywhere.
                step = max(1, largest // 4)
                finer += _counted(text, [(p, min(stop, p + step)) for p in range(unit.start, stop, step)], stop, count)
        units = finer
    return units


def _pieces(text: str, start: int, end: int, pattern: re.Pattern[str]) -> list[tuple[int, int]]:
    pieces, begin = [], start
    for match in pattern.finditer(text, start, end):
        if match.start() > begin:
            pieces.append((begin, match.start()))
        begin = max(begin, match.end())
    pieces.append((begin, end))
    stripped = []
    for a, b in pieces:
        part = text[a:b]
        left, right = len(part) - len(part.lstrip()), len(part) - len(part.rstrip())
        if left < len(part):
            stripped.append((a + left, b - right))
    return stripped


def _counted(text: str, pieces: Sequence[tuple[int, int]], stop: int, count: Count) -> list[Span]:
    spans = []
    nexts = [a for a, _ in pieces[1:]] + [stop]
    for first in range(0, len(pieces), _BATCH):
        batch = pieces[first : first + _BATCH]
        # A very long piece is counted in parts: a tokenizer may take time that grows with the square of a word's length.
        ranges = zip((a for a, _ in batch), nexts[first : first + _BATCH], strict=True)
        parts = [[text[p : min(b, p + _LONGEST_COUNTED)] for p in range(a, b, _LONGEST_COUNTED)] for a, b in ranges]
        counts = iter(count([part for piece in parts for part in piece]))
        spans += [Span(a, b, sum(next(counts) for _ in piece)) for (a, b), piece in zip(batch, parts, strict=True)]
    return spans


def group_units(units: Sequence[Span], smallest: int, largest: int) -> list[Span]:
    """Consecutive units in stretches of ``smallest`` to ``largest`` tokens; a rest that is smaller is left out.

    Units of at most ``largest - smallest`` tokens always make such stretches.
    """
    chunks: list[Span] = []
    first, tokens = 0, 0
    for number, unit in enumerate(units):
        if tokens + unit.tokens > largest:
            if tokens >= smallest:
                chunks.append(Span(units[first].start, units[number - 1].end, tokens))
            first, tokens = number, 0
        tokens += unit.tokens
    if units and smallest <= tokens <= largest:
        chunks.append(Span(units[first].start, units[-1].end, tokens))
    return chunks


def take_units(units: Sequence[Span], largest: int, first: int = 0) -> tuple[Span, int]:
    """The longest run of units from ``first`` with at most ``largest`` tokens (one at least), and the unit after it."""
    last, tokens = first, units[first].tokens
    while last + 1 < len(units) and tokens + units[last + 1].tokens <= largest:
        last += 1
        tokens += units[last].tokens
    return Span(units[first].start, units[last].end, tokens), last + 1
