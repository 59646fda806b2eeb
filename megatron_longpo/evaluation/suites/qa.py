"""Questions about documents of the user's own, by length: exact match and F1 (arXiv 1606.05250) of short answers.

A line of the file is ``{"context": "the document", "question": "Who?", "answers": ["Ann", "Ann Lee"]}``, with ``task`` if
results are wanted by kind of question. A document counts at the shortest of ``lengths`` that holds its longest question and the
answer; what exceeds the longest length is left out, since a document that is cut may lack its answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from typing_extensions import override

from megatron_longpo.engines.base import Engine
from megatron_longpo.errors import ConfigError, DataError
from megatron_longpo.evaluation.metrics import lengths_of, scores_by_cell
from megatron_longpo.evaluation.runner import SampleBatch, SampleGroups, samples_per_batch
from megatron_longpo.evaluation.samples import AnswerRow, CountPrompt, EvalSample, json_digest, sample_key
from megatron_longpo.evaluation.scoring import SCORERS
from megatron_longpo.evaluation.sections import SuiteConfig, numbers_of_tokens
from megatron_longpo.evaluation.suites.base import EngineSuite, Launch, Metrics, count_prompt, percent, score_text
from megatron_longpo.runtime.log import log
from megatron_longpo.runtime.reading import (
    DEFAULT_READING,
    ReadingConfig,
    TooLarge,
    WrongFormat,
    opened,
    parse_json,
    read_json_rows,
)
from megatron_longpo.runtime.tables import Table
from megatron_longpo.schema import Count

# Task of a row that names none.
_TASK = "qa"


@dataclass(frozen=True)
class QaConfig:
    """Questions about documents of your own."""

    qa_data: str | None = None
    """File of questions (.jsonl or .json, also .gz): one object per question with context, question, answers (a text, or a list
    of texts that count as right) and, if results are wanted by kind, task."""
    qa_lengths: tuple[str, ...] = ()
    """Lengths in tokens, prompt and answer together: each document counts at the shortest that holds it. Default: --lengths."""
    qa_samples: Count | None = None
    """Number of questions to take from the beginning of the file. Default: all."""
    qa_tokens: Count = 32
    """Largest number of tokens in an answer."""
    qa_prompt: str = "{context}\n\n{question}"
    """User message; {context} and {question} stand for the row's."""
    qa_score: Literal["exact_match", "token_f1"] = "exact_match"
    """Score that tables, gates and comparisons use; the report has both."""


@dataclass(frozen=True)
class Question:
    """A question about a document.

    Attributes:
        task: kind of question.
        context: the document.
        question: the question.
        answers: texts that count as right.
        index: number of the question among those of its task in the file.
    """

    task: str
    context: str
    question: str
    answers: tuple[str, ...]
    index: int


class QaSuite(EngineSuite[list[Question]]):
    """Questions about the user's documents."""

    name = "qa"
    title = "Questions about documents, by length"
    settings_alike = ("version", "questions", "prompt", "score")

    @override
    def check_options(self, config: SuiteConfig) -> None:
        prompt = config.section(QaConfig).qa_prompt
        for part in ("{context}", "{question}"):
            if prompt.count(part) != 1:
                raise ConfigError(
                    f"qa_prompt={prompt!r} has {part} {prompt.count(part)} times; name it once, where the row's text is to stand"
                )

    @override
    def check(self, config: SuiteConfig) -> None:
        super().check(config)
        if config.section(QaConfig).qa_data is None:
            raise ConfigError(
                "qa_data is not given; name a file of questions, with context, question and answers, with --qa-data"
            )

    @override
    def prepare(self, launch: Launch) -> list[Question]:
        options = launch.config.section(QaConfig)
        assert options.qa_data is not None
        return read_questions(Path(options.qa_data), launch.config.reading)[: options.qa_samples]

    @override
    def lengths(self, config: SuiteConfig) -> list[int]:
        return numbers_of_tokens("qa_lengths", config.section(QaConfig).qa_lengths) or config.lengths

    @override
    def settings(self, config: SuiteConfig, inputs: list[Question]) -> dict[str, Any]:
        options = config.section(QaConfig)
        return {
            "questions": json_digest([[q.task, q.context, q.question, q.answers] for q in inputs]),
            "prompt": options.qa_prompt,
            "tokens": options.qa_tokens,
            "score": options.qa_score,
        }

    @override
    def batches(self, launch: Launch, inputs: list[Question], engine: Engine) -> list[SampleBatch[SampleGroups]]:
        """Documents of one length together; all questions about a document are a group, which an engine reads once."""
        config, options = launch.config, launch.config.section(QaConfig)
        lengths = self.lengths(config)
        by_length, left_out = by_lengths(inputs, lengths, options, partial(count_prompt, engine))
        if left_out and launch.share.rank == 0:
            log(f"qa: {left_out} question(s) about documents longer than {lengths[-1]} tokens are left out")
        if not by_length:
            option = "--qa-lengths" if options.qa_lengths else "--lengths"
            raise DataError(
                f"qa: all {left_out} question(s) are longer than {lengths[-1]} tokens; give {option} a longer one"
            )
        documents = sum(map(len, by_length.values()))
        size = samples_per_batch(documents, launch.share.world_size, engine.groups_at_once)
        return [
            SampleBatch(
                keys=tuple(sample_key(self.name, q.task, length, q.index) for group in part for q in group),
                cost=float(len(part) * length),
                make=partial(_samples, part, length, options),
            )
            for length, groups in by_length.items()
            for part in (groups[first : first + size] for first in range(0, len(groups), size))
        ]

    @override
    def metrics(self, rows: Sequence[AnswerRow]) -> Metrics:
        """Per task and length, and the mean of the tasks at each length; besides, both scores over all questions by length."""
        return {**super().metrics(rows), "scores": {name: _scores(rows, name) for name in ("exact_match", "token_f1")}}

    @override
    def tables(self, metrics: Metrics) -> list[Table]:
        """Score by task; exact match and F1 over all questions."""
        lengths = lengths_of(metrics["tasks"])
        both = [
            [title, *(score_text(metrics["scores"][name][_TASK].get(n)) for n in lengths)]
            for name, title in (("exact_match", "exact match"), ("token_f1", "F1"))
        ]
        by_task = [
            [task, *(score_text(by_length.get(n)) for n in lengths)] for task, by_length in metrics["tasks"].items()
        ]
        by_task.append(["average", *(percent(metrics["average"].get(n)) for n in lengths)])
        return [
            Table(self.title, ["all questions", *lengths], both),
            Table("Questions by task", ["task", *lengths], by_task),
        ]


def _scores(rows: Sequence[AnswerRow], name: str) -> dict[str, Any]:
    """A score over all questions, by length."""
    scorer = SCORERS[name]
    return scores_by_cell(
        [
            {**row, "task": _TASK, "score": 0.0 if row.get("no_answer") else scorer(row["answer"], row["references"])}
            for row in rows
        ]
    )


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


def read_questions(path: Path, limits: ReadingConfig = DEFAULT_READING) -> list[Question]:
    """Questions of a file.

    Args:
        path: JSON Lines, or a JSON array of the same objects; either may be gzipped.
        limits: what is too large.

    Raises:
        DataError: the file cannot be read, a line is no question, or there is none.
    """
    questions: list[Question] = []
    counts: Counter[str] = Counter()
    try:
        with opened(path, limits) as stream:
            for number, line in enumerate(read_json_rows(stream, limits), 1):
                if line.too_long:
                    raise DataError(f"{path}, line {number}: {line.too_long}; remove the line, or raise the limit")
                if not line.raw.strip():
                    continue
                try:
                    row = parse_json(line.raw.decode("utf-8"), limits.max_json_depth)
                    question = _question(row, counts)
                except ValueError as error:
                    raise DataError(f"{path}, line {number}: {error}; correct or remove the line") from None
                counts[question.task] += 1
                questions.append(question)
    except (TooLarge, WrongFormat) as error:
        raise DataError(f"{path}: {error}") from None
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error}); name a file of questions with --qa-data") from None
    if not questions:
        raise DataError(f"{path}: has no question; give another file with --qa-data")
    return questions


def _question(row: Any, counts: Counter[str]) -> Question:
    """The question of a row.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(row, dict):
        raise ValueError("is not an object")
    for key in ("context", "question"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise ValueError(f"has no {key}, or it is not text")
    answers, task = row.get("answers"), row.get("task", _TASK)
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise ValueError("has no answers; they are a text, or a list of texts")
    # It is part of a key, whose parts are separated by slashes.
    if not isinstance(task, str) or not task.strip() or "/" in task:
        raise ValueError(f"has the task {task!r}, which is not a name without slashes")
    return Question(task, row["context"], row["question"], tuple(answers), counts[task])


# --------------------------------------------------------------------------------------------------
# Samples
# --------------------------------------------------------------------------------------------------


def by_lengths(
    questions: Sequence[Question], lengths: Sequence[int], options: QaConfig, count: CountPrompt
) -> tuple[dict[int, list[list[Question]]], int]:
    """Questions by length: those about one document, in one group.

    Args:
        questions: the questions.
        lengths: lengths in tokens, ascending.
        options: prompt and answer tokens.
        count: counts the tokens of a prompt.

    Returns:
        Groups by the shortest length that holds the longest question of the group and an answer; and the number of questions
        that exceed the longest length.
    """
    of_document: dict[str, list[Question]] = {}
    for question in questions:
        of_document.setdefault(question.context, []).append(question)
    groups: dict[int, list[list[Question]]] = {length: [] for length in lengths}
    left_out = 0
    for group in of_document.values():
        # The document decides: only its longest question is counted.
        longest = max(group, key=lambda q: len(q.question))
        tokens = count(message_of(longest, options), "") + options.qa_tokens
        length = next((length for length in lengths if tokens <= length), None)
        if length is None:
            left_out += len(group)
        else:
            groups[length].append(group)
    return {length: found for length, found in groups.items() if found}, left_out


def message_of(question: Question, options: QaConfig) -> str:
    """The user message of a question."""
    before, _, after = options.qa_prompt.partition("{context}")
    # Not by str.format: the texts may hold braces.
    parts = [part.replace("{question}", question.question) for part in (before, after)]
    return question.context.join(parts)


def _samples(groups: Sequence[Sequence[Question]], length: int, options: QaConfig) -> SampleGroups:
    return [[_sample(question, length, options) for question in group] for group in groups]


def _sample(question: Question, length: int, options: QaConfig) -> EvalSample:
    return EvalSample(
        suite="qa",
        task=question.task,
        length=length,
        index=question.index,
        message=message_of(question, options),
        prefix="",
        references=question.answers,
        scorer=options.qa_score,
        max_tokens=options.qa_tokens,
    )
