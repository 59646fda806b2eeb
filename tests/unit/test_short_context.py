"""Short context beside lm-evaluation-harness itself: prompts and scores on the same local rows."""

from __future__ import annotations

import copy
import json
import random
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import yaml

from megatron_longpo.evaluation.samples import AnswerRow
from megatron_longpo.evaluation.suites.short_context import (
    SHORT,
    LoadedTask,
    Questions,
    ShortContextSuite,
    ShortRow,
    answer_questions,
    load_tasks,
    make_model,
)
from tests.support.models import make_chat_model
from tests.support.tokenizers import make_fast_tokenizer

WORDS = (
    "the",
    "old",
    "tower",
    "stands",
    "near",
    "a",
    "river",
    "that",
    "nobody",
    "crossed",
    "before",
    "dawn",
    "its",
    "bridge",
)
QUESTIONS = 20
# Enough examples that a sampler which draws another number of them, or another way, cannot agree by chance.
EXAMPLES = 60
NAMES = {"arc_challenge": "arc_challenge", "hellaswag": "hellaswag", "winogrande": "winogrande", "mmlu": "mmlu_anatomy"}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with the hub's columns, in the splits that the harness asks for."""
    folder, rng = tmp_path_factory.mktemp("short"), random.Random(4)

    def words(n: int) -> str:
        return " ".join(rng.choices(WORDS, k=n))

    def arc(i: int) -> dict[str, Any]:
        choices = {"text": [words(rng.randint(1, 3)) for _ in range(4)], "label": list("ABCD")}
        return {"id": str(i), "question": words(6) + "?", "choices": choices, "answerKey": rng.choice("ABCD")}

    def hellaswag(i: int) -> dict[str, Any]:
        endings = [words(rng.randint(2, 6)) for _ in range(4)]
        activity = {"ind": i, "activity_label": words(1), "ctx_a": words(5) + ".", "ctx_b": words(2)}
        return {**activity, "endings": endings, "label": str(rng.randrange(4))}

    def winogrande(_: int) -> dict[str, Any]:
        sentence = f"{words(3)} because _ {words(4)}."
        return {"sentence": sentence, "option1": words(1), "option2": words(2), "answer": str(rng.randint(1, 2))}

    def mmlu(_: int) -> dict[str, Any]:
        choices = [words(1) for _ in range(4)]
        return {"question": words(5), "subject": "anatomy", "choices": choices, "answer": rng.randrange(4)}

    for name, make, examples, questions in (
        ("arc_challenge", arc, "train", "test"),
        ("hellaswag", hellaswag, "train", "validation"),
        ("winogrande", winogrande, "train", "validation"),
        ("mmlu/anatomy", mmlu, "dev", "test"),
    ):
        (folder / name).mkdir(parents=True)
        for split, count in ((examples, EXAMPLES), (questions, QUESTIONS)):
            rows = "".join(json.dumps(make(i)) + "\n" for i in range(count))
            (folder / name / f"{split}.jsonl").write_text(rows)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The harness's wrapper of a tiny model."""
    folder = make_chat_model(make_fast_tokenizer(tmp_path_factory.mktemp("model")))
    return make_model(str(folder), "float32", 4)


@pytest.fixture(scope="module")
def harness(local: Path, model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the harness reports for its own task files, in which only the source of the rows and the shots are replaced."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    folder, files = tmp_path_factory.mktemp("tasks"), []
    for task, name in NAMES.items():
        rows = local / ("mmlu/anatomy" if task == "mmlu" else task)
        content = {
            "include": str(Path(lm_eval.__file__).parent / "tasks" / SHORT[task].yaml.replace("*", "anatomy")),
            "task": name,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {path.stem: str(path) for path in rows.glob("*.jsonl")}},
            "num_fewshot": SHORT[task].shots,
        }
        files.append(folder / f"{name}.yaml")
        files[-1].write_text(yaml.safe_dump(content))
    return dict(
        lm_eval.simple_evaluate(
            model=model,
            tasks=[str(file) for file in files],
            task_manager=TaskManager(),
            bootstrap_iters=0,
            log_samples=True,
        )
    )


@pytest.fixture(scope="module")
def ours(local: Path) -> dict[str, LoadedTask]:
    return {loaded.task: loaded for loaded in load_tasks(list(NAMES), local, None, 1234)}


@pytest.mark.parametrize("task", NAMES)
def test_prompts_and_scores_are_those_of_the_harness(
    task: str, harness: dict[str, Any], ours: dict[str, LoadedTask], model: Any
) -> None:
    loaded, name, metric = ours[task], NAMES[task], SHORT[task].metric
    samples = {sample["doc_id"]: sample for sample in harness["samples"][name]}
    assert loaded.name == name and sorted(loaded.requests) == sorted(samples) == list(range(QUESTIONS))
    for number, requests in loaded.requests.items():
        assert [request.args for request in requests] == [tuple(option) for option in samples[number]["arguments"]]
    rows = cast("list[ShortRow]", answer_questions(Questions(loaded, sorted(loaded.requests)), model))
    for row in rows:
        sample = samples[row["index"]]
        assert (row["acc"], row["score"]) == (sample["acc"], sample[metric])
    for key, mean in (
        ("acc", np.mean([row["acc"] for row in rows])),
        (metric, np.mean([row["score"] for row in rows])),
    ):
        assert mean == pytest.approx(harness["results"][name][f"{key},none"])


def test_questions_beyond_the_positions_are_counted(ours: dict[str, LoadedTask], model: Any) -> None:
    """The harness drops their beginning; and log-probs that are no numbers are no answers."""
    loaded = ours["winogrande"]
    longest = max(len(model.tok_encode("".join(request.args))) for of in loaded.requests.values() for request in of)
    questions = Questions(loaded, sorted(loaded.requests))

    def rows_with(positions: int) -> list[ShortRow]:
        limited = copy.copy(model)
        limited._max_length = positions
        assert limited.max_length == positions
        return cast("list[ShortRow]", answer_questions(questions, limited))

    assert not any(row.get("cut") for row in rows_with(longest - 1))
    cut = [row for row in rows_with(longest - 2) if row.get("cut")]
    assert 0 < len(cut) < QUESTIONS
    metrics = ShortContextSuite().metrics([cast(AnswerRow, row) for row in rows_with(longest - 2)])
    assert metrics["tasks"]["winogrande"]["cut"] == len(cut)
    assert f"{QUESTIONS} ({len(cut)} cut)" in "\n".join(ShortContextSuite().tables(metrics)[0].markdown())

    class Overflowing:
        max_length = longest
        tok_encode = staticmethod(model.tok_encode)

        def loglikelihood(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
            return [(float("nan"), False)] * len(requests)

    rows = answer_questions(questions, Overflowing())
    assert {row["no_answer"] for row in rows} == {"not_finite"} and {row["score"] for row in rows} == {0.0}
    assert json.loads(json.dumps(rows[0], allow_nan=False))["log_probs"] == [None, None]
    (cell,) = ShortContextSuite().cells(ShortContextSuite().metrics(rows)).values()
    assert cell["no_answer"] == {"not_finite": QUESTIONS} and cell["score_of_answers"] is None


def test_missing_splits_are_replaced(local: Path, tmp_path: Path) -> None:
    """The nearest split stands in, and a question is not among its own examples."""
    (tmp_path / "winogrande").mkdir()
    shutil.copy(local / "winogrande" / "train.jsonl", tmp_path / "winogrande" / "validation.jsonl")
    (loaded,) = load_tasks(["winogrande"], tmp_path, None, 1234)
    assert loaded.local == {"questions": "validation", "examples": "validation"}
    for requests in loaded.requests.values():
        shown = requests[0].args[0].split("\n\n")[:-1]
        assert len(shown) == 5
        sentence = requests[0].doc["sentence"]
        assert not any(
            text.endswith(sentence.split("_")[1].strip()) and sentence.split(" _ ")[0] in text for text in shown
        )
