"""RULER (arXiv 2404.06654): its thirteen synthetic tasks, made at exact lengths for a tokenizer.

Definitions, templates, answer prefixes, needle kinds, depths, frequencies and scores are the benchmark's. What differs:
- Units are fitted a sample, not once for all samples; where a unit is coarse (a needle of UUIDs, a document of a QA task) and
  1/20 of the length would stay empty, sentences of noise or the beginning of one more document fill it. So lengths are exact.
- A question of a QA task whose own documents do not all fit keeps those that hold its answer; one whose answer does not fit is
  passed over. (The benchmark's are longer than the length, or end the run.)
- Where a length has room for more common words than there are, pairs of them go on (cwe). (The benchmark's samples stay short.)
- Sentences of essays are told apart by a pattern, without a model that would have to be downloaded.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import string
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_longpo.errors import ConfigError, DataError
from megatron_longpo.evaluation.samples import CountPrompt, EvalSample, largest_fit

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NIAH_TEMPLATE = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about the {kind} "
    "afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the provided text?"
)
NIAH_PREFIX = " The special magic {kind} for {query} mentioned in the provided text are"
VT_TEMPLATE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find all "
    "variables that are assigned the value {query} in the text above."
)
# Spelt as the benchmark does.
VT_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assgined the value "
    "{query}, they are: "
)
CWE_TEMPLATE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear most "
    "often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
)
CWE_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
FWE_TEMPLATE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared coded "
    "words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
    "frequently appeared words in the above coded text?"
)
FWE_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
QA_TEMPLATE = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\nThe "
    "following are given documents.\n\n{context}\n\nAnswer the question based on the given documents. Only give me the answer "
    "and do not output any other words.\n\nQuestion: {query}"
)
QA_PREFIX = " Answer:"

# Where needles may stand, in percent of an essay's sentences: forty places.
DEPTHS = tuple(round(100 * i / 39) for i in range(40))
# Below this share of a length, what is left empty is filled.
_FILLED = 0.96


@dataclass(frozen=True)
class Niah:
    """One of the needle tasks.

    Attributes:
        haystack: ``noise``, ``essay`` or ``needle`` (of distracting needles).
        keys, values: kinds: ``words``, ``numbers`` or ``uuids``.
        key_count: needles with a key of their own; value_count: values of a key; query_count: keys asked for.
    """

    haystack: str
    keys: str = "words"
    values: str = "numbers"
    key_count: int = 1
    value_count: int = 1
    query_count: int = 1


NIAH = {
    "niah_single_1": Niah("noise"),
    "niah_single_2": Niah("essay"),
    "niah_single_3": Niah("essay", values="uuids"),
    "niah_multikey_1": Niah("essay", key_count=4),
    "niah_multikey_2": Niah("needle"),
    "niah_multikey_3": Niah("needle", keys="uuids", values="uuids"),
    "niah_multivalue": Niah("essay", value_count=4),
    "niah_multiquery": Niah("essay", key_count=4, query_count=4),
}
# Tokens of an answer.
MAX_TOKENS = {**dict.fromkeys(NIAH, 128), "vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
TASKS = tuple(MAX_TOKENS)
# Of a task's samples and scores; cwe 2: its example as the benchmark joins it.
VERSIONS = {**dict.fromkeys(TASKS, 1), "cwe": 2}
GROUPS = {
    **dict.fromkeys(NIAH, "NIAH"),
    "vt": "VT",
    "cwe": "AGG",
    "fwe": "AGG",
    "qa_1": "QA",
    "qa_2": "QA",
}


# --------------------------------------------------------------------------------------------------
# What the samples are made of
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """Of a QA task: its documents are numbers in the task's pool.

    Attributes:
        query, answers: the question and what counts as an answer.
        documents: those that it comes with; needed: those of them that it cannot do without.
        related: others to be taken first as distractors.
    """

    query: str
    answers: tuple[str, ...]
    documents: tuple[int, ...]
    needed: tuple[int, ...]
    related: tuple[int, ...] = ()


@dataclass(frozen=True)
class QuestionPool:
    """Questions of one file, and all its documents."""

    questions: tuple[Question, ...]
    documents: tuple[str, ...]


@dataclass
class Materials:
    """Texts and words that samples are made of.

    Attributes:
        essays: text of haystacks, or None.
        words: of keys, values and common words; None: English words of the package wonderwords.
        squad, hotpotqa: question pools, or None.
    """

    essays: str | None = None
    words: Sequence[str] | None = None
    squad: QuestionPool | None = None
    hotpotqa: QuestionPool | None = None

    @cached_property
    def essay_words(self) -> list[str]:
        if self.essays is None:
            raise ConfigError(
                "haystack is not given; name texts for the essay tasks with --haystack (files or folders)"
            )
        return self.essays.split()

    @cached_property
    def key_parts(self) -> tuple[list[str], list[str]]:
        """First and second parts of keys: adjectives and nouns."""
        if self.words is not None:
            unique = sorted(set(self.words))
            return unique[::2], unique[1::2]
        categories = _wonderwords()
        return sorted(set(categories["adjective"])), sorted(set(categories["noun"]))

    @cached_property
    def common_words(self) -> list[str]:
        if self.words is not None:
            return sorted(set(self.words))
        categories = _wonderwords()
        return sorted({w for kind in ("noun", "adjective", "verb") for w in categories[kind]})

    def key(self, kind: str, rng: random.Random) -> str:
        if kind == "numbers":
            return str(rng.randint(10**6, 10**7 - 1))
        if kind == "uuids":
            return str(uuid.UUID(int=rng.getrandbits(128), version=4))
        first, second = self.key_parts
        return f"{rng.choice(first)}-{rng.choice(second)}"

    def pool(self, task: str) -> QuestionPool:
        found, flag = (self.squad, "squad") if task == "qa_1" else (self.hotpotqa, "hotpotqa")
        if found is None:
            raise ConfigError(f"{flag} is not given; name a file of questions for {task} with --{flag}")
        return found

    def check(self, tasks: Sequence[str]) -> None:
        """Whether all tasks have what they need.

        Raises:
            ConfigError: not a task, or something is missing.
        """
        for task in tasks:
            if task not in TASKS:
                raise ConfigError(f"ruler_tasks has {task!r}, which is none of {', '.join(TASKS)}")
            if task in ("qa_1", "qa_2"):
                self.pool(task)
            elif task in NIAH and NIAH[task].haystack == "essay":
                _ = self.essay_words
        if len(self.common_words) < 60:
            raise ConfigError(f"words has {len(self.common_words)} different words; give at least 60, one a line")


def _wonderwords() -> dict[str, list[str]]:
    from importlib import resources

    folder = resources.files("wonderwords") / "assets"
    kinds = {"noun": "nounlist.txt", "adjective": "adjectivelist.txt", "verb": "verblist.txt"}
    read = {k: (folder / name).read_text(encoding="utf-8").split("\n") for k, name in kinds.items()}
    return {k: [w.strip() for w in words if w.strip()] for k, words in read.items()}


def read_squad(path: Path) -> QuestionPool:
    """Questions of SQuAD: the published JSON, or rows (JSONL, .gz too) with the hub's columns.

    Raises:
        DataError: no such file, another format, or no question that can be answered.
    """
    rows: list[tuple[str, str, str, list[str]]] = []
    try:
        content = _read_json(path)
        if isinstance(content, dict):
            for article in content["data"]:
                for paragraph in article["paragraphs"]:
                    for qa in paragraph["qas"]:
                        texts = [] if qa.get("is_impossible") else [a["text"] for a in qa["answers"]]
                        rows.append((str(article.get("title")), paragraph["context"], qa["question"], texts))
        else:
            rows = [(str(r.get("title")), r["context"], r["question"], list(r["answers"]["text"])) for r in content]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: is not in SQuAD's format ({error!r}); give its JSON, or rows with its columns"
        ) from None
    documents = sorted({context for _, context, _, _ in rows})
    number = {text: i for i, text in enumerate(documents)}
    articles: dict[str, dict[int, None]] = {}
    for title, context, _, _ in rows:
        articles.setdefault(title, {})[number[context]] = None
    questions = tuple(
        Question(
            query,
            tuple(answers),
            (number[context],),
            (number[context],),
            tuple(i for i in articles[title] if i != number[context]),
        )
        for title, context, query, answers in rows
        if answers
    )
    return _pool(questions, documents, path)


def read_hotpotqa(path: Path) -> QuestionPool:
    """Questions of HotpotQA: the published JSON, or rows (JSONL, .gz too), also with the hub's columns.

    Raises:
        DataError: no such file, another format, or no question.
    """
    found: list[tuple[str, str, list[tuple[str, str]], set[str]]] = []
    try:
        for row in _read_json(path):
            context, facts = row["context"], row.get("supporting_facts", [])
            if isinstance(context, dict):
                context = list(zip(context["title"], context["sentences"], strict=True))
            titles = set(facts["title"]) if isinstance(facts, dict) else {title for title, _ in facts}
            texts = [(title, f"{title}\n{''.join(sentences)}") for title, sentences in context]
            found.append((row["question"], row["answer"], texts, titles))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path}: is not in HotpotQA's format ({error!r}); give its JSON, or rows with its columns"
        ) from None
    documents = sorted({text for _, _, texts, _ in found for _, text in texts})
    number = {text: i for i, text in enumerate(documents)}
    questions = tuple(
        Question(
            query,
            (answer,),
            tuple(number[text] for _, text in texts),
            tuple(number[text] for title, text in texts if not titles or title in titles),
        )
        for query, answer, texts, titles in found
    )
    return _pool(questions, documents, path)


def _pool(questions: tuple[Question, ...], documents: list[str], path: Path) -> QuestionPool:
    if not questions:
        raise DataError(f"{path}: has no question with an answer; give another file")
    return QuestionPool(questions, tuple(documents))


def _read_json(path: Path) -> Any:
    import gzip

    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); name an existing file in UTF-8") from None
    if ".jsonl" not in path.suffixes[-2:]:
        try:
            return json.loads(text)
        except ValueError as error:
            raise DataError(f"{path}: is not JSON ({error}); rows, one a line, belong into a .jsonl file") from None
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise DataError(f"{path}, line {number}: is not JSON ({error}); mend or remove the line") from None
    return rows


# --------------------------------------------------------------------------------------------------
# Samples
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Built:
    message: str
    prefix: str
    references: tuple[str, ...]
    details: dict[str, Any] = field(default_factory=dict)


class Ruler:
    """Makes samples.

    Args:
        materials: texts and words.
        count: tokens of a prompt.
        seed: of all samples; a sample depends on it, its task, length and index alone.
    """

    def __init__(self, materials: Materials, count: CountPrompt, seed: int) -> None:
        self.materials, self.count, self.seed = materials, count, seed
        # Units that fitted the first sample of a task and length: the search for the others begins there. The first one's
        # alone, so that a sample is the same whatever was made before it.
        self._fitted: dict[tuple[str, int, str], int] = {}
        self._is_first = False
        self._orders: dict[str, list[int]] = {}
        self._fitting: dict[tuple[str, int], tuple[list[tuple[Question, tuple[int, ...]]], int]] = {}

    def sample(self, task: str, length: int, index: int) -> EvalSample:
        """The sample of that number.

        Raises:
            DataError: the length is too small for the task, or its questions are all used.
        """
        if index and (task, length, "units") not in self._fitted:
            self.sample(task, length, 0)
        self._is_first = index == 0
        budget = length - MAX_TOKENS[task]
        name = f"{self.seed}/{task}/{length}/{index}"
        try:
            if task in NIAH:
                built, tokens = self._niah(task, NIAH[task], length, budget, name)
            elif task in ("qa_1", "qa_2"):
                built, tokens = self._qa(task, length, budget, index, name)
            else:
                make = {"vt": self._vt, "cwe": self._cwe, "fwe": self._fwe}[task]
                built, tokens = make(length, budget, name)
        except DataError as error:
            raise DataError(f"{task} at {length} tokens: {error}; ask for longer samples") from None
        return EvalSample(
            "ruler",
            task,
            length,
            index,
            built.message,
            built.prefix,
            built.references,
            "string_match_part" if GROUPS[task] == "QA" else "string_match_all",
            MAX_TOKENS[task],
            tokens,
            built.details,
        )

    def _fit(
        self, what: tuple[str, int, str], build: Callable[[int], _Built], budget: int, start: int, least: int = 0
    ) -> tuple[int, _Built, int]:
        if not self._is_first:
            start = self._fitted.get(what, start)
        found = largest_fit(build, lambda b: self.count(b.message, b.prefix), budget, start=start, least=least)
        if self._is_first:
            self._fitted.setdefault(what, found[0])
        return found

    # ---------------------------------------------------------------------------------- needles

    def _niah(self, task: str, spec: Niah, length: int, budget: int, name: str) -> tuple[_Built, int]:
        rng = random.Random(name)
        m = self.materials
        keys = [m.key(spec.keys, rng) for _ in range(spec.key_count)]
        values = [[m.key(spec.values, rng) for _ in range(spec.value_count)] for _ in keys]
        needles = [
            NEEDLE.format(kind=spec.values, key=k, value=v) for k, vs in zip(keys, values, strict=True) for v in vs
        ]
        rng.shuffle(needles)
        asked = rng.sample(range(len(keys)), spec.query_count)
        queries = [keys[i] for i in asked]
        query = ", ".join(queries[:-1]) + ", and " + queries[-1] if len(queries) > 1 else queries[0]
        references = tuple(v for i in asked for v in values[i])
        template, prefix, kind = NIAH_TEMPLATE, NIAH_PREFIX, spec.values
        if spec.query_count * spec.value_count == 1:
            # One needle is asked for: the sentences are put in the singular.
            template = template.replace("Some", "A").replace("are all", "is").replace("are", "is")
            prefix, kind = prefix.replace("are", "is"), kind[:-1]
        depths = sorted(rng.sample(DEPTHS, len(needles)))
        places = [rng.random() for _ in needles]
        distractor_seed = rng.random()

        def build(units: int, noise: int = 0) -> _Built:
            if spec.haystack == "essay":
                context = self._in_essay(units, needles, depths)
                where: list[float] = list(depths)
            else:
                if spec.haystack == "noise":
                    lines = [NOISE] * units
                else:
                    lines = self._distractors(spec, units, distractor_seed)
                    lines = _spread(lines, [NOISE] * noise, random.Random(distractor_seed))
                # Each needle stands before one of the lines; none has two.
                spots = _different(places, len(lines))
                for spot, needle in sorted(zip(spots, needles, strict=True), reverse=True):
                    lines.insert(spot, needle)
                where = [round(100 * s / max(1, len(lines) - 1), 1) for s in sorted(spots)]
                context = "\n".join(lines)
            message = template.format(kind=kind, context=context, query=query)
            return _Built(message, prefix.format(kind=kind, query=query), references, {"depths": where})

        start = {"essay": budget * 3 // 4, "noise": budget // 24, "needle": budget // 40}[spec.haystack]
        units, built, tokens = self._fit((task, length, "units"), build, budget, start, least=len(needles))
        if spec.haystack == "needle" and tokens < _FILLED * length - MAX_TOKENS[task]:
            _, built, tokens = self._fit((task, length, "noise"), lambda n: build(units, n), budget, 1)
        return built, tokens

    def _in_essay(self, words: int, needles: Sequence[str], depths: Sequence[int]) -> str:
        sentences = sentences_of(repeated(self.materials.essay_words, words))
        parts: list[str] = []
        last = 0
        for needle, depth in zip(needles, depths, strict=True):
            place = int(len(sentences) * depth / 100)
            parts += [*sentences[last:place], needle]
            last = place
        return " ".join([*parts, *sentences[last:]])

    def _distractors(self, spec: Niah, units: int, seed: float) -> list[str]:
        rng, m = random.Random(seed), self.materials
        return [
            NEEDLE.format(kind=spec.values, key=m.key(spec.keys, rng), value=m.key(spec.values, rng))
            for _ in range(units)
        ]

    # ---------------------------------------------------------------------------------- variables

    def _vt(self, length: int, budget: int, name: str) -> tuple[_Built, int]:
        rng = random.Random(name)
        # An example of at most 500 tokens stands before the question: its chain has names of three letters.
        example = _Chain.make(rng, letters=3)
        seed = rng.random()

        def build_example(noises: int) -> _Built:
            message = VT_TEMPLATE.format(context=example.context(noises, seed), query=example.value)
            prefix = VT_PREFIX.format(count=len(example.names), query=example.value)
            return _Built(message + prefix + " " + " ".join(example.names) + "\n\n\n\n", "", ())

        _, shown, _ = self._fit(("vt", length, "example"), build_example, 500 - MAX_TOKENS["vt"], 12, least=1)
        chain = _Chain.make(rng, letters=5)

        def build(noises: int) -> _Built:
            message = shown.message + VT_TEMPLATE.format(context=chain.context(noises, seed), query=chain.value)
            prefix = VT_PREFIX.format(count=len(chain.names), query=chain.value)
            return _Built(message, prefix, tuple(chain.names))

        _, built, tokens = self._fit(("vt", length, "units"), build, budget, budget // 24, least=1)
        return built, tokens

    # ---------------------------------------------------------------------------------- frequencies

    def _cwe(self, length: int, budget: int, name: str) -> tuple[_Built, int]:
        short = length < 4096
        example_numbers = (20, 3, 1) if short else (40, 10, 3)
        common, rare = (6, 1) if short else (30, 3)
        rng = random.Random(name)
        vocabulary = list(self.materials.common_words)
        rng.shuffle(vocabulary)
        listed, top = _word_list(rng.sample(vocabulary, example_numbers[0]), *example_numbers[1:], rng)
        example = CWE_TEMPLATE.format(context=listed) + CWE_PREFIX + _numbered(top)
        seed = rng.random()

        def build(words: int) -> _Built:
            # Beyond the vocabulary, pairs of its words: the nth time round with the nth next one.
            size = len(vocabulary)
            more = (f"{vocabulary[k % size]}-{vocabulary[(k + k // size + 1) % size]}" for k in range(words - size))
            chosen = [*vocabulary[:words], *more]
            context, top = _word_list(chosen, common, rare, random.Random(seed))
            return _Built(example + "\n" + CWE_TEMPLATE.format(context=context), CWE_PREFIX, tuple(top))

        _, built, tokens = self._fit(("cwe", length, "units"), build, budget, budget // (7 * rare), least=11)
        return built, tokens

    def _fwe(self, length: int, budget: int, name: str) -> tuple[_Built, int]:
        rng = random.Random(name)
        size = max(4, length // 50)
        coded: dict[str, None] = {}
        while len(coded) < size:
            coded["".join(rng.choices(string.ascii_lowercase, k=6))] = None
        # The most frequent is noise.
        vocabulary = ["...", *list(coded)[1:]]
        seed = rng.random()

        def build(words: int) -> _Built:
            counts = [int(words / (math.pi**2 / 6) / rank**2) for rank in range(1, size + 1)]
            text = [word for word, n in zip(vocabulary, counts, strict=True) for _ in range(n)]
            random.Random(seed).shuffle(text)
            return _Built(FWE_TEMPLATE.format(context=" ".join(text)), FWE_PREFIX, tuple(vocabulary[1:4]))

        _, built, tokens = self._fit(("fwe", length, "units"), build, budget, budget // 3, least=40)
        return built, tokens

    # ---------------------------------------------------------------------------------- questions

    def _qa(self, task: str, length: int, budget: int, index: int, name: str) -> tuple[_Built, int]:
        pool = self.materials.pool(task)
        if task not in self._orders:
            order = list(range(len(pool.questions)))
            random.Random(f"{self.seed}/{task}").shuffle(order)
            self._orders[task] = order
        # The questions of a length are, in one order for all lengths, those whose documents fit: each once.
        fitting, seen = self._fitting.setdefault((task, length), ([], 0))
        while len(fitting) <= index and seen < len(pool.questions):
            question = pool.questions[self._orders[task][seen]]
            seen += 1
            for documents in dict.fromkeys((question.documents, question.needed)):
                texts = [pool.documents[i] for i in documents]
                if self.count(_qa_message(texts, question.query), QA_PREFIX) <= budget:
                    fitting.append((question, documents))
                    break
        self._fitting[task, length] = (fitting, seen)
        if index >= len(fitting):
            raise DataError(
                f"{len(fitting)} of {len(pool.questions)} questions fit with their documents, and more are asked for"
            )
        return self._ask(task, pool, *fitting[index], length, budget, name)

    def _ask(
        self,
        task: str,
        pool: QuestionPool,
        question: Question,
        documents: tuple[int, ...],
        length: int,
        budget: int,
        name: str,
    ) -> tuple[_Built, int]:
        rng = random.Random(name)
        related = [i for i in (*question.documents, *question.related) if i not in documents]
        rng.shuffle(related)
        taken = {*documents, *related}
        # Far more than will fit, without listing a large pool once a sample.
        others = [i for i in rng.sample(range(len(pool.documents)), len(pool.documents)) if i not in taken]
        distractors = related + others
        seed = rng.random()

        def build(count: int, words: int = 0) -> _Built:
            texts = [pool.documents[i] for i in (*documents, *distractors[:count])]
            # A pool that is too small for the length is gone through again.
            again = distractors or list(documents)
            texts += [pool.documents[again[i % len(again)]] for i in range(count - len(distractors))]
            if words:
                more = distractors[count] if count < len(distractors) else again[count % len(again)]
                texts.append(" ".join(pool.documents[more].split(" ")[:words]))
            random.Random(seed).shuffle(texts)
            return _Built(_qa_message(texts, question.query), QA_PREFIX, question.answers)

        mean = max(20, sum(len(d) for d in pool.documents[:200]) // min(200, len(pool.documents)) // 4)
        count, built, tokens = self._fit((task, length, "units"), build, budget, budget // mean)
        if tokens < _FILLED * length - MAX_TOKENS[task]:
            _, built, tokens = self._fit((task, length, "words"), lambda n: build(count, n), budget, 40)
        return built, tokens


def _qa_message(texts: Sequence[str], query: str) -> str:
    context = "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(texts, 1))
    return QA_TEMPLATE.format(context=context, query=query)


@dataclass(frozen=True)
class _Chain:
    """Variables of which each is assigned the one before; the first is a number."""

    names: list[str]
    value: str
    lines: list[str]

    @classmethod
    def make(cls, rng: random.Random, *, letters: int, hops: int = 4) -> _Chain:
        names: dict[str, None] = {}
        while len(names) < hops + 1:
            names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
        ordered = list(names)
        value = str(rng.randint(10000, 99998))
        lines = [f"VAR {ordered[0]} = {value}"]
        lines += [f"VAR {name} = VAR {before} " for before, name in itertools.pairwise(ordered)]
        return cls(ordered, value, lines)

    def context(self, noises: int, seed: float) -> str:
        """Noise with the assignments at random places, in their order."""
        sentences = [NOISE + "\n"] * noises
        if len(sentences) <= len(self.lines):
            # Too few places: between the sentences of the noise.
            sentences = [s + "." if s.strip() else s for noise in sentences for s in noise.split(".")]
        places = sorted(random.Random(seed).sample(range(len(sentences)), len(self.lines)))
        for shift, (place, line) in enumerate(zip(places, self.lines, strict=True)):
            sentences.insert(place + shift, line)
        return " ".join(sentences).replace(". \n", ".\n")


def _word_list(words: list[str], common: int, rare: int, rng: random.Random) -> tuple[str, list[str]]:
    """The first ten words often, the others seldom, shuffled and numbered; and the ten."""
    top = words[:10]
    listed = top * common + words[10:] * rare
    rng.shuffle(listed)
    return _numbered(listed), top


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def _spread(lines: list[str], more: Sequence[str], rng: random.Random) -> list[str]:
    for line in more:
        lines.insert(rng.randint(0, len(lines)), line)
    return lines


def _different(places: Sequence[float], count: int) -> list[int]:
    """Different numbers below ``count`` nearest to shares of it."""
    taken: list[int] = []
    for place in places:
        spot = int(place * count)
        while spot in taken:
            spot = (spot + 1) % count
        taken.append(spot)
    return taken


def repeated(words: Sequence[str], count: int) -> str:
    """The first ``count`` words, from the beginning again where there are not so many."""
    if count <= len(words):
        return " ".join(words[:count])
    return " ".join(words[i % len(words)] for i in range(count))


_SENTENCE_END = re.compile(r"""(?<=[.!?])["')\]]*\s+(?=["'(\[]?[A-Z0-9])""")


def sentences_of(text: str) -> list[str]:
    """Sentences: they end in . ! or ?, perhaps closed by a quotation mark or bracket, before a capital or a figure."""
    pieces: list[str] = []
    start = 0
    for match in _SENTENCE_END.finditer(text):
        end = match.start() + len(match.group().rstrip())
        pieces.append(text[start:end])
        start = match.end()
    pieces.append(text[start:])
    return [p for p in pieces if p]
