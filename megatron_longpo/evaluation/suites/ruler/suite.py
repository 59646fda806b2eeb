"""RULER as a suite: options, settings, and the report by task, group and length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from typing_extensions import override

from megatron_longpo.engines.base import Engine
from megatron_longpo.errors import ConfigError
from megatron_longpo.evaluation.folder import settings_of
from megatron_longpo.evaluation.materials import HOTPOTQA_TASK, SQUAD_TASK, Materials, read_materials
from megatron_longpo.evaluation.metrics import lengths_of, mean_over_tasks, scores_by_cell
from megatron_longpo.evaluation.runner import SampleBatch, SampleGroups
from megatron_longpo.evaluation.samples import AnswerRow
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
from megatron_longpo.evaluation.suites.ruler.definitions import (
    DEFINITIONS,
    GROUPS,
    MIXED,
    NIAH,
    PRESENT,
    TASKS,
    VERSIONS,
    Definitions,
)
from megatron_longpo.evaluation.suites.ruler.samples import Ruler
from megatron_longpo.runtime.tables import Table


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
