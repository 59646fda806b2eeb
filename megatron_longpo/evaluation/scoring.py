"""Scores of answers in [0, 1], as the benchmarks' own code defines them.

RULER: string matches of arXiv 2404.06654. InfiniteBench: arXiv 2402.13718, for its three tasks on English books.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

_CONTROL = re.compile(r"[\x00-\x1f]")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_OPTIONS = "ABCD"
# The last such letter of a line: a dot does not match a line feed.
_LAST_LETTER = re.compile(r"\b[A-D]\b(?!.*\b[A-D]\b)")
# What precedes the option's letter in an answer that is a sentence. The first of these that occurs counts.
_LEADS = ("answer is:", "answer:", "answer is", "option is")
_MARKS = str.maketrans(dict.fromkeys("\n\"'.,?!{}", " "))


def clean(answer: str) -> str:
    """The answer with control characters replaced by line feeds, stripped."""
    return _CONTROL.sub("\n", answer.strip()).strip()


def string_match_all(answer: str, references: Sequence[str]) -> float:
    """Share of the references that occur in the answer, ignoring case (RULER except QA)."""
    text = clean(answer).lower()
    return sum(r.lower() in text for r in references) / len(references)


def string_match_part(answer: str, references: Sequence[str]) -> float:
    """Whether any reference occurs in the answer, ignoring case (RULER's QA)."""
    text = clean(answer).lower()
    return float(any(r.lower() in text for r in references))


def normalized(text: str) -> str:
    """The text in lower case, without punctuation and English articles, with single spaces (SQuAD's normalisation)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def token_f1(answer: str, references: Sequence[str]) -> float:
    """Best F1 between the words of the answer and those of a reference (En.QA)."""
    words = Counter(normalized(answer).split())
    best = 0.0
    for reference in references:
        wanted = Counter(normalized(reference).split())
        same = (words & wanted).total()
        if same:
            precision, recall = same / words.total(), same / wanted.total()
            best = max(best, 2 * precision * recall / (precision + recall))
    return best


def exact_match(answer: str, references: Sequence[str]) -> float:
    """Whether the answer equals a reference, both normalised as SQuAD does."""
    return float(normalized(answer) in map(normalized, references))


def option_accuracy(answer: str, references: Sequence[str]) -> float:
    """Whether the answer names the right option (En.MC).

    The steps are those of OpenBMB/InfiniteBench at commit 51d9b37, read in public copies that name it as their source. The state
    of 2024-06-13 (commit 88b3daa) lacks the first step below, and judged 279 of 3000 made-up answers differently; its scores of
    En.QA and En.Sum are the same.

    1. In the first line with an A, B, C or D that stands alone, take the last one: the answer is right if it is a reference.
    2. Otherwise, if the answer begins with a letter from A to D, that letter decides.
    3. Otherwise an answer that equals a reference is right.
    4. Otherwise, if a known lead-in occurs ("answer is"), what follows it must begin with a reference, its letter or its text.
    5. Otherwise the first word that is a run of the letters ABCD decides.

    Args:
        answer: the model's answer.
        references: text and letter of the right option.
    """
    answer = answer.strip()
    alone = _LAST_LETTER.search(answer)
    if alone and alone.group() in references:
        return 1.0
    if not answer:
        return 0.0
    if answer[0] in _OPTIONS:
        return float(answer[0] in references)
    if answer in references:
        return 1.0
    text = re.sub(" +", " ", answer.translate(_MARKS))
    for lead in _LEADS:
        place = text.find(lead)
        if place >= 0:
            # One character stands between the lead-in and the option.
            rest = text[place + len(lead) + 1 :]
            return float(bool(rest) and any(rest.startswith(r) for r in references))
    first = next((word for word in text.split() if word in _OPTIONS), None)
    return float(first is not None and first in references)


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeLsum"])


def rouge_lsum(answer: str, references: Sequence[str]) -> float:
    """F-measure of ROUGE-Lsum against the first reference, with lines as sentences (En.Sum)."""
    return float(_rouge().score(references[0], answer)["rougeLsum"].fmeasure)


SCORERS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "string_match_all": string_match_all,
    "string_match_part": string_match_part,
    "exact_match": exact_match,
    "token_f1": token_f1,
    "option_accuracy": option_accuracy,
    "rouge_lsum": rouge_lsum,
}
