"""RULER (arXiv 2404.06654): its thirteen synthetic tasks, made at exact lengths for a tokenizer.

Templates, answer prefixes, needle kinds, depths, frequencies and scores are the benchmark's, of the version that
``ruler_version`` names (``DEFINITIONS``): the benchmark changed vt, cwe and fwe on 2025-05-13. What differs from either version:

Lengths
- Units are fitted for each sample, not once for all samples. Where a unit is coarse (a needle of UUIDs, a document of a QA task)
  and would leave 1/25 of the length empty, sentences of noise or the beginning of one more document fill it. So lengths are
  exact, where the benchmark stays up to 2/5 below the length and sometimes a little above it (fwe, by 860f2bd).
- A begin-of-text token that the chat template writes is counted.
- The vt example's size by 860f2bd counts the answer as it stands in the text, not as a Python list.

Questions (qa_1, qa_2)
- If a question does not fit with all its documents, it keeps those that hold its answer; a question whose answer does not fit is
  skipped. (The benchmark's script does not end then.)
- ``ruler_shuffle_questions`` draws their order by seed. (The benchmark takes the first ones of the file; so does the default.)

Draws
- Each sample draws its order of needles, of listed words (cwe, fwe) and of documents; the benchmark uses one permutation for all
  samples. In vt each sample draws the places in its example, too; the benchmark draws them once.
- Needles, words and names come from generators of our own, so samples are not those of the benchmark's seed 42.

Texts
- Sentences of essays are found by a pattern, without a model that would have to be downloaded (NLTK's).
- A depth is ``int(n * depth / 100)`` of n sentences; the benchmark's ``int(n * (depth / 100))`` is the sentence before in one of
  5000 cases.
- No second blank stands where a needle begins the text or two needles stand at one depth.
- For a single answer, "is" replaces "are" in the task's template only; the benchmark also rewrites the chat template around it.
- If a length has room for more common words than there are, pairs of words continue the list (cwe). (The benchmark goes over to
  another list of words at c3f5e3b, and stops at 860f2bd.)

Scores
- 100 samples per task by default, not 500; means are not rounded.

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
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from typing_extensions import override

from megatron_longpo.engines.base import Engine
from megatron_longpo.errors import ConfigError, DataError
from megatron_longpo.evaluation.folder import settings_of
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
VT_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are {assigned} the value "
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
# Versions of a task's samples and scores, beside the version of the benchmark that they follow. cwe 2: no space between the
# example's answer and its prefix where the benchmark has none.
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
class Definitions:
    """What differs between versions of the benchmark.

    Attributes:
        title: what they are, for the report.
        vt_assigned: spelling in the answer prefix of vt.
        vt_separator: what stands between the lines of vt, sentences of noise and assignments.
        vt_example_end: what stands between vt's example and its question.
        vt_example_step: sentences of noise in the example are a multiple of this number.
        vt_example_counts: what the 500 tokens of the example hold: the ``question`` with its prefix; the ``answer``, too, and
            room for another one; or all of that in the chat template (``prompt``).
        vt_example_redrawn: whether the example's number is drawn for each sample, and not once for all.
        vt_independent: whether the places of the example's and of the question's assignments are drawn independently.
        cwe_example_space: what stands between the prefix and the answer in cwe's example.
        fwe_reserves: whether the answer's tokens count in the number of fwe's coded words.
        shuffles_questions: whether questions of QA tasks are always taken in an order drawn by seed.
    """

    title: str
    vt_assigned: str
    vt_separator: str
    vt_example_end: str
    vt_example_step: int
    vt_example_counts: Literal["question", "answer", "prompt"]
    vt_example_redrawn: bool
    vt_independent: bool = True
    cwe_example_space: str = ""
    fwe_reserves: bool = False
    shuffles_questions: bool = False


# By commit of NVIDIA/RULER.
PRESENT = "c3f5e3b"
DEFINITIONS = {
    PRESENT: Definitions(
        title="RULER at commit c3f5e3b (2026-07-22)",
        vt_assigned="assigned",
        vt_separator="\n",
        vt_example_end="\n\n",
        vt_example_step=1,
        vt_example_counts="question",
        vt_example_redrawn=True,
        cwe_example_space=" ",
        fwe_reserves=True,
    ),
    # The state before the changes of 2025-05-13.
    "860f2bd": Definitions(
        title="RULER at commit 860f2bd (2025-01-31)",
        vt_assigned="assgined",
        vt_separator=" ",
        vt_example_end="\n\n\n\n",
        vt_example_step=5,
        vt_example_counts="answer",
        vt_example_redrawn=False,
    ),
}
# Those of folders made by version 0.1, which recorded none: 860f2bd, but for the example's size and number, and the two
# departures that version 0.1 had of its own. For resuming such a folder only.
MIXED = replace(
    DEFINITIONS["860f2bd"],
    title="those of megatron_longpo 0.1, a mixture of RULER before and after 2025-05-13",
    vt_example_step=1,
    vt_example_counts="prompt",
    vt_example_redrawn=True,
    vt_independent=False,
    shuffles_questions=True,
)


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
    ruler_version: Literal["c3f5e3b", "860f2bd"] | None = None
    """Commit of the benchmark whose definitions are followed: c3f5e3b (2026-07-22), or 860f2bd, the state before the changes of
    2025-05-13, which papers of that time used. Default: the folder's own, for a new folder c3f5e3b."""
    ruler_shuffle_questions: bool = False
    """Draw the order of the questions of qa_1 and qa_2 by seed; by default it is that of the file, as in the benchmark."""


# --------------------------------------------------------------------------------------------------
# The suite
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RulerInputs:
    """What samples are made of.

    Attributes:
        materials: texts, words and questions.
        version: key of ``DEFINITIONS``; None: those of a folder that records none.
        shuffles_questions: whether questions of QA tasks are taken in an order drawn by seed.
    """

    materials: Materials
    version: str | None
    shuffles_questions: bool

    @property
    def definitions(self) -> Definitions:
        return MIXED if self.version is None else DEFINITIONS[self.version]


class RulerSuite(EngineSuite[RulerInputs]):
    """RULER: needles, variables, word frequencies and questions, at exact lengths."""

    name = "ruler"
    title = "RULER by task"
    settings_alike = ("version", "ruler_version")
    settings_by_task = ("version", "materials", "question_order")

    @override
    def check_options(self, config: SuiteConfig) -> None:
        check_names("ruler_tasks", config.section(RulerConfig).ruler_tasks, TASKS)

    @override
    def prepare(self, launch: Launch) -> RulerInputs:
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
        folder = config.output / self.name
        version = options.ruler_version or (PRESENT if launch.restart else version_of(folder))
        return RulerInputs(materials, version, options.ruler_shuffle_questions)

    @override
    def settings(self, config: SuiteConfig, inputs: RulerInputs) -> dict[str, Any]:
        tasks = _tasks(config)
        settings: dict[str, Any] = {
            "version": {task: VERSIONS[task] for task in tasks},
            "materials": inputs.materials.digests(),
        }
        if inputs.version is not None:
            order = "seed" if inputs.shuffles_questions else "file"
            settings["ruler_version"] = inputs.version
            settings["question_order"] = {task: order for task in tasks if GROUPS[task] == "QA"}
        return settings

    @override
    def measured(self, settings: dict[str, Any]) -> str | None:
        version = settings.get("ruler_version")
        definitions = MIXED if version is None else DEFINITIONS.get(version)
        return f"Definitions: {version if definitions is None else definitions.title}."

    @override
    def batches(self, launch: Launch, inputs: RulerInputs, engine: Engine) -> list[SampleBatch[SampleGroups]]:
        config = launch.config
        samples, tasks = config.evaluate.samples, _tasks(config)
        ruler = Ruler(
            inputs.materials,
            partial(count_prompt, engine),
            config.evaluate.seed,
            definitions=inputs.definitions,
            shuffles_questions=inputs.shuffles_questions,
        )
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


def version_of(folder: Path) -> str | None:
    """Version of the benchmark that a folder follows: the present one if it is new, None if it was begun before versions were
    recorded.

    Args:
        folder: OUTPUT/ruler.

    Raises:
        LongPOError: the folder's version is unknown, or its settings cannot be read.
    """
    settings = settings_of(folder)
    if not settings:
        return PRESENT
    version = settings.get("ruler_version")
    if version is not None and version not in DEFINITIONS:
        raise ConfigError(
            f"{folder}: ruler_version={version} is unknown; name another --output, or use {', '.join(DEFINITIONS)} with --restart"
        )
    return None if version is None else str(version)


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
