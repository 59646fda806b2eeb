"""What a suite is: the interface between a benchmark and everything that runs, reports and compares benchmarks.

An evaluation goes through its suites step by step, so that what can fail does so before long work begins::

    suite.check(config)                            options only
    inputs = suite.prepare(launch)                 files are read
    ready = suite.begin(launch, inputs, engine)    samples can be made, the output folder is open
    result = ready.run()                           answers, scores, metrics

Reports and comparisons need metrics and rows only: ``tables``, ``heat_map``, ``comparison_lines``. A suite object has no state,
so that they can use it without a configuration.

Most suites ask an engine for text. They derive from ``EngineSuite``, and need little more than a name and samples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from typing_extensions import override

from megatron_longpo.engines.base import Engine, Prompt
from megatron_longpo.errors import ConfigError
from megatron_longpo.evaluation.folder import SuiteFolder
from megatron_longpo.evaluation.metrics import CellScore, count_cells, lengths_of, mean_over_tasks, scores_by_cell
from megatron_longpo.evaluation.runner import (
    Answer,
    SampleBatch,
    SampleGroups,
    answer_by_engine,
    run,
    sample_batches,
    samples_per_batch,
)
from megatron_longpo.evaluation.samples import AnswerRow, EvalSample
from megatron_longpo.evaluation.sections import SuiteConfig
from megatron_longpo.runtime.share import Share
from megatron_longpo.runtime.tables import Table

Inputs = TypeVar("Inputs")
Content = TypeVar("Content")
# Metrics of a suite, as results.json stores them.
Metrics = dict[str, Any]


@dataclass(frozen=True)
class Launch:
    """One process of an evaluation.

    Attributes:
        config: checked configuration.
        share: this process's share of the samples.
        restart: whether to discard the answers of earlier runs.
    """

    config: SuiteConfig
    share: Share
    restart: bool = False

    def open_folder(self, suite: Suite[Any], settings: dict[str, Any]) -> SuiteFolder:
        """Open OUTPUT/SUITE. See ``SuiteFolder``."""
        return SuiteFolder(
            self.config.output / suite.name,
            settings,
            self.share,
            by_task=suite.settings_by_task,
            fractions=suite.in_percent,
            restart=self.restart,
        )


@dataclass(frozen=True)
class SuiteResult:
    """What results.json stores for a suite.

    Attributes:
        settings: what the answers depend on.
        asked: number of samples per task and length.
        metrics: the numbers.
    """

    settings: dict[str, Any]
    asked: dict[str, int]
    metrics: Metrics


@dataclass(frozen=True)
class HeatMap:
    """Scores drawn as colours.

    Attributes:
        title: title of the picture.
        label: what the rows are.
        columns: lengths in tokens.
        rows: name -> length -> score in [0, 1], or None.
    """

    title: str
    label: str
    columns: Sequence[str]
    rows: Mapping[str, Mapping[str, float | None]]


class Cell(NamedTuple):
    """A task and a length (``-`` where lengths do not matter): the unit of comparisons."""

    task: str
    length: str


class ComparisonLine(NamedTuple):
    """One line of a comparison: the mean over some cells.

    Attributes:
        name: a task, or what the mean is over.
        length: a length, or ``all``.
        cells: the cells.
    """

    name: str
    length: str
    cells: list[Cell]


class ReadySuite(ABC):
    """A suite that is about to run: its samples can be made, and its folder is open."""

    @abstractmethod
    def run(self) -> SuiteResult | None:
        """Answer all samples and close the folder; the result on the process that reports, else None."""


class Suite(ABC, Generic[Inputs]):
    """A benchmark.

    Attributes:
        name: name for ``--tasks``, the folder, and the section of the configuration.
        uses_engine: whether an engine answers. Other suites load models themselves, after the engine is gone.
        in_percent: whether scores are fractions in [0, 1], which are shown in percent and may be averaged over tasks.
        settings_alike: settings that must be equal for two evaluations to be comparable.
        settings_by_task: settings that hold a value per task or material, which later runs may add to.
    """

    name: ClassVar[str]
    uses_engine: ClassVar[bool] = False
    in_percent: ClassVar[bool] = True
    settings_alike: ClassVar[tuple[str, ...]] = ("version",)
    settings_by_task: ClassVar[tuple[str, ...]] = ()

    # ---------------------------------------------------------------------------------- running

    def check_options(self, config: SuiteConfig) -> None:
        """Check the values of the suite's section, whether or not the suite is selected.

        Raises:
            ConfigError: a value breaks a rule.
        """

    def check(self, config: SuiteConfig) -> None:
        """Check that a configuration can run this suite.

        Raises:
            ConfigError: it cannot.
        """
        if not self.uses_engine and config.engine.engine == "openai":
            raise ConfigError(
                f"tasks={self.name} needs log-probs of given text, which engine=openai does not provide; leave it out, or "
                "evaluate a model folder with --engine transformers"
            )

    @abstractmethod
    def prepare(self, launch: Launch) -> Inputs:
        """Read what the suite needs.

        Raises:
            LongPOError: something is missing, or cannot be read.
        """

    @abstractmethod
    def begin(self, launch: Launch, inputs: Inputs, engine: Engine | None) -> ReadySuite:
        """Make sure that samples can be made, and open the folder.

        Args:
            launch: configuration and share of this process.
            inputs: what ``prepare`` returned.
            engine: the engine, for suites that use one.

        Raises:
            LongPOError: a sample cannot be made, or the folder belongs to another evaluation.
        """

    # ---------------------------------------------------------------------------------- reporting

    @abstractmethod
    def tables(self, metrics: Metrics) -> list[Table]:
        """Tables of the report; the first is printed when the suite is done."""

    def heat_map(self, metrics: Metrics) -> HeatMap | None:
        """The suite's picture, if it has one."""

    def measured(self, settings: dict[str, Any]) -> str | None:  # noqa: ARG002 - by default there is nothing to add
        """A sentence for the report on how the suite was measured, from its settings in results.json."""
        return None

    def cells(self, metrics: Metrics) -> Mapping[Cell, CellScore]:  # noqa: ARG002 - by default there are none
        """The scores that all others are made of, which count what is no answer."""
        return {}

    # ---------------------------------------------------------------------------------- comparing

    def comparison_lines(self, cells: Sequence[Cell]) -> list[ComparisonLine]:
        """Lines of a comparison: by default each cell, and for fractions the averages over tasks.

        Args:
            cells: cells that both evaluations have.
        """
        lines = [ComparisonLine(cell.task, cell.length, [cell]) for cell in by_task_and_length(cells)]
        return lines + averages(cells) if self.in_percent and len({cell.task for cell in cells}) > 1 else lines


def by_task_and_length(cells: Sequence[Cell]) -> list[Cell]:
    """ScoresByCell ordered by task, then length, each in the order of first appearance."""
    tasks, lengths = dict.fromkeys(cell.task for cell in cells), dict.fromkeys(cell.length for cell in cells)
    return [Cell(task, length) for task in tasks for length in lengths if Cell(task, length) in cells]


def averages(cells: Sequence[Cell]) -> list[ComparisonLine]:
    """The mean over all tasks at each length, and over all lengths if there are several."""
    lengths = list(dict.fromkeys(cell.length for cell in cells))
    lines = [ComparisonLine("average", n, [cell for cell in cells if cell.length == n]) for n in lengths]
    return [*lines, ComparisonLine("average", "all", list(cells))] if len(lengths) > 1 else lines


class BatchSuite(Suite[Inputs]):
    """A suite whose samples are answered in batches, each by one process."""

    @abstractmethod
    def metrics(self, rows: Sequence[AnswerRow]) -> Metrics:
        """The suite's numbers, as results.json stores them."""


@dataclass
class ReadyBatches(ReadySuite, Generic[Content]):
    """A ``BatchSuite`` with all its samples.

    Attributes:
        suite: the suite.
        batches: all samples of all processes.
        answer: how a batch is answered.
        folder: the open folder.
    """

    suite: BatchSuite[Any]
    batches: Sequence[SampleBatch[Content]]
    answer: Answer[Content]
    folder: SuiteFolder

    @override
    def run(self) -> SuiteResult | None:
        try:
            self.folder.wait_for_parts()
            rows = run(self.suite.name, self.batches, self.answer, self.folder)
        finally:
            self.folder.close()
        if rows is None:
            return None
        return SuiteResult(self.folder.settings, count_cells(rows), self.suite.metrics(rows))


class EngineSuite(BatchSuite[Inputs]):
    """A suite whose samples an engine answers.

    Attributes:
        title: title of the table.
        version: version of samples and scores: raise it when either changes.
    """

    title: ClassVar[str]
    version: ClassVar[int] = 1
    uses_engine = True

    @override
    def check(self, config: SuiteConfig) -> None:
        super().check(config)
        if not self.lengths(config):
            raise ConfigError("lengths is empty; name numbers of tokens such as 4096,8192")

    def lengths(self, config: SuiteConfig) -> list[int]:
        """Lengths in tokens at which the suite measures, ascending.

        Raises:
            ConfigError: one is not a number.
        """
        return config.lengths

    @abstractmethod
    def batches(self, launch: Launch, inputs: Inputs, engine: Engine) -> list[SampleBatch[SampleGroups]]:
        """All samples of all processes, in batches that are made when they are answered.

        A sample must depend on the configuration and its key only, so that an interrupted evaluation can resume.

        Raises:
            LongPOError: the samples cannot be made.
        """

    def batches_of_cells(
        self,
        launch: Launch,
        engine: Engine,
        cells: Sequence[tuple[str, int]],
        *,
        count: int,
        make: Callable[[str, int, int], EvalSample],
    ) -> list[SampleBatch[SampleGroups]]:
        """The same number of samples of each task and length, in batches.

        Args:
            launch: configuration and share of this process.
            engine: the engine.
            cells: tasks and lengths.
            count: number of samples per cell.
            make: makes the sample of a task, a length and an index.
        """
        size = samples_per_batch(len(cells) * count, launch.share.world_size, engine.groups_at_once)
        return [
            batch
            for task, length in cells
            for batch in sample_batches(
                self.name, task, length, count=count, size=size, make=partial(make, task, length)
            )
        ]

    def settings(self, config: SuiteConfig, inputs: Inputs) -> dict[str, Any]:  # noqa: ARG002 - nothing by default
        """What the answers depend on, besides model, tokenizer, seed and version; another value needs another folder."""
        return {}

    @override
    def begin(self, launch: Launch, inputs: Inputs, engine: Engine | None) -> ReadySuite:
        assert engine is not None
        batches = self.batches(launch, inputs, engine)
        settings = {
            "version": self.version,
            "model": engine.identity,
            "tokenizer": engine.tokenizer.vocabulary_hash,
            "seed": launch.config.evaluate.seed,
            **self.settings(launch.config, inputs),
        }
        return ReadyBatches(self, batches, answer_by_engine(engine), launch.open_folder(self, settings))

    @override
    def metrics(self, rows: Sequence[AnswerRow]) -> Metrics:
        """Score per task and length, and the mean of the tasks at each length."""
        cells = scores_by_cell(rows)
        return {"tasks": cells, "average": {n: mean_over_tasks(cells, list(cells), n) for n in lengths_of(cells)}}

    @override
    def tables(self, metrics: Metrics) -> list[Table]:
        """One table: a row per task, a column per length."""
        lengths = list(metrics["average"])
        rows = [
            [self.task_title(task), *(score_text(by_length.get(n)) for n in lengths)]
            for task, by_length in metrics["tasks"].items()
        ]
        rows.append(["average", *(percent(metrics["average"][n]) for n in lengths)])
        return [Table(self.title, ["task", *lengths], rows)]

    def task_title(self, task: str) -> str:
        """Name of a task in tables."""
        return task

    @override
    def cells(self, metrics: Metrics) -> Mapping[Cell, CellScore]:
        return {Cell(task, n): cell for task, by_length in metrics["tasks"].items() for n, cell in by_length.items()}


def count_prompt(engine: Engine, message: str, prefix: str) -> int:
    """Tokens of the prompt for a user message and the beginning of its answer."""
    ((ids,),) = engine.token_rows([[Prompt(({"role": "user", "content": message},), prefix=prefix)]])
    return len(ids)


def percent(value: float | None) -> str:
    """A fraction in percent."""
    return "-" if value is None else f"{100 * value:.1f}"


def score_text(cell: Mapping[str, Any] | None) -> str:
    """A score with its standard error, in percent."""
    if cell is None:
        return "-"
    error = "" if cell["stderr"] is None else f" ± {100 * cell['stderr']:.1f}"
    return percent(cell["score"]) + error
