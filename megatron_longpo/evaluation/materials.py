"""Texts, words and questions that samples are made of, read from the user's files."""

from __future__ import annotations

import dataclasses
import random
import re
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from megatron_longpo.errors import ConfigError, DataError
from megatron_longpo.evaluation.samples import json_digest
from megatron_longpo.runtime.log import log
from megatron_longpo.runtime.reading import (
    DEFAULT_READING,
    ReadingConfig,
    opened,
    parse_json,
    read_bytes,
    read_json_rows,
)
from megatron_longpo.text.documents import find_files, read_documents
from megatron_longpo.text.inputs import ALL_SPLITS

# Fewer words would make lists and keys of a few words only.
MINIMUM_WORDS = 60
# Question files of these two tasks.
SQUAD_TASK, HOTPOTQA_TASK = "qa_1", "qa_2"

_SENTENCE_END = re.compile(r"""(?<=[.!?])["')\]]*\s+(?=["'(\[]?[A-Z0-9])""")


@dataclass(frozen=True)
class Question:
    """A question with documents, which are indices into the documents of its pool.

    Attributes:
        query: the question.
        answers: texts that count as an answer.
        documents: documents that the question comes with.
        needed: those of them that hold the answer.
        related: documents to take first as distractors.
    """

    query: str
    answers: tuple[str, ...]
    documents: tuple[int, ...]
    needed: tuple[int, ...]
    related: tuple[int, ...] = ()


@dataclass(frozen=True)
class QuestionPool:
    """The questions of a file, and all its documents."""

    questions: tuple[Question, ...]
    documents: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Digest of the content."""
        return json_digest([[dataclasses.astuple(question) for question in self.questions], self.documents])


@dataclass
class Materials:
    """What samples are made of.

    Attributes:
        essays: text for haystacks, or None.
        words: words for keys, values and lists; None: the English words of the package wonderwords.
        squad, hotpotqa: question pools, or None.
    """

    essays: str | None = None
    words: Sequence[str] | None = None
    squad: QuestionPool | None = None
    hotpotqa: QuestionPool | None = None

    @cached_property
    def essay_words(self) -> list[str]:
        """Words of the essays.

        Raises:
            ConfigError: there are no essays.
        """
        if self.essays is None:
            raise ConfigError("haystack is not given; name texts for the essays with --haystack (files or folders)")
        return self.essays.split()

    @cached_property
    def key_parts(self) -> tuple[list[str], list[str]]:
        """First and second parts of keys: adjectives and nouns, or the two halves of the user's words."""
        if self.words is not None:
            unique = sorted(set(self.words))
            return unique[::2], unique[1::2]
        categories = _wonderwords()
        return sorted(set(categories["adjective"])), sorted(set(categories["noun"]))

    @cached_property
    def common_words(self) -> list[str]:
        """All words, sorted."""
        if self.words is not None:
            return sorted(set(self.words))
        categories = _wonderwords()
        return sorted({word for kind in ("noun", "adjective", "verb") for word in categories[kind]})

    def check_words(self) -> None:
        """Check that there are enough words.

        Raises:
            ConfigError: there are not.
        """
        if len(self.common_words) < MINIMUM_WORDS:
            raise ConfigError(
                f"words has {len(self.common_words)} different words; give at least {MINIMUM_WORDS}, one per line"
            )

    def key(self, kind: str, rng: random.Random) -> str:
        """A random key or value.

        Args:
            kind: ``words``, ``numbers`` (seven digits) or ``uuids``.
            rng: source of randomness.
        """
        if kind == "numbers":
            return random_number(rng)
        if kind == "uuids":
            return str(uuid.UUID(int=rng.getrandbits(128), version=4))
        return self.word_key(rng)

    def word_key(self, rng: random.Random) -> str:
        """A random key such as ``brave-river``."""
        first, second = self.key_parts
        return f"{rng.choice(first)}-{rng.choice(second)}"

    def pool(self, task: str) -> QuestionPool:
        """Questions of ``qa_1`` or ``qa_2``.

        Raises:
            ConfigError: their file is not given.
        """
        pool, option = (self.squad, "squad") if task == SQUAD_TASK else (self.hotpotqa, "hotpotqa")
        if pool is None:
            raise ConfigError(f"{option} is not given; name a file of questions for {task} with --{option}")
        return pool

    def digests(self) -> dict[str, str | None]:
        """Digests of the content, by material; None for what is not given."""
        return {
            "haystack": None if self.essays is None else json_digest(self.essays),
            "words": json_digest(self.common_words),
            "squad": None if self.squad is None else self.squad.digest,
            "hotpotqa": None if self.hotpotqa is None else self.hotpotqa.digest,
        }


def random_number(rng: random.Random) -> str:
    """A random number of seven digits, as RULER's needles hold."""
    return str(rng.randint(10**6, 10**7 - 1))


def _wonderwords() -> dict[str, list[str]]:
    folder = resources.files("wonderwords") / "assets"
    files = {"noun": "nounlist.txt", "adjective": "adjectivelist.txt", "verb": "verblist.txt"}
    lines = {kind: (folder / name).read_text(encoding="utf-8").split("\n") for kind, name in files.items()}
    return {kind: [word.strip() for word in words if word.strip()] for kind, words in lines.items()}


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


def read_materials(
    haystack: Sequence[str],
    words: str | None,
    *,
    squad: str | None = None,
    hotpotqa: str | None = None,
    limits: ReadingConfig = DEFAULT_READING,
) -> Materials:
    """Read materials.

    Args:
        haystack: files, folders or globs of texts; none: no essays.
        words: path of a file with one word per line.
        squad, hotpotqa: paths of question files.
        limits: what is too large, and whether symbolic links are followed.

    Raises:
        DataError: a file cannot be read or holds nothing usable.
    """
    return Materials(
        essays=read_essays(tuple(haystack), limits) if haystack else None,
        words=None if words is None else read_words(words, limits),
        squad=None if squad is None else read_squad(Path(squad), limits),
        hotpotqa=None if hotpotqa is None else read_hotpotqa(Path(hotpotqa), limits),
    )


# Cached: two suites may use the same essays.
@cache
def read_essays(haystack: tuple[str, ...], limits: ReadingConfig = DEFAULT_READING) -> str:
    """Text of all documents, joined.

    Args:
        haystack: files, folders or globs.
        limits: what is too large, and whether symbolic links are followed.

    Raises:
        DataError: no text in them.
    """
    texts = []
    for document in read_documents(find_files(haystack, "other", limits, split=ALL_SPLITS), "text", limits):
        if document.error is None:
            texts.append(document.text)
        else:
            log(f"haystack: {document.name} is skipped ({document.error})")
    essays = "\n".join(texts)
    if not essays.strip():
        raise DataError(f"haystack={', '.join(haystack)} holds no text; name other files")
    return essays


def read_words(path: str, limits: ReadingConfig = DEFAULT_READING) -> list[str]:
    """Words of a file, one per line.

    Raises:
        DataError: it cannot be read.
    """
    try:
        lines = read_bytes(Path(path), limits.max_json_bytes).decode("utf-8-sig").split("\n")
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"--words {path}: cannot be read ({error}); name a text file with one word per line") from None
    return [line.strip() for line in lines if line.strip()]


@dataclass(frozen=True)
class _SquadRow:
    title: str
    context: str
    question: str
    answers: tuple[str, ...]


def read_squad(path: Path, limits: ReadingConfig = DEFAULT_READING) -> QuestionPool:
    """Questions of SQuAD: the published JSON, or rows (JSONL, also .gz) with the hub's columns.

    Raises:
        DataError: the file cannot be read, has another format, or has no question with an answer.
    """
    try:
        rows = _squad_rows(_read_json(path, limits))
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: is not in SQuAD's format ({error!r}); give its JSON, or rows with its columns"
        ) from None
    documents = sorted({row.context for row in rows})
    number = {text: i for i, text in enumerate(documents)}
    # A dict as an ordered set.
    articles: dict[str, dict[int, None]] = {}
    for row in rows:
        articles.setdefault(row.title, {})[number[row.context]] = None
    questions = tuple(
        Question(
            query=row.question,
            answers=row.answers,
            documents=(number[row.context],),
            needed=(number[row.context],),
            related=tuple(i for i in articles[row.title] if i != number[row.context]),
        )
        for row in rows
        if row.answers
    )
    return _pool(questions, documents, path)


def _squad_rows(content: Any) -> list[_SquadRow]:
    if not isinstance(content, dict):
        return [
            _SquadRow(
                title=str(row.get("title")),
                context=_text(row["context"]),
                question=_text(row["question"]),
                answers=tuple(map(_text, row["answers"]["text"])),
            )
            for row in content
        ]
    return [
        _SquadRow(
            title=str(article.get("title")),
            context=_text(paragraph["context"]),
            question=_text(qa["question"]),
            answers=() if qa.get("is_impossible") else tuple(_text(answer["text"]) for answer in qa["answers"]),
        )
        for article in content["data"]
        for paragraph in article["paragraphs"]
        for qa in paragraph["qas"]
    ]


@dataclass(frozen=True)
class _HotpotRow:
    question: str
    answer: str
    titles: tuple[str, ...]
    texts: tuple[str, ...]
    needed_titles: frozenset[str]


def read_hotpotqa(path: Path, limits: ReadingConfig = DEFAULT_READING) -> QuestionPool:
    """Questions of HotpotQA: the published JSON, or rows (JSONL, also .gz), also with the hub's columns.

    Raises:
        DataError: the file cannot be read, has another format, or has no question.
    """
    try:
        rows = [_hotpot_row(row) for row in _read_json(path, limits)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path}: is not in HotpotQA's format ({error!r}); give its JSON, or rows with its columns"
        ) from None
    documents = sorted({text for row in rows for text in row.texts})
    number = {text: i for i, text in enumerate(documents)}
    questions = tuple(
        Question(
            query=row.question,
            answers=(row.answer,),
            documents=tuple(number[text] for text in row.texts),
            needed=tuple(
                number[text]
                for title, text in zip(row.titles, row.texts, strict=True)
                if not row.needed_titles or title in row.needed_titles
            ),
        )
        for row in rows
    )
    return _pool(questions, documents, path)


def _hotpot_row(row: dict[str, Any]) -> _HotpotRow:
    context, facts = row["context"], row.get("supporting_facts", [])
    if isinstance(context, dict):
        # The hub's columns.
        context = list(zip(context["title"], context["sentences"], strict=True))
    return _HotpotRow(
        question=_text(row["question"]),
        answer=_text(row["answer"]),
        titles=tuple(_text(title) for title, _ in context),
        texts=tuple(f"{title}\n{''.join(sentences)}" for title, sentences in context),
        needed_titles=frozenset(
            map(_text, facts["title"] if isinstance(facts, dict) else (title for title, _ in facts))
        ),
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} instead of text")
    return value


def _pool(questions: tuple[Question, ...], documents: list[str], path: Path) -> QuestionPool:
    if not questions:
        raise DataError(f"{path}: has no question with an answer; give another file")
    return QuestionPool(questions, tuple(documents))


def _read_json(path: Path, limits: ReadingConfig) -> Any:
    """Content of a JSON file, or the rows of a JSONL file; either may be gzipped."""
    is_lines = ".jsonl" in path.suffixes[-2:]
    try:
        return _json_lines(path, limits) if is_lines else _whole_json(path, limits)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); name an existing file in UTF-8") from None


def _whole_json(path: Path, limits: ReadingConfig) -> Any:
    text = read_bytes(path, limits.max_json_bytes).decode("utf-8-sig")
    try:
        return parse_json(text, limits.max_json_depth)
    except ValueError as error:
        raise DataError(f"{path}: is not JSON ({error}); rows, one per line, belong in a .jsonl file") from None


def _json_lines(path: Path, limits: ReadingConfig) -> list[Any]:
    rows = []
    with opened(path, limits) as stream:
        for number, line in enumerate(read_json_rows(stream, limits), 1):
            if line.too_long:
                raise DataError(f"{path}, line {number}: {line.too_long}; remove the line, or raise the limit")
            text = line.raw.decode("utf-8")
            if text.strip():
                try:
                    rows.append(parse_json(text, limits.max_json_depth))
                except ValueError as error:
                    raise DataError(f"{path}, line {number}: is not JSON ({error}); fix or remove the line") from None
    return rows


# --------------------------------------------------------------------------------------------------
# Text
# --------------------------------------------------------------------------------------------------


def repeated(words: Sequence[str], count: int) -> str:
    """The first ``count`` words, starting over when they run out."""
    if count <= len(words):
        return " ".join(words[:count])
    return " ".join(words[i % len(words)] for i in range(count))


def sentences_of(text: str) -> list[str]:
    """Sentences: they end in . ! or ?, maybe with a closing quotation mark or bracket, before a capital letter or a digit."""
    sentences: list[str] = []
    start = 0
    for match in _SENTENCE_END.finditer(text):
        end = match.start() + len(match.group().rstrip())
        sentences.append(text[start:end])
        start = match.end()
    sentences.append(text[start:])
    return [sentence for sentence in sentences if sentence]
