"""RULER (arXiv 2404.06654): its thirteen synthetic tasks, made at exact lengths for a tokenizer.

Definitions, templates, answer prefixes, needle kinds, depths, frequencies and scores are the benchmark's. What differs:

- Units are fitted for each sample, not once for all samples. Where a unit is coarse (a needle of UUIDs, a document of a QA task)
  and would leave 1/25 of the length empty, sentences of noise or the beginning of one more document fill it. So lengths are
  exact.
- If a question of a QA task does not fit with all its documents, it keeps those that hold its answer; a question whose answer
  does not fit is skipped. (The benchmark's samples are longer than the length, or end the run.)
- If a length has room for more common words than there are, pairs of words continue the list (cwe). (The benchmark's samples
  stay short.)
- Sentences of essays are found by a pattern, without a model that would have to be downloaded.

Why not the ruler tasks of lm-evaluation-harness (as of 0.4.13)? Their lengths are not exact: haystacks grow in steps of up to 500
words, and the chat template is not counted. They download essays, questions and a sentence splitter while they load, which needs
the hub. And the harness reads each prompt by itself: nothing shares a haystack, so a needle map of eleven depths costs eleven
times as much reading. Its scorers are an oracle in the tests.
"""

from __future__ import annotations

import itertools
import math
import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from typing_extensions import override

from megatron_longpo.engines.base import Engine
from megatron_longpo.errors import ConfigError, DataError
from megatron_longpo.evaluation.materials import (
    HOTPOTQA_TASK,
    SQUAD_TASK,
    Materials,
    Question,
    QuestionPool,
    read_materials,
    repeated,
    sentences_of,
)
from megatron_longpo.evaluation.metrics import lengths_of, mean_over_tasks, scores_by_cell
from megatron_longpo.evaluation.runner import SampleBatch, SampleGroups
from megatron_longpo.evaluation.samples import AnswerRow, CountPrompt, EvalSample, Fit, largest_fit
from megatron_longpo.evaluation.sections import SuiteConfig, check_names, names
from megatron_longpo.evaluation.suites.base import (
    Cell,
    ComparisonLine,
    EngineSuite,
    HeatMap,
    Launch,
    Metrics,
    averages,
    by_task_and_length,
    count_prompt,
    percent,
    score_text,
)
from megatron_longpo.runtime.tables import Table

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NIAH_TEMPLATE = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about the {kind} "
    "afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the provided text?"
)
NIAH_PREFIX = " The special magic {kind} for {query} mentioned in the provided text are"
# The same for a question that has one needle as its answer: RULER puts the sentences in the singular.
NIAH_TEMPLATE_OF_ONE = NIAH_TEMPLATE.replace("Some", "A").replace("are all", "is").replace("are", "is")
NIAH_PREFIX_OF_ONE = NIAH_PREFIX.replace("are", "is")
VT_TEMPLATE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find all "
    "variables that are assigned the value {query} in the text above."
)
# Spelt as in the benchmark.
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
# The worked example in front of a vt question: most tokens with its answer, and the first guess of its sentences of noise.
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
class Niah:
    """One of the needle tasks.

    Attributes:
        haystack: ``noise``, ``essay`` or ``needle`` (distracting needles).
        keys, values: kind of the keys and of the values: ``words``, ``numbers`` or ``uuids``.
        key_count: number of keys.
        value_count: needles per key, each with its own value.
        query_count: number of keys that are asked for.
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
# Most tokens of an answer.
MAX_TOKENS = {**dict.fromkeys(NIAH, 128), "vt": 30, "cwe": 120, "fwe": 50, SQUAD_TASK: 32, HOTPOTQA_TASK: 32}
TASKS = tuple(MAX_TOKENS)
# Versions of a task's samples and scores. cwe 2: its example joined as in the benchmark.
VERSIONS = {**dict.fromkeys(TASKS, 1), "cwe": 2}
GROUPS = {
    **dict.fromkeys(NIAH, "NIAH"),
    "vt": "VT",
    "cwe": "AGG",
    "fwe": "AGG",
    SQUAD_TASK: "QA",
    HOTPOTQA_TASK: "QA",
}


@dataclass(frozen=True)
class RulerConfig:
    """RULER, and what its haystacks and questions are made of."""

    ruler_tasks: tuple[str, ...] = TASKS
    """Which of the thirteen tasks."""
    haystack: tuple[str, ...] = ()
    """Texts for essay haystacks (ruler, needle): files, folders or globs, as for pair generation."""
    words: str | None = None
    """File of words, one per line, for keys and lists. Default: English words."""
    squad: str | None = None
    """Questions of qa_1: SQuAD's JSON, or rows (.jsonl, .jsonl.gz) with its columns."""
    hotpotqa: str | None = None
    """Questions of qa_2: HotpotQA's JSON, or rows with its columns."""


# --------------------------------------------------------------------------------------------------
# The suite
# --------------------------------------------------------------------------------------------------


class RulerSuite(EngineSuite[Materials]):
    """RULER: needles, variables, word frequencies and questions, at exact lengths."""

    name = "ruler"
    title = "RULER by task"
    settings_by_task = ("version", "materials")

    @override
    def check_options(self, config: SuiteConfig) -> None:
        check_names("ruler_tasks", config.section(RulerConfig).ruler_tasks, TASKS)

    @override
    def prepare(self, launch: Launch) -> Materials:
        config = launch.config
        options, tasks, samples = config.section(RulerConfig), _tasks(config), config.evaluate.samples
        materials = read_materials(
            options.haystack,
            options.words,
            squad=options.squad if SQUAD_TASK in tasks else None,
            hotpotqa=options.hotpotqa if HOTPOTQA_TASK in tasks else None,
            limits=config.reading,
        )
        check_materials(materials, tasks)
        for task in tasks:
            if GROUPS[task] == "QA" and samples > (questions := len(materials.pool(task).questions)):
                raise ConfigError(
                    f"samples={samples} is more than the {questions} questions of {task}; lower it, or name a larger file"
                )
        return materials

    @override
    def settings(self, config: SuiteConfig, inputs: Materials) -> dict[str, Any]:
        versions = {task: VERSIONS[task] for task in _tasks(config)}
        return {"version": versions, "materials": inputs.digests()}

    @override
    def batches(self, launch: Launch, inputs: Materials, engine: Engine) -> list[SampleBatch[SampleGroups]]:
        config = launch.config
        samples, tasks = config.evaluate.samples, _tasks(config)
        ruler = Ruler(inputs, partial(count_prompt, engine), config.evaluate.seed)
        # Fail now if the shortest length is too short. Of a QA task the last sample must fit, too: so many questions do.
        for task in tasks:
            for index in (0, samples - 1) if GROUPS[task] == "QA" else (0,):
                ruler.sample(task, config.lengths[0], index)
        cells = [(task, length) for task in tasks for length in config.lengths]
        return self.batches_of_cells(launch, engine, cells, count=samples, make=ruler.sample)

    @override
    def metrics(self, rows: Sequence[AnswerRow]) -> Metrics:
        """Per task and length; per group the mean of its tasks; the average of all tasks, as in the paper's tables."""
        cells = scores_by_cell(rows, TASKS)
        lengths = lengths_of(cells)
        members: dict[str, list[str]] = {}
        for task in cells:
            members.setdefault(GROUPS[task], []).append(task)
        groups = {g: {n: mean_over_tasks(cells, tasks, n) for n in lengths} for g, tasks in members.items()}
        average = {n: mean_over_tasks(cells, list(cells), n) for n in lengths}
        return {
            "tasks": cells,
            "groups": groups,
            "average": average,
            "over_lengths": {
                **{group: _mean_over_lengths(by_length) for group, by_length in groups.items()},
                "average": _mean_over_lengths(average),
            },
        }

    @override
    def tables(self, metrics: Metrics) -> list[Table]:
        """Groups and the average; all tasks."""
        lengths, over_lengths = list(metrics["average"]), metrics["over_lengths"]
        groups = [
            [name, *(percent(by_length[n]) for n in lengths), percent(over_lengths[name])]
            for name, by_length in [*metrics["groups"].items(), ("average", metrics["average"])]
        ]
        tasks = [
            [task, *(score_text(by_length.get(n)) for n in lengths)] for task, by_length in metrics["tasks"].items()
        ]
        return [
            Table("RULER by group", ["group", *lengths, "all lengths"], groups),
            Table(self.title, ["task", *lengths], tasks),
        ]

    @override
    def heat_map(self, metrics: Metrics) -> HeatMap:
        rows = {task: {n: cell["score"] for n, cell in cells.items()} for task, cells in metrics["tasks"].items()}
        rows["average"] = metrics["average"]
        return HeatMap("RULER", "task", list(metrics["average"]), rows)

    @override
    def comparison_lines(self, cells: Sequence[Cell]) -> list[ComparisonLine]:
        """Each cell, the means of groups, and the averages."""
        lines = [ComparisonLine(cell.task, cell.length, [cell]) for cell in by_task_and_length(cells)]
        lengths = dict.fromkeys(cell.length for cell in cells)
        for group in dict.fromkeys(GROUPS[task] for task in dict.fromkeys(cell.task for cell in cells)):
            members = [cell for cell in cells if GROUPS[cell.task] == group]
            if len({cell.task for cell in members}) == 1:
                # The mean would repeat the line of its only task.
                continue
            for length in lengths:
                if at_length := [cell for cell in members if cell.length == length]:
                    lines.append(ComparisonLine(f"{group} (mean)", length, at_length))
        return lines + averages(cells) if len({cell.task for cell in cells}) > 1 else lines


def _tasks(config: SuiteConfig) -> list[str]:
    return names(config.section(RulerConfig).ruler_tasks)


def _mean_over_lengths(by_length: dict[str, float | None]) -> float | None:
    known = [score for score in by_length.values() if score is not None]
    return float(np.mean(known)) if known else None


def check_materials(materials: Materials, tasks: Sequence[str]) -> None:
    """Check that all tasks have what they need.

    Raises:
        ConfigError: something is missing.
    """
    for task in tasks:
        if GROUPS[task] == "QA":
            materials.pool(task)
        elif task in NIAH and NIAH[task].haystack == "essay":
            _ = materials.essay_words
    materials.check_words()


# --------------------------------------------------------------------------------------------------
# Samples
# --------------------------------------------------------------------------------------------------


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
    """

    def __init__(self, materials: Materials, count: CountPrompt, seed: int) -> None:
        self.materials, self.count, self.seed = materials, count, seed
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
    ) -> Fit[_Question]:
        """``largest_fit`` from the first sample's units; ``what`` names the task, the length and the unit."""
        if not self._is_first:
            start = self._fitted.get(what, start)
        fit = largest_fit(build, lambda q: self.count(q.message, q.prefix), budget, start=start, least=least)
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
        rng = random.Random(name)
        example = _Chain.make(rng, letters=_VT_EXAMPLE_LETTERS)
        seed = rng.random()

        def build_example(noises: int) -> _Question:
            message = VT_TEMPLATE.format(context=example.context(noises, seed), query=example.value)
            prefix = VT_PREFIX.format(count=len(example.names), query=example.value)
            return _Question(message + prefix + " " + " ".join(example.names) + "\n\n\n\n", "", ())

        example_budget = _VT_EXAMPLE_TOKENS - MAX_TOKENS["vt"]
        shown = self._fit(
            ("vt", length, "example"), build_example, example_budget, start=_VT_EXAMPLE_NOISE, least=1
        ).built.message
        chain = _Chain.make(rng, letters=_VT_LETTERS)

        def build(noises: int) -> _Question:
            message = shown + VT_TEMPLATE.format(context=chain.context(noises, seed), query=chain.value)
            prefix = VT_PREFIX.format(count=len(chain.names), query=chain.value)
            return _Question(message, prefix, tuple(chain.names))

        return self._fit(("vt", length, "units"), build, budget, start=budget // _TOKENS_PER_NOISE, least=1)

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
        example = CWE_TEMPLATE.format(context=listed) + CWE_PREFIX + _numbered(top)
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
        size = max(4, length // 50)
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
    def make(cls, rng: random.Random, *, letters: int) -> _Chain:
        names: dict[str, None] = {}
        while len(names) < _VT_HOPS + 1:
            names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
        ordered = list(names)
        value = str(rng.randint(10000, 99998))
        lines = [f"VAR {ordered[0]} = {value}"]
        lines += [f"VAR {name} = VAR {before} " for before, name in itertools.pairwise(ordered)]
        return cls(names=ordered, value=value, lines=lines)

    def context(self, noises: int, seed: float) -> str:
        """Noise with the assignments at random places, in their order."""
        sentences = [NOISE + "\n"] * noises
        if len(sentences) <= len(self.lines):
            # Too few places: use those between the sentences of the noise.
            sentences = [s + "." if s.strip() else s for noise in sentences for s in noise.split(".")]
        places = sorted(random.Random(seed).sample(range(len(sentences)), len(self.lines)))
        for shift, (place, line) in enumerate(zip(places, self.lines, strict=True)):
            sentences.insert(place + shift, line)
        return " ".join(sentences).replace(". \n", ".\n")


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
