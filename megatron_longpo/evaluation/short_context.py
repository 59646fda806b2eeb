"""Short context by lm-evaluation-harness, with the numbers of examples of the paper's table."""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_longpo.errors import ConfigError, DataError
from megatron_longpo.runtime import platform

VERSION = 1


@dataclass(frozen=True)
class ShortTask:
    """A task of lm-evaluation-harness.

    Attributes:
        shots: examples in front of a question.
        metric: the paper's: acc_norm normalises an option's log-prob by its length in bytes.
        folder: of its data set below ``short_data``.
        title: for tables.
    """

    shots: int
    metric: str
    folder: str
    title: str


SHORT = {
    "mmlu": ShortTask(5, "acc", "mmlu", "MMLU"),
    "arc_challenge": ShortTask(25, "acc_norm", "arc_challenge", "ARC-C"),
    "hellaswag": ShortTask(10, "acc_norm", "hellaswag", "HellaSwag"),
    "winogrande": ShortTask(5, "acc", "winogrande", "Winogrande"),
}
TASKS = tuple(SHORT)

# Where a data set may be below `short_data`: our name, or as the hub names it.
_FOLDERS = {
    "mmlu": ("mmlu", "cais/mmlu", "hails/mmlu_no_train"),
    "arc_challenge": ("arc_challenge", "ai2_arc/ARC-Challenge", "allenai/ai2_arc/ARC-Challenge"),
    "hellaswag": ("hellaswag", "hellaswag/none", "Rowan/hellaswag"),
    "winogrande": ("winogrande", "winogrande/winogrande_xl", "allenai/winogrande/winogrande_xl"),
}
_SPLITS = ("train", "validation", "test", "dev")
_KINDS = {".arrow": "arrow", ".parquet": "parquet", ".jsonl": "json", ".json": "json"}


def local_files(folder: Path) -> tuple[str, dict[str, list[str]]] | None:
    """Kind and files of each split in a folder: ``SPLIT/*.arrow`` as ``save_to_disk`` leaves them, or ``SPLIT*.parquet``,
    ``SPLIT*.jsonl``; None where there are none."""
    for suffix, kind in _KINDS.items():
        found = {
            split: sorted(
                str(p) for pattern in (f"{split}/*{suffix}", f"{split}*{suffix}") for p in folder.glob(pattern)
            )
            for split in _SPLITS
        }
        found = {
            split: [f for f in files if not f.endswith(("state.json", "dataset_info.json"))]
            for split, files in found.items()
        }
        found = {split: files for split, files in found.items() if files}
        if found:
            return kind, found
    return None


def _yaml_of(task: str) -> dict[str, Path]:
    """The harness's own files of a task: one, or one a subject, by name."""
    import lm_eval

    folder = Path(lm_eval.__file__).parent / "tasks"
    if task == "mmlu":
        return {p.stem: p for p in sorted((folder / "mmlu" / "default").glob("mmlu_*.yaml"))}
    file = {
        "arc_challenge": "arc/arc_challenge",
        "hellaswag": "hellaswag/hellaswag",
        "winogrande": "winogrande/default",
    }
    return {task: folder / f"{file[task]}.yaml"}


@dataclass(frozen=True)
class _Config:
    """A harness task to load: its file, changes, and which splits stand in for its own."""

    name: str
    yaml: Path
    changes: dict[str, Any]
    local: dict[str, str]


def _configs(task: str, data: Path | None) -> list[_Config]:
    shots = {"num_fewshot": SHORT[task].shots}
    if data is None:
        return [_Config(name, path, shots, {}) for name, path in _yaml_of(task).items()]
    folders = [data / f for f in _FOLDERS[task] if (data / f).is_dir()]
    result = []
    for name, path in _yaml_of(task).items():
        subject = name.removeprefix("mmlu_") if task == "mmlu" else "."
        found = next((x for f in folders if (x := local_files(f / subject))), None)
        if found is None:
            # Of MMLU some subjects may be there.
            continue
        kind, files = found
        # The harness's splits, or the nearest that are there, which the results say.
        wanted = (
            ("test", "validation", "train") if task in ("mmlu", "arc_challenge") else ("validation", "test", "train")
        )
        tested = next(s for s in (*wanted, "dev") if s in files)
        shown = next((s for s in ("dev" if task == "mmlu" else "train",) if s in files), tested)
        changes = {
            **shots,
            "dataset_path": kind,
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files},
            "test_split": tested,
            "validation_split": None,
            "training_split": None,
            "fewshot_split": shown,
        }
        result.append(_Config(name, path, changes, {"questions": tested, "examples": shown}))
    if not result:
        part = "/SUBJECT" if task == "mmlu" else ""
        raise DataError(
            f"--short-data {data}: has no data for {task}; put its splits into {data / SHORT[task].folder}{part} "
            "(docs/tools.md says how)"
        )
    return result


@dataclass
class LoadedTask:
    """A harness task with its requests.

    Attributes:
        task: of ``SHORT``; name: of the harness.
        harness: the task object.
        requests: by question.
        local: splits, where local data stand in.
    """

    task: str
    name: str
    harness: Any
    requests: dict[int, list[Any]]
    local: dict[str, Any]


def load_tasks(tasks: list[str], data: Path | None, limit: int | None, seed: int) -> list[LoadedTask]:
    """Tasks with all their requests, the examples in front of each drawn by seed as the harness does.

    Raises:
        ConfigError: the harness is not installed.
        DataError: local data are not there, or cannot be loaded.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ConfigError(
            "tasks=short needs lm-evaluation-harness; pip install 'megatron_longpo[eval]', or leave short out"
        ) from None
    import logging

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager()
    loaded = []
    for task in tasks:
        for config in _configs(task, data):
            name = config.name
            try:
                harness = _load(manager, config)
            except Exception as error:  # of datasets and the hub, by the dozen
                detail = " ".join(str(error).split())[:300]
                raise DataError(
                    f"{name}: its data cannot be loaded ({type(error).__name__}: {detail}); without the hub name local "
                    "files with --short-data"
                ) from None
            harness.set_fewshot_seed(seed=seed)
            harness.build_all_requests(limit=limit, rank=0, world_size=1)
            requests: dict[int, list[Any]] = {}
            for request in harness.instances:
                requests.setdefault(request.doc_id, []).append(request)
            loaded.append(LoadedTask(task, name, harness, requests, config.local))
    return loaded


def _load(manager: Any, config: _Config) -> Any:
    # A file that includes the harness's own is what all its versions load.
    content = {"include": str(config.yaml), "task": config.name, **config.changes}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{config.name}.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return manager.load([str(path)])["tasks"][config.name]


def make_model(path: str, dtype: str, batch_size: int) -> Any:
    """The harness's wrapper of a transformers model."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kind: Any = "auto" if dtype == "auto" else getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=kind, local_files_only=True).eval()
    model.to(platform.CURRENT.device)
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    # Given a model that is loaded, it starts no process group of its own.
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def answer(loaded: LoadedTask, numbers: list[int], model: Any) -> list[dict[str, Any]]:
    """Rows of some questions."""
    requests = [r for n in numbers for r in loaded.requests[n]]
    found = iter(model.loglikelihood(requests, disable_tqdm=True))
    metric = SHORT[loaded.task].metric
    rows = []
    for n in numbers:
        results = [next(found) for _ in loaded.requests[n]]
        doc = loaded.requests[n][0].doc
        scores = loaded.harness.process_results(doc, results)
        text = json.dumps([r.args for r in loaded.requests[n]], ensure_ascii=False)
        rows.append(
            {
                "key": key_of(loaded, n),
                "task": loaded.task,
                "length": 0,
                "index": n,
                "score": float(scores[metric]),
                "subtask": loaded.name,
                "digest": hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16],
                "acc": float(scores["acc"]),
                "log_probs": [round(float(lp), 4) for lp, _ in results],
                "target": str(loaded.harness.doc_to_target(doc)),
            }
        )
    return rows


def digest_of(loaded: LoadedTask) -> str:
    """Of all questions with the examples in front of them, and what is right."""
    digest = hashlib.sha256()
    for n in sorted(loaded.requests):
        asked = [[r.args for r in loaded.requests[n]], str(loaded.harness.doc_to_target(loaded.requests[n][0].doc))]
        digest.update(json.dumps(asked, ensure_ascii=False).encode("utf-8", "replace"))
    return digest.hexdigest()[:16]


def key_of(loaded: LoadedTask, number: int) -> str:
    return f"short/{loaded.name}/0/{number}"
