"""What is kept aside, and why. Every filter is a function of texts and thresholds."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

from megatron_longpo.errors import ConfigError
from megatron_longpo.generation.settings import FiltersConfig

_WORDS = re.compile(r"\w+")


def questions_in(reply: str, pattern: str) -> list[str]:
    """The questions of a reply: the first group of each match, line by line, without quotation marks around them."""
    # Long runs of spaces make patterns slow, and mean nothing.
    reply = re.sub(r"[ \t]{2,}", " ", re.sub(r"\n{3,}", "\n\n", reply))
    found = [m.group(1) or "" for m in re.finditer(pattern, reply, re.MULTILINE)]
    return [q.strip().strip("\"“”'*_ ").strip() for q in found]


def why_not_ask(question: str, instruction: str, c: FiltersConfig) -> str | None:
    """Why a question is not asked, or None.

    Args:
        question: as the model wrote it.
        instruction: what the model was told to write questions with.
    """
    words = _WORDS.findall(question.lower())
    if not c.min_question_words <= len(words) <= c.max_question_words:
        return "question_length"
    told = set(_WORDS.findall(instruction.lower()))
    content = [w for w in words if len(w) >= 4]
    if content and sum(w in told for w in content) > len(content) * c.max_quoted_words:
        return "question_quotes_instruction"
    return None


def why_not_keep(chosen: str, rejected: str, c: FiltersConfig) -> str | None:
    """Why a turn with these answers is not kept, or None."""
    for side, text in (("chosen", chosen), ("rejected", rejected)):
        if len(text.strip()) < max(1, c.min_answer_characters):
            return f"empty_{side}"
    if chosen.strip() == rejected.strip():
        return "identical_answers"
    if is_refusal(chosen, c):
        return "refusal_chosen"
    if c.refuse_rejected_too and is_refusal(rejected, c):
        return "refusal_rejected"
    for side, text in (("chosen", chosen), ("rejected", rejected)):
        if is_repetitive(text, c):
            return f"repetitive_{side}"
    return None


def is_refusal(text: str, c: FiltersConfig) -> bool:
    """Whether one of the phrases stands at the beginning of an answer."""
    begin = text[: c.refusal_characters].lower().replace("’", "'")
    return any(phrase.lower() in begin for phrase in c.refusals)


def is_repetitive(text: str, c: FiltersConfig) -> bool:
    """By word 4-grams that were there before, and by how much smaller zlib makes the text."""
    words = _WORDS.findall(text.lower())
    if len(words) >= 50:
        grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
        if 1 - len(set(grams)) / len(grams) > c.max_repeated_ngrams:
            return True
    raw = text.encode("utf-8", errors="replace")
    return len(text) >= 300 and len(raw) / len(zlib.compress(raw)) > c.max_compression


class LanguageFilter:
    """Which language a text is in, by py3langid (a naive Bayes model over byte n-grams that the package carries).

    Args:
        languages: allowed, as ISO 639-1 codes; empty: any.
        least: probability that the language found must have.

    Raises:
        ConfigError: the package is not installed, or a code that it does not know.
    """

    def __init__(self, languages: Sequence[str], least: float) -> None:
        self._languages, self._least = frozenset(languages), least
        if not languages:
            return
        try:
            from py3langid.langid import MODEL_FILE, LanguageIdentifier
        except ImportError:
            raise ConfigError(
                f"languages={' '.join(languages)} needs py3langid; pip install 'megatron_longpo[language]', or leave it out"
            ) from None
        self._identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        known = set(self._identifier.nb_classes)
        unknown = sorted(self._languages - known)
        if unknown:
            raise ConfigError(f"languages={unknown[0]} is no code that is known; use ISO 639-1, such as en, de, zh")

    def passes(self, *texts: str) -> bool:
        """Whether all texts are in an allowed language; texts too short to tell pass."""
        if not self._languages:
            return True
        for text in texts:
            if len(_WORDS.findall(text)) < 8 and len(text) < 60:
                continue
            language, probability = self._identifier.classify(text)
            if language not in self._languages or probability < self._least:
                return False
        return True
