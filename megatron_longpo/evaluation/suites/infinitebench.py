"""InfiniteBench (arXiv 2402.13718): En.Sum, En.QA and En.MC, from the published files.

Prompts, truncation in the middle, answer lengths and scores are the benchmark's (commit 88b3daa, 2024-06-13); En.MC is scored as
by its later commit 51d9b37, which begins with the last letter (``scoring.option_accuracy``).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from typing_extensions import override

from megatron_longpo.engines.base import Engine
from megatron_longpo.errors import ConfigError, DataError, one_line
from megatron_longpo.evaluation.metrics import group_by
from megatron_longpo.evaluation.runner import SampleBatch, SampleGroups, sample_batches, samples_per_batch
from megatron_longpo.evaluation.samples import AnswerRow, CountPrompt, EvalSample, json_digest, middle_cut
from megatron_longpo.evaluation.sections import SuiteConfig, check_names, names
from megatron_longpo.evaluation.suites.base import EngineSuite, Launch, Metrics, count_prompt
from megatron_longpo.runtime.files import write_atomically
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
from megatron_longpo.schema import Count

if TYPE_CHECKING:
    from megatron_longpo.text.chat import ChatTokenizer

_OPTIONS = "\nA. {A}\nB. {B}\nC. {C}\nD. {D}"
PROMPTS = {
    # The benchmark's for GPT-4.
    "chat": {
        "longbook_sum_eng": "Summarize the following book.\n\n{context}",
        "longbook_qa_eng": "Read the book below and answer a question.\n\n{context}\n\nQuestion: {question}\n\nBe very concise.",
        "longbook_choice_eng": (
            "Read the book and answer the question.\n\n{context}\n\nQuestion: {question}\n\nOnly one of the following "
            "options is correct, tell me the answer using one single letter (A, B, C, or D). Don't say anything else."
            + _OPTIONS
        ),
    },
    # The benchmark's for YaRN-Mistral.
    "base": {
        "longbook_sum_eng": "Summarize the book below.\n\n{context}\n\nSummary:",
        "longbook_qa_eng": (
            "Read the book and answer the question. Be very concise in your answer.\n\n{context}\n\nQuestion: "
            "{question}\nAnswer:"
        ),
        "longbook_choice_eng": (
            "Read the book and answer the question.\n\n{context}\n\nQuestion: {question}"
            + _OPTIONS
            + "\n\nThe letter of the correct answer is"
        ),
    },
}


@dataclass(frozen=True)
class Task:
    """A task of the benchmark.

    Attributes:
        title: name in tables.
        scorer: name in ``scoring.SCORERS``.
        max_tokens: most tokens of an answer.
    """

    title: str
    scorer: str
    max_tokens: int


TASKS = {
    "longbook_sum_eng": Task("En.Sum", scorer="rouge_lsum", max_tokens=1200),
    "longbook_qa_eng": Task("En.QA", scorer="token_f1", max_tokens=40),
    "longbook_choice_eng": Task("En.MC", scorer="option_accuracy", max_tokens=40),
}
# Tokens of text that must remain beside the longest answer.
_LEAST_TEXT_TOKENS = 512
# Characters of a bad line, and of what is wrong with it, in the list of skipped lines.
_SHOWN_CHARACTERS, _REASON_CHARACTERS = 500, 200


@dataclass(frozen=True)
class InfiniteBenchConfig:
    """InfiniteBench's English books."""

    infinitebench: str | None = None
    """Folder with the published longbook_sum_eng.jsonl, longbook_qa_eng.jsonl, longbook_choice_eng.jsonl."""
    infinitebench_tasks: tuple[str, ...] = tuple(TASKS)
    """Which of the three tasks."""
    infinitebench_samples: Count | None = None
    """Number of rows to take from the beginning of each file. Default: all."""
    infinitebench_prompts: Literal["chat", "base"] = "chat"
    """chat: the benchmark's prompts for GPT-4; base: those for models that continue a text (YaRN-Mistral's)."""


@dataclass(frozen=True)
class Book:
    """A row of the benchmark.

    Attributes:
        context: the book.
        question: the question; summaries have none.
        answers: texts that count as an answer.
        options: the four options of a multiple-choice question, or None.
    """

    context: str
    question: str | None
    answers: list[str]
    options: list[str] | None


@dataclass(frozen=True)
class SkippedLine:
    """A line that is not a row of the benchmark."""

    task: str
    line: int
    reason: str
    text: str


@dataclass(frozen=True)
class Books:
    """Rows and skipped lines of one file."""

    rows: list[Book]
    skipped: list[SkippedLine]


class InfiniteBenchRow(AnswerRow, total=False):
    """An answer; ``cut`` says whether its book was truncated."""

    cut: bool


class InfiniteBenchSuite(EngineSuite[dict[str, Books]]):
    """InfiniteBench's books, truncated in the middle to the longest of ``lengths``."""

    name = "infinitebench"
    title = "InfiniteBench, cut to so many tokens"
    # 2: En.MC with the last-letter step (see ``scoring.option_accuracy``).
    version = 2
    settings_alike = ("version", "prompts")
    settings_by_task = ("files",)

    @override
    def check_options(self, config: SuiteConfig) -> None:
        check_names("infinitebench_tasks", config.section(InfiniteBenchConfig).infinitebench_tasks, tuple(TASKS))

    @override
    def check(self, config: SuiteConfig) -> None:
        super().check(config)
        longest_answer = max((TASKS[task].max_tokens for task in _tasks(config)), default=0)
        least = longest_answer + _LEAST_TEXT_TOKENS
        if config.lengths[-1] < least:
            raise ConfigError(
                f"lengths={config.lengths[-1]} leaves too little text beside answers of {longest_answer} tokens (infinitebench); "
                f"give at least {least}"
            )
        if config.section(InfiniteBenchConfig).infinitebench is None:
            raise ConfigError(
                "infinitebench is not given; name the folder of the benchmark's JSONL files with --infinitebench"
            )

    @override
    def prepare(self, launch: Launch) -> dict[str, Books]:
        folder = launch.config.section(InfiniteBenchConfig).infinitebench
        assert folder is not None
        books = {task: read_task(Path(folder), task, launch.config.reading) for task in _tasks(launch.config)}
        if launch.share.rank == 0:
            _list_skipped_lines(launch.config.output, [line for of_task in books.values() for line in of_task.skipped])
        return books

    @override
    def settings(self, config: SuiteConfig, inputs: dict[str, Books]) -> dict[str, Any]:
        return {
            "files": {task: json_digest([dataclasses.asdict(b) for b in books.rows]) for task, books in inputs.items()},
            "prompts": config.section(InfiniteBenchConfig).infinitebench_prompts,
        }

    @override
    def batches(self, launch: Launch, inputs: dict[str, Books], engine: Engine) -> list[SampleBatch[SampleGroups]]:
        options, length = launch.config.section(InfiniteBenchConfig), launch.config.lengths[-1]
        counts = {
            task: min(len(books.rows), options.infinitebench_samples or len(books.rows))
            for task, books in inputs.items()
        }
        size = samples_per_batch(sum(counts.values()), launch.share.world_size, engine.groups_at_once)
        batches: list[SampleBatch[SampleGroups]] = []
        for task, books in inputs.items():
            make = partial(
                _sample_of_index,
                books.rows,
                task=task,
                length=length,
                prompts=options.infinitebench_prompts,
                tokenizer=engine.tokenizer,
                count=partial(count_prompt, engine),
            )
            batches += sample_batches(self.name, task, length, count=counts[task], size=size, make=make)
        return batches

    @override
    def metrics(self, rows: Sequence[AnswerRow]) -> Metrics:
        """As for every suite, with the number of truncated books per cell."""
        metrics = super().metrics(sorted(rows, key=lambda row: list(TASKS).index(row["task"])))
        for (task, length), cell in group_by(rows, lambda row: (row["task"], row["length"])).items():
            metrics["tasks"][task][str(length)]["cut"] = sum(
                bool(cast(InfiniteBenchRow, row).get("cut")) for row in cell
            )
        return metrics

    @override
    def task_title(self, task: str) -> str:
        return TASKS[task].title


def _tasks(config: SuiteConfig) -> list[str]:
    return names(config.section(InfiniteBenchConfig).infinitebench_tasks)


def _list_skipped_lines(output: Path, lines: Sequence[SkippedLine]) -> None:
    if not lines:
        return
    path = output / "infinitebench.rejected.jsonl"
    text = "".join(json.dumps(dataclasses.asdict(line), ensure_ascii=False) + "\n" for line in lines)
    write_atomically(path, text.encode("utf-8", "replace"))
    log(f"infinitebench: {len(lines)} bad line(s) skipped, listed in {path}")


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


def read_task(folder: Path, task: str, limits: ReadingConfig = DEFAULT_READING) -> Books:
    """Rows of a task's file, and the lines that are skipped.

    Raises:
        DataError: the file cannot be read, or has no good row.
    """
    path = folder / f"{task}.jsonl"
    rows: list[Book] = []
    skipped: list[SkippedLine] = []
    try:
        with opened(path, limits) as stream:
            for number, line in enumerate(read_json_rows(stream, limits), 1):
                text = line.raw.decode("utf-8", errors="replace")
                if not text.strip():
                    continue
                try:
                    if line.too_long:
                        raise ValueError(line.too_long)
                    rows.append(_checked(parse_json(text, limits.max_json_depth), task))
                except ValueError as error:
                    reason = one_line(error, _REASON_CHARACTERS)
                    skipped.append(SkippedLine(task, number, reason, text[:_SHOWN_CHARACTERS].rstrip("\n")))
    except (TooLarge, WrongFormat) as error:
        raise DataError(f"{path}: {error}") from None
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}); name the folder of InfiniteBench's JSONL files"
        ) from None
    if not rows:
        reason = skipped[0].reason if skipped else "the file is empty"
        raise DataError(
            f"{path}: none of its {len(skipped)} lines is a row of {task} ({reason}); give the file of the benchmark"
        )
    return Books(rows, skipped)


def _checked(row: Any, task: str) -> Book:
    """The row of a line.

    Raises:
        ValueError: it is not a row of the task.
    """
    if not isinstance(row, dict):
        raise ValueError("not an object")
    # The first release has the keys content and question.
    context, question = row.get("context", row.get("content")), row.get("input", row.get("question", ""))
    answer = row.get("answer")
    answers = [answer] if isinstance(answer, str) else answer
    if not isinstance(context, str) or not context.strip():
        raise ValueError("has no context")
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) for a in answers):
        raise ValueError("has no answer")
    if task != "longbook_sum_eng" and not (isinstance(question, str) and question.strip()):
        raise ValueError("has no input (the question)")
    # Only one task has options; what other rows have under that name, such as an empty list, is not looked at.
    options = row.get("options") if task == "longbook_choice_eng" else None
    if task == "longbook_choice_eng":
        if not isinstance(options, list) or len(options) != 4 or not all(isinstance(o, str) for o in options):
            raise ValueError("does not have four options")
        if len(answers) == 1:
            # The text of an option; its letter counts, too.
            if answers[0] not in options:
                raise ValueError("its answer is not one of its options")
            answers = [answers[0], "ABCD"[options.index(answers[0])]]
    question = question if isinstance(question, str) else ""
    return Book(context=context, question=question, answers=answers, options=options)


# --------------------------------------------------------------------------------------------------
# Samples
# --------------------------------------------------------------------------------------------------


def prompt_of(book: Book, task: str, prompts: str) -> str:
    """The benchmark's prompt with the whole book.

    Args:
        book: the row.
        task: one of ``TASKS``.
        prompts: key of ``PROMPTS``.
    """
    options = dict(zip("ABCD", book.options or ("",) * 4, strict=True))
    return PROMPTS[prompts][task].format(context=book.context, question=book.question, **options)


def cut_to(message: str, budget: int, tokenizer: ChatTokenizer, count: CountPrompt) -> str:
    """Take out the middle of a message, so that its prompt has at most ``budget`` tokens.

    Raises:
        DataError: the chat template alone exceeds the budget.
    """
    tokens = count(message, "")
    if tokens <= budget:
        return message
    ids = tokenizer.encode(message, continues=False)
    keep = len(ids) - (tokens - budget)
    while keep > 0:
        front, back = middle_cut(ids, keep)
        cut = tokenizer.decode(front) + tokenizer.decode(back)
        over = count(cut, "") - budget
        if over <= 0:
            return cut
        # The joined text may be tokenised differently.
        keep -= over
    raise DataError(f"a length of {budget} tokens has no room for any text; raise lengths")


def sample_of(
    book: Book, *, task: str, index: int, length: int, prompts: str, tokenizer: ChatTokenizer, count: CountPrompt
) -> EvalSample:
    """A row as a sample of at most ``length`` tokens, prompt and answer together.

    Args:
        book: the row.
        task: one of ``TASKS``.
        index: number of the row in its file.
        length: most tokens.
        prompts: key of ``PROMPTS``.
        tokenizer: the model's tokenizer.
        count: counts the tokens of a prompt.
    """
    whole = prompt_of(book, task, prompts)
    message = cut_to(whole, length - TASKS[task].max_tokens, tokenizer, count)
    return EvalSample(
        suite="infinitebench",
        task=task,
        length=length,
        index=index,
        message=message,
        prefix="",
        references=tuple(book.answers),
        scorer=TASKS[task].scorer,
        max_tokens=TASKS[task].max_tokens,
        prompt_tokens=count(message, ""),
        details={"cut": message != whole},
    )


def _sample_of_index(rows: Sequence[Book], index: int, **arguments: Any) -> EvalSample:
    return sample_of(rows[index], index=index, **arguments)
