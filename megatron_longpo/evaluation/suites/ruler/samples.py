"""Makes RULER's samples at exact lengths."""

from __future__ import annotations

import itertools
import math
import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_longpo.errors import DataError
from megatron_longpo.evaluation.materials import Materials, Question, QuestionPool, repeated, sentences_of
from megatron_longpo.evaluation.samples import CountPrompt, EvalSample, Fit, largest_fit
from megatron_longpo.evaluation.suites.ruler.definitions import (
    CWE_PREFIX,
    CWE_TEMPLATE,
    DEFINITIONS,
    DEPTHS,
    FWE_PREFIX,
    FWE_TEMPLATE,
    GROUPS,
    MAX_TOKENS,
    NEEDLE,
    NIAH,
    NIAH_PREFIX,
    NIAH_PREFIX_OF_ONE,
    NIAH_TEMPLATE,
    NIAH_TEMPLATE_OF_ONE,
    NOISE,
    PRESENT,
    QA_PREFIX,
    QA_TEMPLATE,
    VT_PREFIX,
    VT_TEMPLATE,
    Definitions,
    Niah,
)

# Below this share of a length, what coarse units leave empty is filled.
_FILLED = 0.96
# First guesses of the search for a length: tokens per unit. A better guess saves a few tokenisations, nothing else; but another
# one may end at another number of units, so a change makes other samples.
_TOKENS_PER_NOISE = 24
_TOKENS_PER_DISTRACTOR = 40
_TOKENS_PER_LISTED_WORD = 7
_TOKENS_PER_CODED_WORD = 3
_CHARACTERS_PER_TOKEN = 4
_LEAST_DOCUMENT_TOKENS = 20
_DOCUMENTS_MEASURED = 200
_FIRST_FILLING_WORDS = 40
# The worked example in front of a vt question: most tokens, and the first guess of its sentences of noise.
_VT_EXAMPLE_TOKENS = 500
_VT_EXAMPLE_NOISE = 12
# The benchmark's chains: variables after the first, and letters of a name in the example and in the question.
_VT_HOPS = 4
_VT_EXAMPLE_LETTERS, _VT_LETTERS = 3, 5
# Below this length cwe lists fewer words, each less often.
_CWE_SHORT = 4096
# Frequencies of fwe follow the zeta distribution with exponent 2, whose sum is pi^2 / 6.
_ZETA_2 = math.pi**2 / 6


@dataclass(frozen=True)
class _Question:
    """A sample without its place in the suite."""

    message: str
    prefix: str
    references: tuple[str, ...]
    details: dict[str, Any] = field(default_factory=dict)


class Ruler:
    """Makes samples.

    Args:
        materials: texts and words.
        count: counts the tokens of a prompt.
        seed: seed of all samples. A sample depends on it, its task, its length and its index only.
        definitions: version of the benchmark.
        shuffles_questions: draw the order of questions by seed, instead of the file's.
    """

    def __init__(
        self,
        materials: Materials,
        count: CountPrompt,
        seed: int,
        *,
        definitions: Definitions = DEFINITIONS[PRESENT],
        shuffles_questions: bool = False,
    ) -> None:
        self.materials, self.count, self.seed = materials, count, seed
        self.definitions = definitions
        self.shuffles_questions = shuffles_questions or definitions.shuffles_questions
        # Units that fitted the first sample of a task and length: the search for the others begins there. Only the first
        # sample's, so that a sample is the same whatever was made before it.
        self._fitted: dict[tuple[str, int, str], int] = {}
        self._is_first = False
        self._orders: dict[str, list[int]] = {}
        self._fitting: dict[tuple[str, int], tuple[list[tuple[Question, tuple[int, ...]]], int]] = {}

    def sample(self, task: str, length: int, index: int) -> EvalSample:
        """Make a sample.

        Args:
            task: one of ``TASKS``.
            length: tokens of prompt and answer together.
            index: number of the sample.

        Raises:
            DataError: the length is too small for the task, or there are not enough questions.
        """
        if index and (task, length, "units") not in self._fitted:
            self.sample(task, length, 0)
        self._is_first = index == 0
        budget = length - MAX_TOKENS[task]
        name = f"{self.seed}/{task}/{length}/{index}"
        try:
            if task in NIAH:
                fit = self._niah(task, length, budget, name)
            elif GROUPS[task] == "QA":
                fit = self._qa(task, length, budget, index, name)
            else:
                make = {"vt": self._vt, "cwe": self._cwe, "fwe": self._fwe}[task]
                fit = make(length, budget, name)
        except DataError as error:
            raise DataError(f"{task} at {length} tokens: {error}; ask for longer samples") from None
        return EvalSample(
            suite="ruler",
            task=task,
            length=length,
            index=index,
            message=fit.built.message,
            prefix=fit.built.prefix,
            references=fit.built.references,
            scorer="string_match_part" if GROUPS[task] == "QA" else "string_match_all",
            max_tokens=MAX_TOKENS[task],
            prompt_tokens=fit.tokens,
            details=fit.built.details,
        )

    def _fit(
        self,
        what: tuple[str, int, str],
        build: Callable[[int], _Question],
        budget: int,
        *,
        start: int,
        least: int = 0,
        count: Callable[[_Question], int] | None = None,
    ) -> Fit[_Question]:
        """``largest_fit`` from the first sample's units; ``what`` names the task, the length and the unit."""
        if not self._is_first:
            start = self._fitted.get(what, start)
        count = count or (lambda q: self.count(q.message, q.prefix))
        fit = largest_fit(build, count, budget, start=start, least=least)
        if self._is_first:
            self._fitted.setdefault(what, fit.units)
        return fit

    # ---------------------------------------------------------------------------------- needles

    def _niah(self, task: str, length: int, budget: int, name: str) -> Fit[_Question]:
        spec, materials, rng = NIAH[task], self.materials, random.Random(name)
        keys = [materials.key(spec.keys, rng) for _ in range(spec.key_count)]
        values = [[materials.key(spec.values, rng) for _ in range(spec.value_count)] for _ in keys]
        needles = [
            NEEDLE.format(kind=spec.values, key=key, value=value)
            for key, values_of_key in zip(keys, values, strict=True)
            for value in values_of_key
        ]
        rng.shuffle(needles)
        asked = rng.sample(range(len(keys)), spec.query_count)
        queries = [keys[i] for i in asked]
        query = ", ".join(queries[:-1]) + ", and " + queries[-1] if len(queries) > 1 else queries[0]
        references = tuple(value for i in asked for value in values[i])
        template, prefix, kind = NIAH_TEMPLATE, NIAH_PREFIX, spec.values
        if len(references) == 1:
            template, prefix, kind = NIAH_TEMPLATE_OF_ONE, NIAH_PREFIX_OF_ONE, kind[:-1]
        depths = sorted(rng.sample(DEPTHS, len(needles)))
        places = [rng.random() for _ in needles]
        distractor_seed = rng.random()

        def build(units: int, noise: int = 0) -> _Question:
            if spec.haystack == "essay":
                context = self._in_essay(units, needles, depths)
                stand: list[float] = list(depths)
            else:
                if spec.haystack == "noise":
                    lines = [NOISE] * units
                else:
                    lines = self._distractors(spec, units, distractor_seed)
                    lines = _spread(lines, [NOISE] * noise, random.Random(distractor_seed))
                # Each needle stands before one of the lines, no two before the same line.
                spots = _distinct_spots(places, len(lines))
                for spot, needle in sorted(zip(spots, needles, strict=True), reverse=True):
                    lines.insert(spot, needle)
                stand = [round(100 * spot / max(1, len(lines) - 1), 1) for spot in sorted(spots)]
                context = "\n".join(lines)
            message = template.format(kind=kind, context=context, query=query)
            return _Question(message, prefix.format(kind=kind, query=query), references, {"depths": stand})

        # Essays are measured in words, of about 4/3 tokens.
        start = {
            "essay": budget * 3 // 4,
            "noise": budget // _TOKENS_PER_NOISE,
            "needle": budget // _TOKENS_PER_DISTRACTOR,
        }[spec.haystack]
        fit = self._fit((task, length, "units"), build, budget, start=start, least=len(needles))
        if spec.haystack == "needle" and fit.tokens < _FILLED * length - MAX_TOKENS[task]:
            fit = self._fit((task, length, "noise"), lambda noise: build(fit.units, noise), budget, start=1)
        return fit

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
        rng, materials = random.Random(seed), self.materials
        return [
            NEEDLE.format(kind=spec.values, key=materials.key(spec.keys, rng), value=materials.key(spec.values, rng))
            for _ in range(units)
        ]

    # ---------------------------------------------------------------------------------- variables

    def _vt(self, length: int, budget: int, name: str) -> Fit[_Question]:
        rules, rng = self.definitions, random.Random(name)
        value = None
        if not rules.vt_example_redrawn:
            value = _Chain.number(random.Random(f"{self.seed}/vt/{length}/example"))
        example = _Chain.make(rng, letters=_VT_EXAMPLE_LETTERS, value=value)
        seed = rng.random()
        shown = self._vt_example(length, example, seed)
        chain = _Chain.make(rng, letters=_VT_LETTERS)
        question_seed = rng.random() if rules.vt_independent else seed

        def build(noises: int) -> _Question:
            asked = self._vt_question(chain, noises, question_seed)
            return replace(asked, message=shown + asked.message)

        least = self._vt_least_noises()
        return self._fit(("vt", length, "units"), build, budget, start=budget // _TOKENS_PER_NOISE, least=least)

    def _vt_example(self, length: int, chain: _Chain, seed: float) -> str:
        """The worked example in front of a question."""
        rules = self.definitions
        step = rules.vt_example_step
        budget = _VT_EXAMPLE_TOKENS - (0 if rules.vt_example_counts == "question" else MAX_TOKENS["vt"])
        template_tokens = 0 if rules.vt_example_counts == "prompt" else self.count("", "")

        def text(built: _Question) -> str:
            return built.message + built.prefix + " " + " ".join(built.references) + rules.vt_example_end

        def count(built: _Question) -> int:
            counted = built.message + built.prefix if rules.vt_example_counts == "question" else text(built)
            return self.count(counted, "") - template_tokens

        def build(units: int) -> _Question:
            return self._vt_question(chain, step * units, seed)

        least = -(-self._vt_least_noises() // step)
        # As in the benchmark, the smallest example is taken even where a tokenizer makes more tokens of it.
        budget = max(budget, count(build(least)))
        what = ("vt", length, "example")
        return text(self._fit(what, build, budget, start=_VT_EXAMPLE_NOISE // step, least=least, count=count).built)

    def _vt_question(self, chain: _Chain, noises: int, seed: float) -> _Question:
        rules = self.definitions
        message = VT_TEMPLATE.format(context=chain.context(noises, seed, rules.vt_separator), query=chain.value)
        prefix = VT_PREFIX.format(count=len(chain.names), assigned=rules.vt_assigned, query=chain.value)
        return _Question(message, prefix, tuple(chain.names))

    def _vt_least_noises(self) -> int:
        # Joined by blanks, assignments may also stand between the sentences of a line of noise.
        return 1 if self.definitions.vt_separator == " " else _VT_HOPS + 1

    # ---------------------------------------------------------------------------------- frequencies

    def _cwe(self, length: int, budget: int, name: str) -> Fit[_Question]:
        short = length < _CWE_SHORT
        # Words of the example, and how often the common and the rare ones are listed; then the same of the question.
        example_words, example_common, example_rare = (20, 3, 1) if short else (40, 10, 3)
        common, rare = (6, 1) if short else (30, 3)
        rng = random.Random(name)
        vocabulary = list(self.materials.common_words)
        rng.shuffle(vocabulary)
        listed, top = _word_list(rng.sample(vocabulary, example_words), example_common, example_rare, rng)
        space = self.definitions.cwe_example_space
        example = CWE_TEMPLATE.format(context=listed) + CWE_PREFIX + space + _numbered(top)
        seed = rng.random()

        def build(words: int) -> _Question:
            # Beyond the vocabulary, pairs of its words: in round n each word with the one n places further on.
            size = len(vocabulary)
            pairs = (f"{vocabulary[k % size]}-{vocabulary[(k + k // size + 1) % size]}" for k in range(words - size))
            chosen = [*vocabulary[:words], *pairs]
            context, top = _word_list(chosen, common, rare, random.Random(seed))
            return _Question(example + "\n" + CWE_TEMPLATE.format(context=context), CWE_PREFIX, tuple(top))

        start = budget // (_TOKENS_PER_LISTED_WORD * rare)
        # Ten common words, and a rare one.
        return self._fit(("cwe", length, "units"), build, budget, start=start, least=11)

    def _fwe(self, length: int, budget: int, name: str) -> Fit[_Question]:
        rng = random.Random(name)
        size = max(4, (length - (MAX_TOKENS["fwe"] if self.definitions.fwe_reserves else 0)) // 50)
        # A dict as an ordered set.
        coded: dict[str, None] = {}
        while len(coded) < size:
            coded["".join(rng.choices(string.ascii_lowercase, k=6))] = None
        # The most frequent word is noise.
        vocabulary = ["...", *list(coded)[1:]]
        seed = rng.random()

        def build(words: int) -> _Question:
            counts = [int(words / _ZETA_2 / rank**2) for rank in range(1, size + 1)]
            text = [word for word, n in zip(vocabulary, counts, strict=True) for _ in range(n)]
            random.Random(seed).shuffle(text)
            return _Question(FWE_TEMPLATE.format(context=" ".join(text)), FWE_PREFIX, tuple(vocabulary[1:4]))

        # With 40 words the fourth most frequent one occurs at all.
        return self._fit(("fwe", length, "units"), build, budget, start=budget // _TOKENS_PER_CODED_WORD, least=40)

    # ---------------------------------------------------------------------------------- questions

    def _qa(self, task: str, length: int, budget: int, index: int, name: str) -> Fit[_Question]:
        pool = self.materials.pool(task)
        if task not in self._orders:
            order = list(range(len(pool.questions)))
            if self.shuffles_questions:
                random.Random(f"{self.seed}/{task}").shuffle(order)
            self._orders[task] = order
        # The questions of a length are those whose documents fit, each once, in an order that all lengths share.
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
                f"{len(fitting)} of {len(pool.questions)} questions fit with their documents, and {index + 1} are needed"
            )
        question, documents = fitting[index]
        return self._ask(task, length, budget, name, question=question, documents=documents)

    def _ask(
        self, task: str, length: int, budget: int, name: str, *, question: Question, documents: tuple[int, ...]
    ) -> Fit[_Question]:
        """A question with its documents, among as many others as fit."""
        pool, rng = self.materials.pool(task), random.Random(name)
        related = [i for i in (*question.documents, *question.related) if i not in documents]
        rng.shuffle(related)
        taken = {*documents, *related}
        others = [i for i in rng.sample(range(len(pool.documents)), len(pool.documents)) if i not in taken]
        distractors = related + others
        seed = rng.random()

        def build(count: int, words: int = 0) -> _Question:
            texts = [pool.documents[i] for i in (*documents, *distractors[:count])]
            # A pool that is too small for the length starts over.
            again = distractors or list(documents)
            texts += [pool.documents[again[i % len(again)]] for i in range(count - len(distractors))]
            if words:
                more = distractors[count] if count < len(distractors) else again[count % len(again)]
                texts.append(" ".join(pool.documents[more].split(" ")[:words]))
            random.Random(seed).shuffle(texts)
            return _Question(_qa_message(texts, question.query), QA_PREFIX, question.answers)

        start = budget // _document_tokens(pool)
        fit = self._fit((task, length, "units"), build, budget, start=start)
        if fit.tokens < _FILLED * length - MAX_TOKENS[task]:
            what = (task, length, "words")
            fit = self._fit(what, lambda words: build(fit.units, words), budget, start=_FIRST_FILLING_WORDS)
        return fit


def _document_tokens(pool: QuestionPool) -> int:
    """Rough number of tokens of a document."""
    measured = pool.documents[:_DOCUMENTS_MEASURED]
    characters = sum(len(document) for document in measured) // len(measured)
    return max(_LEAST_DOCUMENT_TOKENS, characters // _CHARACTERS_PER_TOKEN)


def _qa_message(texts: Sequence[str], query: str) -> str:
    context = "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(texts, 1))
    return QA_TEMPLATE.format(context=context, query=query)


@dataclass(frozen=True)
class _Chain:
    """Variables, each assigned the one before it; the first is assigned a number.

    Attributes:
        names: the variables in order.
        value: the number.
        lines: the assignments in order.
    """

    names: list[str]
    value: str
    lines: list[str]

    @classmethod
    def make(cls, rng: random.Random, *, letters: int, value: str | None = None) -> _Chain:
        """A random chain; ``value`` is drawn if it is not given."""
        names: dict[str, None] = {}
        while len(names) < _VT_HOPS + 1:
            names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
        ordered = list(names)
        value = value or cls.number(rng)
        lines = [f"VAR {ordered[0]} = {value}"]
        lines += [f"VAR {name} = VAR {before} " for before, name in itertools.pairwise(ordered)]
        return cls(names=ordered, value=value, lines=lines)

    @staticmethod
    def number(rng: random.Random) -> str:
        return str(rng.randint(10000, 99998))

    def context(self, noises: int, seed: float, separator: str) -> str:
        """Noise with the assignments at random places, in their order.

        Args:
            noises: sentences of noise; joined by line feeds, at least as many as there are assignments.
            seed: seed of the places.
            separator: a line feed between all lines, or a blank between lines of noise that end in a line feed.
        """
        sentences = [NOISE if separator == "\n" else NOISE + "\n"] * noises
        if separator == " " and len(sentences) <= len(self.lines):
            # Too few places: use those between the sentences of the noise.
            sentences = [s + "." if s.strip() else s for noise in sentences for s in noise.split(".")]
        places = sorted(random.Random(seed).sample(range(len(sentences)), len(self.lines)))
        for shift, (place, line) in enumerate(zip(places, self.lines, strict=True)):
            sentences.insert(place + shift, line)
        return separator.join(sentences).replace(". \n", ".\n")


def _word_list(words: list[str], common: int, rare: int, rng: random.Random) -> tuple[str, list[str]]:
    """A shuffled, numbered list with the first ten words ``common`` times and the others ``rare`` times; and those ten."""
    top = words[:10]
    listed = top * common + words[10:] * rare
    rng.shuffle(listed)
    return _numbered(listed), top


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def _spread(lines: list[str], more: Sequence[str], rng: random.Random) -> list[str]:
    """Insert more lines at random places."""
    for line in more:
        lines.insert(rng.randint(0, len(lines)), line)
    return lines


def _distinct_spots(places: Sequence[float], count: int) -> list[int]:
    """Distinct indices below ``count``, each at or after its place, a share of ``count``."""
    taken: list[int] = []
    for place in places:
        spot = int(place * count)
        while spot in taken:
            spot = (spot + 1) % count
        taken.append(spot)
    return taken
