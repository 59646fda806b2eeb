"""What is asked of a model: one sample, and what its answer is held against."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_longpo.errors import DataError

# Tokens of a prompt with this user message and this beginning of the answer.
CountPrompt = Callable[[str, str], int]


@dataclass(frozen=True)
class EvalSample:
    """One question.

    Attributes:
        suite: ``ruler``, ``infinitebench`` or ``needle``.
        task: its name within.
        length: tokens asked for, prompt and answer together.
        index: which of its task and length.
        message: what the user says.
        prefix: what the answer is begun with.
        references: what it should hold.
        scorer: name in ``scoring.SCORERS``.
        max_tokens: of the answer.
        prompt_tokens: of the message in the model's template with the prefix; 0 where nobody counted.
        details: what else is worth a record, a needle's depth say.
    """

    suite: str
    task: str
    length: int
    index: int
    message: str
    prefix: str
    references: tuple[str, ...]
    scorer: str
    max_tokens: int
    prompt_tokens: int = 0
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Name within a run."""
        return f"{self.suite}/{self.task}/{self.length}/{self.index}"

    @property
    def digest(self) -> str:
        """Of what is asked and wanted: the same in two runs that ask the same."""
        text = "\0".join((self.message, self.prefix, *self.references))
        return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()[:16]


def largest_fit(
    build: Callable[[int], Any], count: Callable[[Any], int], budget: int, *, start: int, least: int = 0
) -> tuple[int, Any, int]:
    """The largest number of units of which something can be built within a budget of tokens.

    Guesses by proportion first, so that long texts are tokenised a few times only; ends when one unit more is too much, or
    within 1/400 of the budget.

    Args:
        build: from a number of units.
        count: tokens of what was built.
        budget: tokens at most.
        start: first guess.
        least: fewest units.

    Returns:
        Units, what was built of them, its tokens.

    Raises:
        DataError: the fewest are too much.
    """
    low: tuple[int, Any, int] | None = None
    high: int | None = None
    guess = max(start, least)
    stuck = 0
    while True:
        built = build(guess)
        tokens = count(built)
        if tokens <= budget:
            stuck = stuck + 1 if low is not None and high is None and tokens <= low[2] else 0
            if stuck > 3:
                raise DataError(f"what it is made of ends at {tokens} tokens, and {budget} are asked for")
            low = (guess, built, tokens)
            if tokens >= budget - budget // 400:
                return low
        else:
            high = guess
            if guess == least:
                raise DataError(f"the shortest that can be made has {tokens} tokens, and {budget} are left")
        if low is not None and high is not None:
            if high - low[0] <= 1:
                return low
            # Between the two: as the tokens would have it, but not at the edge, which would crawl.
            aimed = low[0] + round((high - low[0]) * 0.5)
            if tokens:
                aimed = round(guess * budget / tokens)
            margin = (high - low[0]) // 16
            guess = min(max(aimed, low[0] + 1 + margin), high - 1 - margin)
        elif low is None:
            assert high is not None
            guess = max(least, min(high - 1, math.floor(high * budget / tokens)))
        else:
            guess = max(
                low[0] + 1, math.floor(low[0] * budget / max(1, tokens)), 2 * low[0] if tokens * 4 < budget else 0
            )


def middle_cut(ids: Sequence[int], length: int) -> tuple[Sequence[int], Sequence[int]]:
    """Both ends of a row that is too long, ``length`` tokens together; the second is empty where nothing is cut.

    As InfiniteBench truncates: half of the length from the front, the other half from the end.
    """
    if len(ids) <= length:
        return ids, ids[:0]
    back = length - length // 2
    return ids[: length // 2], ids[len(ids) - back :]
