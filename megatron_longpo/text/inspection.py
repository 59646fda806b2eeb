"""Windows into preprocessed data: counts, lengths, what sharing saves, and samples as text with the role of every token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from megatron_longpo.data.indexed import Manifest, PreferenceData
from megatron_longpo.data.preference import Mode, Piece, Sample
from megatron_longpo.runtime.files import write_atomically
from megatron_longpo.text.chat import ChatTokenizer

_TEMPLATE = Path(__file__).with_name("samples.html.j2")
# Tokens at the beginning and at the end of a run of one role that are shown; the rest is counted.
_SHOWN_TOKENS = 200
_BAR_CHARACTERS = 40
# Role -> what it is, and its colours on a terminal; two, so that tokens next to each other can be told apart.
ROLES = {
    "document": ("document: everything before the first question", ("grey50", "grey70")),
    "prompt": ("prompt: read, no loss", ("cyan", "bright_cyan")),
    "chosen": ("chosen answer: has a loss", ("green", "bright_green")),
    "rejected": ("rejected answer: has a loss", ("red", "bright_red")),
    "silent": ("in an answer without a loss: empty thinking, results of tools", ("yellow", "bright_yellow")),
}


@dataclass(frozen=True)
class Token:
    """A token as it is shown.

    Attributes:
        text: its text; empty if it is part of a character that the next tokens complete.
        number: its id; None: a note about tokens that are left out.
    """

    text: str
    number: int | None


@dataclass(frozen=True)
class Run:
    """Tokens of one role.

    Attributes:
        role: key of ``ROLES``.
        tokens: the tokens that are shown.
        count: number of all of them.
    """

    role: str
    tokens: tuple[Token, ...]
    count: int


@dataclass(frozen=True)
class ShownRow:
    """A row of a sample: ``long chosen``, ``short rejected, turn 2`` and the like."""

    title: str
    runs: tuple[Run, ...]

    @property
    def count(self) -> int:
        """Number of tokens."""
        return sum(run.count for run in self.runs)


@dataclass(frozen=True)
class ShownSample:
    """A sample with all its rows."""

    title: str
    rows: tuple[ShownRow, ...]


# --------------------------------------------------------------------------------------------------
# Samples
# --------------------------------------------------------------------------------------------------


def shown_sample(sample: Sample, title: str, tokenizer: ChatTokenizer | None) -> ShownSample:
    """A sample as it is shown.

    Args:
        sample: the sample.
        title: how it is called.
        tokenizer: turns ids into text; None: ids are shown.
    """
    turns = sample.turn_pieces()
    rows = [
        ShownRow(f"long {side.name.lower()}", _runs([p for p in sample.pieces if p.mode & side], turns, tokenizer))  # type: ignore[union-attr]
        for side in (Mode.CHOSEN, Mode.REJECTED)
    ]
    for number, turn in enumerate(turns, 1):
        of_turn = f", turn {number}" if len(turns) > 1 else ""
        own = [p for p in turn if not p.mode.long and not p.mode.short]
        if own:
            rows.append(ShownRow(f"prompt of its own{of_turn}", _runs(own, turns, tokenizer)))
        for side, name in ((Mode.SHORT_CHOSEN, "short chosen"), (Mode.SHORT_REJECTED, "short rejected")):
            pieces = [p for p in turn if p.mode & side]
            if pieces:
                rows.append(ShownRow(f"{name}{of_turn}", _runs(pieces, turns, tokenizer)))
    return ShownSample(title, tuple(rows))


def _role(piece: Piece, is_before_turns: bool) -> str:
    both = (Mode.CHOSEN | Mode.REJECTED, Mode.SHORT_CHOSEN | Mode.SHORT_REJECTED)
    if piece.mode & Mode.RESPONSE:
        return "chosen" if piece.mode & (Mode.CHOSEN | Mode.SHORT_CHOSEN) else "rejected"
    if is_before_turns:
        return "document"
    shared = any(piece.mode & sides == sides for sides in both) or not (piece.mode.long or piece.mode.short)
    return "prompt" if shared else "silent"


def _runs(
    pieces: Sequence[Piece], turns: Sequence[Sequence[Piece]], tokenizer: ChatTokenizer | None
) -> tuple[Run, ...]:
    in_turns = {id(piece) for turn in turns for piece in turn}
    return tuple(
        Run(
            role=_role(piece, is_before_turns=id(piece) not in in_turns),
            tokens=tuple(_tokens(piece.tokens.tolist(), tokenizer)),
            count=len(piece.tokens),
        )
        for piece in pieces
        if len(piece.tokens)
    )


def _tokens(ids: list[int], tokenizer: ChatTokenizer | None) -> Iterator[Token]:
    if len(ids) > 2 * _SHOWN_TOKENS:
        yield from _texts(ids[:_SHOWN_TOKENS], tokenizer)
        yield Token(f" … {len(ids) - 2 * _SHOWN_TOKENS:,} tokens … ", None)
        yield from _texts(ids[-_SHOWN_TOKENS:], tokenizer)
    else:
        yield from _texts(ids, tokenizer)


def _texts(ids: list[int], tokenizer: ChatTokenizer | None) -> Iterator[Token]:
    """Tokens with their texts. A token is decoded behind the one before, which tells whether a blank stands between them."""
    if tokenizer is None:
        yield from (Token(f"{number} ", number) for number in ids)
        return
    start = done = 0
    for place, number in enumerate(ids):
        before = tokenizer.text_of(ids[start:done])
        text = tokenizer.text_of(ids[start : place + 1])
        is_whole = len(text) > len(before) and (not text.endswith("\ufffd") or place + 1 == len(ids))
        yield Token(text[len(before) :] if is_whole else "", number)
        if is_whole:
            start, done = done, place + 1


def as_text(shown: ShownSample) -> RenderableType:
    """A sample for a terminal."""
    rows: list[RenderableType] = []
    for row in shown.rows:
        text = Text(overflow="fold")
        for run in row.runs:
            colours = ROLES[run.role][1]
            for place, token in enumerate(run.tokens):
                text.append(token.text, "dim italic" if token.number is None else colours[place % 2])
        rows.append(Panel(text, title=f"{row.title}: {row.count:,} tokens", title_align="left"))
    return Panel(Group(*rows), title=shown.title, title_align="left")


def legend() -> Text:
    """What the colours mean."""
    return Text("\n").join(Text(what, colours[1]) for what, colours in ROLES.values())


def write_html(path: Path, title: str, samples: Sequence[ShownSample], tables: Sequence[TableOfFigures] = ()) -> None:
    """Write samples, and tables before them, as a page without references to other files.

    Args:
        path: path of the page.
        title: its title.
        samples: the samples.
        tables: tables of figures.
    """
    # Documents and answers are foreign text: the template escapes them.
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        title=title, samples=samples, tables=tables, roles={role: what for role, (what, _) in ROLES.items()}
    )
    write_atomically(path, page.encode("utf-8", errors="replace"))


# --------------------------------------------------------------------------------------------------
# Figures
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TableOfFigures:
    """Names and figures.

    Attributes:
        title: title of the table.
        rows: name, figure, and length of a bar (0 to 1) or None.
    """

    title: str
    rows: tuple[tuple[str, str, float | None], ...]

    def as_text(self) -> Table:
        """The table for a terminal."""
        table = Table("", "", "", title=self.title, show_header=False)
        for name, figure, share in self.rows:
            table.add_row(name, figure, "" if share is None else "█" * round(share * _BAR_CHARACTERS))
        return table


@dataclass(frozen=True)
class Sharing:
    """What is saved because both answers share what stands before them.

    Attributes:
        alone: tokens of the long rows, if each were computed by itself.
        shared: tokens that stand in both rows of a sample, and are computed once.
    """

    alone: int
    shared: int

    @property
    def saved(self) -> float:
        """Share of the tokens that need not be computed."""
        return self.shared / self.alone if self.alone else 0.0


def sharing_of(data: PreferenceData) -> Sharing:
    """What sharing saves of the chained long rows, from the index only."""
    lengths, modes = data.piece_lengths(), data.piece_modes()
    in_chosen, in_rejected = ((modes & int(side)) != 0 for side in (Mode.CHOSEN, Mode.REJECTED))
    return Sharing(
        alone=int(lengths[in_chosen].sum() + lengths[in_rejected].sum()),
        shared=int(lengths[in_chosen & in_rejected].sum()),
    )


def tables_of(data: PreferenceData) -> list[TableOfFigures]:
    """Counts, lengths, sharing and what was skipped."""
    manifest = data.manifest
    sharing = sharing_of(data)
    counts = [
        ("rows of the input", "not recorded" if manifest.rows is None else f"{manifest.rows:,}", None),
        ("samples", f"{manifest.samples:,}", None),
        (
            "rows without a sample",
            "not recorded" if manifest.rows is None else f"{manifest.rows - manifest.samples:,}",
            None,
        ),
        ("samples without short rows", f"{manifest.samples_without_short:,}", None),
        ("turns", f"{manifest.turns:,}", None),
        ("tokens, as stored", f"{manifest.tokens:,}", None),
        ("longest long row", f"{manifest.longest:,}", None),
        ("longest short row", f"{manifest.longest_short:,}", None),
    ]
    shared = [
        ("long rows, each by itself", f"{sharing.alone:,}", 1.0),
        ("computed, the trunk once", f"{sharing.alone - sharing.shared:,}", 1 - sharing.saved),
        ("saved", f"{sharing.shared:,} ({sharing.saved:.1%})", sharing.saved),
    ]
    tables = [
        TableOfFigures("Counts", tuple(counts)),
        TableOfFigures("Made with", tuple((name, value, None) for name, value in _made_with(manifest))),
        TableOfFigures("Tokens of the long rows", tuple(_histogram(manifest))),
        TableOfFigures("Sharing (tokens)", tuple(shared)),
    ]
    if manifest.skip_reasons:
        most = max(manifest.skip_reasons.values())
        skipped = ((reason, f"{n:,}", n / most if most else 0.0) for reason, n in sorted(manifest.skip_reasons.items()))
        tables.append(TableOfFigures("Skipped rows and turns", tuple(skipped)))
    return tables


def _histogram(manifest: Manifest) -> Iterator[tuple[str, str, float | None]]:
    most = max(manifest.length_histogram.values(), default=1)
    for bin_, count in sorted((int(k), v) for k, v in manifest.length_histogram.items()):
        yield f"up to {bin_:,}", f"{count:,}", count / most if most else 0.0


def _made_with(manifest: Manifest) -> Iterator[tuple[str, str]]:
    values: dict[str, Any] = {
        "tokenizer": manifest.tokenizer or "none: rows were tokenised already",
        "chat template (hash)": (manifest.template_hash or "none")[:12],
        "arguments of the template": manifest.chat_template_kwargs,
        "date of the template": manifest.template_date,
        "system prompt": manifest.system_prompt,
        "input": ", ".join(str(source.get("name")) for source in manifest.source),
        **manifest.settings,
    }
    yield from ((name, str(value)) for name, value in values.items() if value not in (None, {}, ""))


def print_tables(console: Console, tables: Sequence[TableOfFigures]) -> None:
    """Print tables to a terminal."""
    for table in tables:
        console.print(table.as_text())
