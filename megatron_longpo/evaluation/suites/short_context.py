"""Short context by lm-evaluation-harness, with as many examples per question as in the paper's table."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import yaml
from typing_extensions import override

from megatron_longpo.engines.base import Engine, model_identity
from megatron_longpo.errors import ConfigError, DataError, one_line
from megatron_longpo.evaluation.metrics import CellScore, group_by, score_of
from megatron_longpo.evaluation.runner import Answered, SampleBatch
from megatron_longpo.evaluation.samples import AnswerRow, json_digest, sample_key
from megatron_longpo.evaluation.sections import SuiteConfig, check_names, names
from megatron_longpo.evaluation.suites.base import (
    BatchSuite,
    Cell,
    Launch,
    Metrics,
    ReadyBatches,
    ReadySuite,
    percent,
    score_text,
)
from megatron_longpo.runtime.arrow import check_batches
from megatron_longpo.runtime.files import open_regular
from megatron_longpo.runtime.parquet import check_pages
from megatron_longpo.runtime.reading import DEFAULT_READING, ReadingConfig, TooLarge, check_expansion
from megatron_longpo.runtime.tables import Table
from megatron_longpo.schema import Count
from megatron_longpo.text.inputs import is_beside_data, saved_datasets

VERSION = 1


@dataclass(frozen=True)
class ShortTask:
    """A task of lm-evaluation-harness.

    Attributes:
        shots: examples before a question.
        metric: the paper's metric; acc_norm normalises an option's log-prob by its length in bytes.
        title: name in tables.
        yaml: the harness's task file, below its ``tasks`` folder; a pattern where there is one per subject.
        folders: where the data set may be below ``short_data``: under our name, or as the hub names it.
        question_split: split that holds the questions.
        example_split: split that holds the examples.
        has_subjects: whether the data set has a folder per subject.
        local_version: version of the prompts made from local data. 2: the few-shot examples are the harness's own.
    """

    shots: int
    metric: str
    title: str
    yaml: str
    folders: tuple[str, ...]
    question_split: str = "test"
    example_split: str = "train"
    has_subjects: bool = False
    local_version: int = 1

    @property
    def splits(self) -> list[str]:
        """Splits that may hold the questions: the harness's first, then those that may stand in for it."""
        return sorted(_SPLITS, key=lambda split: split != self.question_split)


_SPLITS = ("test", "validation", "train", "dev")
SHORT = {
    "mmlu": ShortTask(
        shots=5,
        metric="acc",
        title="MMLU",
        yaml="mmlu/default/mmlu_*.yaml",
        folders=("mmlu", "cais/mmlu", "hails/mmlu_no_train"),
        example_split="dev",
        has_subjects=True,
    ),
    "arc_challenge": ShortTask(
        shots=25,
        metric="acc_norm",
        title="ARC-C",
        yaml="arc/arc_challenge.yaml",
        folders=("arc_challenge", "ai2_arc/ARC-Challenge", "allenai/ai2_arc/ARC-Challenge"),
    ),
    "hellaswag": ShortTask(
        shots=10,
        metric="acc_norm",
        title="HellaSwag",
        yaml="hellaswag/hellaswag.yaml",
        folders=("hellaswag", "hellaswag/none", "Rowan/hellaswag"),
        question_split="validation",
        local_version=2,
    ),
    "winogrande": ShortTask(
        shots=5,
        metric="acc",
        title="Winogrande",
        yaml="winogrande/default.yaml",
        folders=("winogrande", "winogrande/winogrande_xl", "allenai/winogrande/winogrande_xl"),
        question_split="validation",
        local_version=2,
    ),
}
TASKS = tuple(SHORT)

_KINDS = {".arrow": "arrow", ".parquet": "parquet", ".jsonl": "json", ".json": "json"}
# Questions of a batch, in batches of the harness.
_BATCHES_AT_ONCE = 4


@dataclass(frozen=True)
class ShortConfig:
    """Short context, by lm-evaluation-harness (extra `eval`)."""

    short_tasks: tuple[str, ...] = TASKS
    """mmlu (5-shot), arc_challenge (25), hellaswag (10), winogrande (5)."""
    short_data: str | None = None
    """Folder with local data sets, for machines without access to the hub (docs/evaluation.md)."""
    short_limit: Count | None = None
    """Most questions of each task (of each subject of mmlu)."""
    short_batch_size: Count = 4
    """Questions that the harness answers together."""


@dataclass
class LoadedTask:
    """A harness task with its requests.

    Attributes:
        task: key of ``SHORT``.
        name: the harness's name.
        harness: the harness's task object.
        requests: requests by question.
        local: splits of local data that are used, ``questions`` and ``examples``, and the ``version`` of the prompts if it is
            not 1; empty for data from the hub.
    """

    task: str
    name: str
    harness: Any
    requests: dict[int, list[Any]]
    local: dict[str, Any]


@dataclass(frozen=True)
class Questions:
    """Questions of a batch: numbers of a task's questions."""

    task: LoadedTask
    numbers: list[int]


class ShortRow(AnswerRow, total=False):
    """An answer to a multiple-choice question.

    ``subtask`` is the harness's task, ``acc`` the plain accuracy, ``log_probs`` those of the options (null where the model gives
    no finite number), ``target`` the right one, ``cut`` whether it exceeds the model's positions and lost its beginning.
    """

    subtask: str
    acc: float
    log_probs: list[float | None]
    target: str
    cut: bool


class ShortContextSuite(BatchSuite[list[LoadedTask]]):
    """MMLU, ARC-C, HellaSwag and Winogrande by lm-evaluation-harness."""

    name = "short"
    settings_alike = ("version", "harness", "shots", "local")
    settings_by_task = ("shots", "limit", "local", "questions")

    @override
    def check_options(self, config: SuiteConfig) -> None:
        check_names("short_tasks", config.section(ShortConfig).short_tasks, TASKS)

    @override
    def prepare(self, launch: Launch) -> list[LoadedTask]:
        options = launch.config.section(ShortConfig)
        data = Path(options.short_data) if options.short_data else None
        return load_tasks(
            names(options.short_tasks), data, options.short_limit, launch.config.evaluate.seed, launch.config.reading
        )

    @override
    def begin(self, launch: Launch, inputs: list[LoadedTask], engine: Engine | None) -> ReadySuite:
        config, options = launch.config, launch.config.section(ShortConfig)
        tasks = names(options.short_tasks)
        settings = {
            "version": VERSION,
            "harness": version("lm-eval"),
            "model": {
                "engine": "transformers",
                "model": model_identity(Path(config.model)),
                "dtype": config.engine.dtype,
            },
            "seed": config.evaluate.seed,
            "limit": dict.fromkeys(tasks, options.short_limit or "all"),
            "batch_size": options.short_batch_size,
            "shots": {task: SHORT[task].shots for task in tasks},
            "local": {loaded.name: loaded.local for loaded in inputs if loaded.local},
            "questions": {loaded.name: digest_of(loaded) for loaded in inputs},
        }
        harness = _HarnessModel(config.model, config.engine.dtype, options.short_batch_size)
        size = _BATCHES_AT_ONCE * options.short_batch_size
        batches = [batch for loaded in inputs for batch in _batches(loaded, size)]
        return ReadyBatches(self, batches, harness.answer, launch.open_folder(self, settings))

    @override
    def metrics(self, rows: Sequence[AnswerRow]) -> Metrics:
        """Per task over all its questions (so that MMLU's subjects count by size, as in the harness); the mean of the tasks."""
        tasks = {task: _score_of(group) for task, group in group_by(rows, lambda row: row["task"]).items()}
        return {"tasks": tasks, "average": float(np.mean([cell["score"] for cell in tasks.values()]))}

    @override
    def cells(self, metrics: Metrics) -> Mapping[Cell, CellScore]:
        return {Cell(SHORT[task].title, "-"): cell for task, cell in metrics["tasks"].items()}

    @override
    def tables(self, metrics: Metrics) -> list[Table]:
        rows = [
            [f"{SHORT[t].title} ({SHORT[t].shots}-shot, {SHORT[t].metric})", score_text(cell), _questions_text(cell)]
            for t, cell in metrics["tasks"].items()
        ]
        rows.append(["average", percent(metrics["average"]), ""])
        return [Table("Short context", ["task", "score", "questions"], rows)]


class _ShortScore(CellScore, total=False):
    """``cut`` counts the questions that were cut, if there are any."""

    cut: int


def _score_of(rows: Sequence[AnswerRow]) -> _ShortScore:
    score = cast(_ShortScore, score_of(rows))
    if cut := sum(bool(row.get("cut")) for row in cast("Sequence[ShortRow]", rows)):
        score["cut"] = cut
    return score


def _questions_text(cell: Mapping[str, Any]) -> str:
    return f"{cell['samples']} ({cell['cut']} cut)" if cell.get("cut") else str(cell["samples"])


def _batches(loaded: LoadedTask, size: int) -> Iterator[SampleBatch[Questions]]:
    """Batches of at most ``size`` questions; their cost is the length of what is read."""
    numbers = sorted(loaded.requests)
    for first in range(0, len(numbers), size):
        yield _batch(Questions(loaded, numbers[first : first + size]))


def _batch(questions: Questions) -> SampleBatch[Questions]:
    task = questions.task
    return SampleBatch(
        keys=tuple(key_of(task, number) for number in questions.numbers),
        cost=float(sum(len(request.args[0]) for number in questions.numbers for request in task.requests[number])),
        make=lambda: questions,
    )


# --------------------------------------------------------------------------------------------------
# Questions
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LocalData:
    """A local data set.

    Attributes:
        kind: loader of the package datasets: arrow, parquet or json.
        files: files of each split.
    """

    kind: str
    files: dict[str, list[str]]


def local_data(folder: Path, limits: ReadingConfig = DEFAULT_READING) -> LocalData | None:
    """The data set in a folder: ``SPLIT/*.arrow`` as ``save_to_disk`` writes it, or ``SPLIT*.parquet``, ``SPLIT*.jsonl``; None if
    there is none.

    Args:
        folder: the folder.
        limits: what is too large to be read.

    Raises:
        DataError: a file is not of the kind that its name says, or too large.
    """
    for suffix, kind in _KINDS.items():
        files = {}
        for split in _SPLITS:
            paths = [p for pattern in (f"{split}/*{suffix}", f"{split}*{suffix}") for p in folder.glob(pattern)]
            saved = (
                saved_datasets(folder / split, f"--short-data {folder / split}", None) if suffix == ".arrow" else None
            )
            files[split] = sorted(str(path) for path in saved or paths if not is_beside_data(path, folder))
        for path in itertools.chain(*files.values()):
            _check_file(Path(path), kind, limits)
        if any(files.values()):
            return LocalData(kind, {split: found for split, found in files.items() if found})
    return None


def _check_file(path: Path, kind: str, limits: ReadingConfig) -> None:
    """Raise DataError for a file that the package datasets would wait for, unpack to any size, or read into any memory."""
    # They take seconds to import, and only this suite needs them.
    import pyarrow
    import pyarrow.parquet
    from datasets.utils.extract import Extractor

    try:
        open_regular(path).close()
        packed = Extractor.infer_extractor_format(str(path))
        if packed:
            raise ValueError(f"it is packed ({packed}), and would be unpacked to any size; unpack it")
        size = path.stat().st_size
        if kind == "parquet":
            check_expansion(pyarrow.parquet.ParquetFile(path).metadata, size, limits)
            check_pages(path, limits)
        elif kind == "arrow":
            with pyarrow.memory_map(str(path)) as source:
                check_batches(source, size, limits)
        elif path.suffix == ".json" and size > limits.max_json_bytes:
            raise TooLarge(f"it has {size} bytes; max_json_bytes is {limits.max_json_bytes}")
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: cannot be read ({one_line(error)}); name the data sets with --short-data") from None


@dataclass(frozen=True)
class _TaskFile:
    """A harness task to load.

    Attributes:
        name: the harness's name.
        yaml: the harness's file.
        changes: keys to override.
        local: see ``LoadedTask``.
    """

    name: str
    yaml: Path
    changes: dict[str, Any]
    local: dict[str, Any]


def _task_files(task: str, data: Path | None, limits: ReadingConfig) -> list[_TaskFile]:
    """What to load for a task: one file, or one per subject.

    Raises:
        DataError: ``data`` has nothing for the task.
    """
    import lm_eval  # optional

    spec = SHORT[task]
    folder = Path(lm_eval.__file__).parent / "tasks"
    yaml_files = (
        {path.stem: path for path in sorted(folder.glob(spec.yaml))}
        if spec.has_subjects
        else {task: folder / spec.yaml}
    )
    changes: dict[str, Any] = {"num_fewshot": spec.shots}
    if data is None:
        return [_TaskFile(name, path, changes, local={}) for name, path in yaml_files.items()]
    folders = [data / folder for folder in spec.folders if (data / folder).is_dir()]
    task_files = []
    for name, path in yaml_files.items():
        subject = name.removeprefix(f"{task}_") if spec.has_subjects else "."
        found = next((x for folder in folders if (x := local_data(folder / subject, limits))), None)
        if found is None:
            # Some of MMLU's subjects may be absent.
            continue
        # The harness's splits, or the nearest that are there, which the results record.
        questions = next(split for split in spec.splits if split in found.files)
        examples = spec.example_split if spec.example_split in found.files else questions
        data_changes: dict[str, Any] = {
            "dataset_path": found.kind,
            "dataset_name": None,
            "dataset_kwargs": {"data_files": found.files},
        }
        local: dict[str, Any] = {"questions": questions, "examples": examples}
        if (questions, examples) == (spec.question_split, spec.example_split):
            # The file's own keys stay: the harness draws one example more, and drops the question itself, wherever its keys for
            # the questions and for the examples are equal, and HellaSwag and Winogrande set neither. Other keys for the same
            # splits would draw other examples.
            if spec.local_version > 1:
                local["version"] = spec.local_version
        else:
            data_changes |= {
                "test_split": questions,
                "validation_split": None,
                "training_split": None,
                "fewshot_split": examples,
            }
        task_files.append(_TaskFile(name, path, {**changes, **data_changes}, local))
    if not task_files:
        subject = "/SUBJECT" if spec.has_subjects else ""
        raise DataError(
            f"--short-data {data}: has no data for {task}; put its splits into {data / spec.folders[0]}{subject} "
            "(see docs/evaluation.md)"
        )
    return task_files


def load_tasks(
    tasks: list[str], data: Path | None, limit: int | None, seed: int, reading: ReadingConfig = DEFAULT_READING
) -> list[LoadedTask]:
    """Load tasks with all their requests, the examples drawn by seed as the harness does.

    Args:
        tasks: keys of ``SHORT``.
        data: folder of local data sets, or None for the hub.
        limit: most questions of each task, or None.
        seed: seed of the examples.
        reading: what is too large to be read.

    Raises:
        ConfigError: the harness is not installed.
        DataError: data are missing, or cannot be loaded.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ConfigError(
            "tasks=short needs lm-evaluation-harness; pip install 'megatron_longpo[eval]', or leave short out"
        ) from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager()
    loaded = []
    for task in tasks:
        for task_file in _task_files(task, data, reading):
            name = task_file.name
            try:
                harness = _load(manager, task_file)
            except MemoryError:
                raise
            except Exception as error:  # datasets and the hub raise dozens of types
                raise DataError(
                    f"{name}: its data cannot be loaded ({type(error).__name__}: {one_line(error)}); without access to the "
                    "hub name local files with --short-data"
                ) from None
            harness.set_fewshot_seed(seed=seed)
            try:
                harness.build_all_requests(limit=limit, rank=0, world_size=1)
            except MemoryError:
                raise
            except Exception as error:  # the harness looks up columns and fills templates with whatever is there
                raise DataError(
                    f"{name}: its data have other columns or values than the harness reads ({type(error).__name__}: "
                    f"{one_line(error)}); give the task's data set (docs/evaluation.md)"
                ) from None
            requests: dict[int, list[Any]] = {}
            for request in harness.instances:
                requests.setdefault(request.doc_id, []).append(request)
            loaded.append(LoadedTask(task, name, harness, requests, task_file.local))
    return loaded


def _load(manager: Any, task_file: _TaskFile) -> Any:
    # All versions of the harness can load a file that includes one of its own.
    content = {"include": str(task_file.yaml), "task": task_file.name, **task_file.changes}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{task_file.name}.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return manager.load([str(path)])["tasks"][task_file.name]


def digest_of(loaded: LoadedTask) -> str:
    """Digest of all questions with their examples, and of the right answers."""
    digest = hashlib.sha256()
    for number in sorted(loaded.requests):
        requests = loaded.requests[number]
        asked = [[request.args for request in requests], str(loaded.harness.doc_to_target(requests[0].doc))]
        digest.update(json.dumps(asked, ensure_ascii=False).encode("utf-8", "replace"))
    return digest.hexdigest()[:16]


def key_of(loaded: LoadedTask, number: int) -> str:
    """Key of a question."""
    return sample_key("short", loaded.name, 0, number)


# --------------------------------------------------------------------------------------------------
# Answers
# --------------------------------------------------------------------------------------------------


class _HarnessModel:
    """Answers questions by the harness's wrapper of a transformers model, which is loaded for the first question.

    Args:
        path: model folder.
        dtype: ``auto`` or a torch dtype's name.
        batch_size: questions that the harness answers together.
    """

    def __init__(self, path: str, dtype: str, batch_size: int) -> None:
        self.path, self.dtype, self.batch_size = path, dtype, batch_size
        self._model: Any = None

    def answer(self, batch: SampleBatch[Questions], _done: set[str]) -> Iterator[Answered]:
        """Answer all questions of a batch, those that are done included: their log-probs depend on the batch."""
        if self._model is None:
            self._model = make_model(self.path, self.dtype, self.batch_size)
        yield Answered(answer_questions(batch.make(), self._model))


def make_model(path: str, dtype: str, batch_size: int) -> Any:
    """The harness's wrapper of a transformers model.

    Args:
        path: model folder.
        dtype: ``auto`` or a torch dtype's name.
        batch_size: questions answered together.
    """
    # Imported only if there is something to answer.
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    from megatron_longpo.checkpoint.huggingface import check_model_folder
    from megatron_longpo.engines.loading import load_model, load_or_refuse

    check_model_folder(Path(path))
    model = load_model(Path(path), dtype)
    tokenizer = load_or_refuse(
        Path(path), lambda: AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    )
    # Given a loaded model, the wrapper starts no process group of its own.
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def answer_questions(questions: Questions, model: Any) -> list[AnswerRow]:
    """Rows of some questions.

    Args:
        questions: the questions.
        model: the harness's wrapper.
    """
    task, numbers = questions.task, questions.numbers
    replies = iter(model.loglikelihood([r for number in numbers for r in task.requests[number]], disable_tqdm=True))
    rows: list[AnswerRow] = []
    for number in numbers:
        requests = task.requests[number]
        results = [next(replies) for _ in requests]
        log_probs = [float(log_prob) for log_prob, _ in results]
        # Weights that overflow in their dtype give no numbers, and a comparison of them would be a verdict.
        finite = all(map(math.isfinite, log_probs))
        scores = task.harness.process_results(requests[0].doc, results)
        row: ShortRow = {
            "key": key_of(task, number),
            "task": task.task,
            "length": 0,
            "index": number,
            "score": float(scores[SHORT[task.task].metric]) if finite else 0.0,
            "no_answer": None if finite else "not_finite",
            "subtask": task.name,
            "digest": json_digest([request.args for request in requests]),
            "acc": float(scores["acc"]) if finite else 0.0,
            "log_probs": [round(x, 4) if math.isfinite(x) else None for x in log_probs],
            "target": str(task.harness.doc_to_target(requests[0].doc)),
        }
        # The harness drops what exceeds the model's positions from the beginning, where the examples are; the last token is not
        # read.
        if any(len(model.tok_encode("".join(request.args))) > model.max_length + 1 for request in requests):
            row["cut"] = True
        rows.append(cast(AnswerRow, row))
    return rows
