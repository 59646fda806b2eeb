"""Tables of text for people: Markdown and terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table as RichTable

# Characters of a terminal table: at least these, and more for many columns.
_MIN_WIDTH = 100
_COLUMN_WIDTH = 14


@dataclass(frozen=True)
class Table:
    """A titled table.

    Attributes:
        title: what it shows.
        head: column titles.
        rows: one text per column; the first column names the row, the others hold numbers.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> list[str]:
        """Lines of the table in Markdown, without the title."""
        return markdown_table(self.head, self.rows)

    def print(self) -> None:
        """Print the table to the terminal, numbers right-aligned."""
        table = RichTable(self.head[0], title=self.title)
        for name in self.head[1:]:
            table.add_column(name, justify="right")
        for row in self.rows:
            table.add_row(*row)
        Console(width=max(_MIN_WIDTH, _COLUMN_WIDTH * len(self.head))).print(table)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table. A bar in a text does not end its cell.

    Args:
        head: column titles.
        rows: one text per column.
    """
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in rows),
    ]
