"""Cuts documents into units and chunks.

A chunk is a span of its document, and therefore always an exact substring. Lengths are in tokens of the model's tokenizer.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_longpo.text.documents import Domain

# Tokens of each text.
Count = Callable[[Sequence[str]], list[int]]

_DIGEST_DIGITS = 24
# Pieces that are counted in one call of the tokenizer.
_PIECES_PER_CALL = 512
# Longer pieces are counted in parts: a tokenizer's time may grow with the square of a word's length.
_LONGEST_COUNTED = 2**14
# Where a unit ends, from coarse to fine. A pattern matches the text between two units, or the empty place before one.
_BLANK_LINE = re.compile(r"\n[ \t]*\n\s*")
_LINE = re.compile(r"\n+")
# Also "sentence.Next sentence": texts scraped from the web often lack the space.
_SENTENCE = re.compile(r"(?<=[.!?。！？])[\"'”’)]*(?:\s+|(?=[A-Z]))|(?<=[。！？])")
_WORD = re.compile(r"\s+")
_PROSE = (_BLANK_LINE, _LINE, _SENTENCE, _WORD)
_UNITS: dict[Domain, tuple[re.Pattern[str], ...]] = {
    "book": _PROSE,
    "other": _PROSE,
    "arxiv": (
        re.compile(r"(?=\\(?:part|chapter|section|appendix|begin\{(?:abstract|thebibliography)\})\b)"),
        re.compile(r"(?=\\(?:subsection|subsubsection|paragraph)\b)"),
        *_PROSE,
    ),
    "code": (
        # Concatenated files, then definitions at the left margin.
        re.compile(r"(?m)(?=^(?:// ?|# ?|-- ?|/\* ?)?(?:={3,} ?)?(?:[Ff]ile(?:name)?|[Pp]ath): ?\S+)"),
        re.compile(
            r"(?m)(?=^(?:@\w|async def |def |class |func |fn |pub |impl |struct |enum |trait |interface |export |function |"
            r"public |private |protected |static |template ?<|namespace |module |type |typedef |"
            r"(?:[\w:<>*&]+ )+[\w:~]+\([^;\n]*$))"
        ),
        _BLANK_LINE,
        _LINE,
        _WORD,
    ),
}


@dataclass(frozen=True)
class Span:
    """Characters ``[start, end)`` of a text, and their number of tokens."""

    start: int
    end: int
    tokens: int


def digest(text: str) -> str:
    """Hash that identifies a text."""
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()[:_DIGEST_DIGITS]


def units_of(text: str, domain: Domain, count: Count, largest: int) -> list[Span]:
    """Cut a text at the boundaries of its domain, and finer where a unit would be too large.

    The units are the text without the white space between them. The tokens of a unit include those of the white space after
    it, so that a span of several units never has more tokens than their sum.

    Args:
        text: text of the document.
        domain: decides what the boundaries are.
        count: counts tokens.
        largest: most tokens of a unit.
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
                # A single word, or white space, of this length is cut anywhere.
                step = max(1, largest // 4)
                finer += _counted(text, [(p, min(stop, p + step)) for p in range(unit.start, stop, step)], stop, count)
        units = finer
    return units


def _pieces(text: str, start: int, end: int, pattern: re.Pattern[str]) -> list[tuple[int, int]]:
    """Stretches of ``text[start:end]`` between matches, stripped; empty ones are left out."""
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
    """Pieces with their tokens, those up to the next piece (for the last one, up to ``stop``) included."""
    spans = []
    nexts = [a for a, _ in pieces[1:]] + [stop]
    for first in range(0, len(pieces), _PIECES_PER_CALL):
        batch = pieces[first : first + _PIECES_PER_CALL]
        ranges = zip((a for a, _ in batch), nexts[first : first + _PIECES_PER_CALL], strict=True)
        parts = [[text[p : min(b, p + _LONGEST_COUNTED)] for p in range(a, b, _LONGEST_COUNTED)] for a, b in ranges]
        counts = iter(count([part for piece in parts for part in piece]))
        spans += [Span(a, b, sum(next(counts) for _ in piece)) for (a, b), piece in zip(batch, parts, strict=True)]
    return spans


def group_units(units: Sequence[Span], smallest: int, largest: int) -> list[Span]:
    """Group consecutive units into spans of ``smallest`` to ``largest`` tokens; a smaller remainder is left out.

    With units of at most ``largest - smallest`` tokens, only the end of the text can be left out.
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
    """The longest run of units from ``first`` with at most ``largest`` tokens, but at least one unit.

    Returns:
        The span of the run, and the number of the unit after it.
    """
    last, tokens = first, units[first].tokens
    while last + 1 < len(units) and tokens + units[last + 1].tokens <= largest:
        last += 1
        tokens += units[last].tokens
    return Span(units[first].start, units[last].end, tokens), last + 1
