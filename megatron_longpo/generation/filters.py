"""What is skipped, and why. Every filter is a function of texts and thresholds."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

from megatron_longpo.errors import ConfigError
from megatron_longpo.generation.settings import FiltersConfig

_WORDS = re.compile(r"\w+")
# Shorter words, such as "the", say nothing about where a question comes from.
_CONTENT_WORD_LETTERS = 4
_NGRAM_WORDS = 4
# Shorter texts repeat n-grams, and compress, by chance.
_NGRAM_TEXT_WORDS = 50
_COMPRESSED_TEXT_CHARACTERS = 300
# A text below both limits is too short for its language to be recognised.
_LANGUAGE_WORDS = 8
_LANGUAGE_CHARACTERS = 60


def questions_in(reply: str, pattern: str) -> list[str]:
    """The questions in a reply, without quotation marks around them.

    Args:
        reply: text that the model wrote.
        pattern: regular expression, matched line by line, whose first group is a question.
    """
    # Long runs of white space make patterns slow and mean nothing.
    reply = re.sub(r"[ \t]{2,}", " ", re.sub(r"\n{3,}", "\n\n", reply))
    found = [m.group(1) or "" for m in re.finditer(pattern, reply, re.MULTILINE)]
    return [q.strip().strip("\"“”'*_ ").strip() for q in found]


def why_not_ask(question: str, instruction: str, config: FiltersConfig) -> str | None:
    """Why a question is not asked, or None.

    Args:
        question: question as the model wrote it.
        instruction: instruction that the model wrote questions for.
        config: thresholds.
    """
    words = _WORDS.findall(question.lower())
    if not config.min_question_words <= len(words) <= config.max_question_words:
        return "question_length"
    instructed = set(_WORDS.findall(instruction.lower()))
    content = [w for w in words if len(w) >= _CONTENT_WORD_LETTERS]
    if content and sum(w in instructed for w in content) > len(content) * config.max_quoted_words:
        return "question_quotes_instruction"
    return None


def why_not_keep(chosen: str, rejected: str, config: FiltersConfig) -> str | None:
    """Why a turn with these answers is not kept, or None."""
    for side, text in (("chosen", chosen), ("rejected", rejected)):
        if len(text.strip()) < max(1, config.min_answer_characters):
            return f"empty_{side}"
    if chosen.strip() == rejected.strip():
        return "identical_answers"
    if is_refusal(chosen, config):
        return "refusal_chosen"
    if config.refuse_rejected_too and is_refusal(rejected, config):
        return "refusal_rejected"
    for side, text in (("chosen", chosen), ("rejected", rejected)):
        if is_repetitive(text, config):
            return f"repetitive_{side}"
    return None


def is_refusal(text: str, config: FiltersConfig) -> bool:
    """Whether an answer begins with a refusal: one of the phrases within its first characters."""
    begin = text[: config.refusal_characters].lower().replace("’", "'")
    return any(phrase.lower() in begin for phrase in config.refusals)


def is_repetitive(text: str, config: FiltersConfig) -> bool:
    """Whether too many word n-grams of a text are repeated, or zlib compresses it too well."""
    words = _WORDS.findall(text.lower())
    if len(words) >= _NGRAM_TEXT_WORDS:
        grams = [tuple(words[i : i + _NGRAM_WORDS]) for i in range(len(words) - _NGRAM_WORDS + 1)]
        if 1 - len(set(grams)) / len(grams) > config.max_repeated_ngrams:
            return True
    raw = text.encode("utf-8", errors="replace")
    return len(text) >= _COMPRESSED_TEXT_CHARACTERS and len(raw) / len(zlib.compress(raw)) > config.max_compression


class LanguageFilter:
    """Recognises the language of texts by py3langid, a naive Bayes model over byte n-grams that its package contains.

    Args:
        languages: allowed languages as ISO 639-1 codes; empty allows any.
        min_probability: least probability of the recognised language.

    Raises:
        ConfigError: the package is not installed, or does not know a code.
    """

    def __init__(self, languages: Sequence[str], min_probability: float) -> None:
        self._languages, self._min_probability = frozenset(languages), min_probability
        if not languages:
            return
        try:
            from py3langid.langid import MODEL_FILE, LanguageIdentifier
        except ImportError:
            raise ConfigError(
                f"languages={' '.join(languages)} needs py3langid; pip install 'megatron_longpo[language]', or leave it out"
            ) from None
        self._identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        unknown = sorted(self._languages - set(self._identifier.nb_classes))
        if unknown:
            raise ConfigError(f"languages={unknown[0]} is not a known code; use ISO 639-1, such as en, de, zh")

    def passes(self, *texts: str) -> bool:
        """Whether all texts are in an allowed language; texts too short to recognise pass."""
        if not self._languages:
            return True
        for text in texts:
            if len(_WORDS.findall(text)) < _LANGUAGE_WORDS and len(text) < _LANGUAGE_CHARACTERS:
                continue
            language, probability = self._identifier.classify(text)
            if language not in self._languages or probability < self._min_probability:
                return False
        return True
