"""What a model is asked, what its answer is compared with, and the row that is stored for it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypedDict, TypeVar

from megatron_longpo.errors import DataError

# Counts the tokens of the prompt for a user message and the beginning of its answer.
CountPrompt = Callable[[str, str], int]
Built = TypeVar("Built")

# Hex digits of a digest: 64 bits, enough to recognise the same question or file.
_DIGEST_DIGITS = 16
# A fit is accepted if it leaves at most this fraction of the budget unused.
_FIT_TOLERANCE = 400
# Guesses in a row that may add no tokens before the material counts as exhausted.
_MOST_STUCK = 3


@dataclass(frozen=True)
class EvalSample:
    """One question.

    Attributes:
        suite: name of the suite.
        task: name of the task within the suite.
        length: target length in tokens, prompt and answer together.
        index: number of the sample within its task and length.
        message: the user message.
        prefix: beginning of the answer, given to the model.
        references: texts that the answer should contain or equal.
        scorer: name in ``scoring.SCORERS``.
        max_tokens: most tokens of the answer.
        prompt_tokens: tokens of the prompt in the model's chat template, prefix included; 0 if unknown.
        details: more to store with the answer, such as a needle's depth.
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
        """Unique name within an evaluation."""
        return sample_key(self.suite, self.task, self.length, self.index)

    @property
    def digest(self) -> str:
        """Digest of question and references: equal in two evaluations that ask the same."""
        text = "\0".join((self.message, self.prefix, *self.references))
        return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()[:_DIGEST_DIGITS]


class _ScoredRow(TypedDict):
    key: str
    score: float


class AnswerRow(_ScoredRow, total=False):
    """One answer, as a line of ``answers.jsonl`` and ``samples.jsonl``.

    Every row has a key and a score, and nearly all have the fields below; ``EvalSample.details`` and suites add their own.
    ``no_answer`` says why there is no answer (``engines.base.NoAnswer``), ``refused`` what the engine had against the prompt.
    """

    task: str
    length: int
    index: int
    answer: str
    references: list[str]
    digest: str
    prompt_tokens: int
    new_tokens: int
    finished: bool
    refused: str | None
    no_answer: str | None
    thinking_tokens: int
    seconds: float


def why_no_answer(row: AnswerRow) -> str | None:
    """Why a row is no answer, or None if it is one."""
    # Version 0.1 recorded only what the engine refused.
    return row.get("no_answer") or ("refused" if row.get("refused") else "empty" if row.get("answer") == "" else None)


def sample_key(suite: str, task: str, length: int, index: int) -> str:
    """Unique name of a sample within an evaluation."""
    return f"{suite}/{task}/{length}/{index}"


def cell_name(key: str) -> str:
    """The suite, task and length of a sample's key; together they are a *cell*."""
    return key.rpartition("/")[0]


def json_digest(value: Any) -> str:
    """Digest of a value that JSON can hold."""
    text = json.dumps(value, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:_DIGEST_DIGITS]


@dataclass(frozen=True)
class Fit(Generic[Built]):
    """The result of ``largest_fit``.

    Attributes:
        units: number of units used.
        built: what was built from them.
        tokens: its length in tokens.
    """

    units: int
    built: Built
    tokens: int


def largest_fit(
    build: Callable[[int], Built], count: Callable[[Built], int], budget: int, *, start: int, least: int = 0
) -> Fit[Built]:
    """Build something from as many units as a token budget allows.

    Guesses are proportional first, so that long texts are tokenised only a few times. The search ends when one more unit would
    be too much, or within 1/400 of the budget.

    Args:
        build: builds from a number of units.
        count: tokens of what was built.
        budget: most tokens.
        start: first guess of the number of units.
        least: fewest units.

    Raises:
        DataError: the fewest units exceed the budget, or there is not enough material to come near it.
    """
    low: Fit[Built] | None = None
    high: int | None = None
    guess = max(start, least)
    stuck = 0
    while True:
        built = build(guess)
        tokens = count(built)
        if tokens <= budget:
            stuck = stuck + 1 if low is not None and high is None and tokens <= low.tokens else 0
            if stuck > _MOST_STUCK:
                raise DataError(f"the material is used up at {tokens} of {budget} tokens")
            low = Fit(guess, built, tokens)
            if tokens >= budget - budget // _FIT_TOLERANCE:
                return low
        else:
            high = guess
            if guess == least:
                raise DataError(f"the shortest possible sample has {tokens} tokens, and the budget is {budget}")
        if low is not None and high is not None:
            if high - low.units <= 1:
                return low
            # Between the bounds: proportional to the tokens, but away from the edges, where the search would creep.
            aimed = low.units + round((high - low.units) * 0.5)
            if tokens:
                aimed = round(guess * budget / tokens)
            margin = (high - low.units) // 16
            guess = min(max(aimed, low.units + 1 + margin), high - 1 - margin)
        elif low is None:
            assert high is not None
            guess = max(least, min(high - 1, math.floor(high * budget / tokens)))
        else:
            proportional = math.floor(low.units * budget / max(1, tokens))
            # Far below the budget the fixed part of a prompt spoils the proportion: at least double.
            guess = max(low.units + 1, proportional, 2 * low.units if tokens * 4 < budget else 0)


def middle_cut(ids: Sequence[int], length: int) -> tuple[Sequence[int], Sequence[int]]:
    """Both ends of a row of tokens, together at most ``length`` tokens; the second is empty if the row fits.

    As InfiniteBench truncates: half of the length from the front, the other half from the end.
    """
    if len(ids) <= length:
        return ids, ids[:0]
    back = length - length // 2
    return ids[: length // 2], ids[len(ids) - back :]
