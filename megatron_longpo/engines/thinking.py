"""Thinking that a model writes before its answer, as in ``<think>...</think>``: it has tokens of its own, and is no answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Parted(NamedTuple):
    """What a model wrote, parted.

    Attributes:
        thinking: thinking with its marks.
        answer: the rest, stripped.
    """

    thinking: str
    answer: str


@dataclass(frozen=True)
class Thinking:
    """How thinking is told from an answer.

    Attributes:
        tokens: most tokens of thinking, beside those of the answer.
        opening, closing: marks before and after it.
    """

    tokens: int = 0
    opening: str = "<think>"
    closing: str = "</think>"

    def part(self, text: str, *, opened: bool = False) -> Parted:
        """Part thinking from the answer after it.

        A text with a closing mark only is thinking up to that mark: a template may have written the opening one. A text with an
        opening mark only is thinking as a whole: it was cut there.

        Args:
            text: what the model wrote.
            opened: whether the prompt ends with the opening mark.
        """
        thinking, rest = "", text.strip()
        end = rest.find(self.closing)
        while opened or end >= 0 or rest.startswith(self.opening):
            if end < 0:
                return Parted(thinking + rest, "")
            end += len(self.closing)
            thinking, rest, opened = thinking + rest[:end], rest[end:].strip(), False
            # Some models think again at once. Marks further on are a part of the answer.
            end = rest.find(self.closing) if rest.startswith(self.opening) else -1
        return Parted(thinking, rest)


NO_THINKING = Thinking()
