"""Scores of answers, as the benchmarks' own code defines them; each in [0, 1].

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
# A dot does not match a line feed: of each line the last.
_LAST_LETTER = re.compile(r"\b[A-D]\b(?!.*\b[A-D]\b)")
# What stands in front of an option's letter in an answer that is a sentence; the first of these that occurs counts.
_LEADS = ("answer is:", "answer:", "answer is", "option is")
_MARKS = str.maketrans(dict.fromkeys("\n\"'.,?!{}", " "))


def clean(answer: str) -> str:
    """An answer with line feeds for its control characters, and nothing around it."""
    return _CONTROL.sub("\n", answer.strip()).strip()


def string_match_all(answer: str, references: Sequence[str]) -> float:
    """Share of the references that occur in the answer, whatever the case of letters (RULER but for QA)."""
    text = clean(answer).lower()
    return sum(r.lower() in text for r in references) / len(references)


def string_match_part(answer: str, references: Sequence[str]) -> float:
    """Whether any of the references occurs in the answer, whatever the case of letters (RULER's QA)."""
    text = clean(answer).lower()
    return float(any(r.lower() in text for r in references))


def normalized(text: str) -> str:
    """Lower case, without punctuation, then without English articles, single spaces (SQuAD's normalisation)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def token_f1(answer: str, references: Sequence[str]) -> float:
    """Largest F1 of the answer's words with a reference's (En.QA)."""
    words = Counter(normalized(answer).split())
    best = 0.0
    for reference in references:
        wanted = Counter(normalized(reference).split())
        same = (words & wanted).total()
        if same:
            precision, recall = same / words.total(), same / wanted.total()
            best = max(best, 2 * precision * recall / (precision + recall))
    return best


def option_accuracy(answer: str, references: Sequence[str]) -> float:
    """Whether the answer names the right option (En.MC), in the steps of the benchmark's present code.

    Right is an answer whose last A, B, C or D that stands alone, in the first line that has one, is a reference. Else its
    first character decides where it is one of A to D; an answer that is a reference is right; what follows the first
    known lead-in must begin with a reference (its letter, or its text); and last, the first word that is a run of the
    letters ABCD decides.
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
    """F-measure of ROUGE-Lsum, sentences being lines, against the first reference (En.Sum)."""
    return float(_rouge().score(references[0], answer)["rougeLsum"].fmeasure)


SCORERS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "string_match_all": string_match_all,
    "string_match_part": string_match_part,
    "token_f1": token_f1,
    "option_accuracy": option_accuracy,
    "rouge_lsum": rouge_lsum,
}
