"""Questions about the user's documents: which length they count at, both scores, what a file must hold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.config import from_dict
from megatron_longpo.engines.base import Engine, Prompt, Reply, Sampling
from megatron_longpo.errors import ConfigError, DataError
from megatron_longpo.evaluation import evaluate as evaluation
from megatron_longpo.evaluation.compare import write_comparison
from megatron_longpo.evaluation.registry import SUITES
from megatron_longpo.evaluation.scoring import exact_match
from megatron_longpo.evaluation.settings import EvaluationConfig, check
from megatron_longpo.evaluation.suites.qa import read_questions


class WordTokenizer:
    """A token per word."""

    vocabulary_hash = "words"

    def prompt(self, messages: Sequence[Any], prefix: str = "") -> list[str]:
        return (messages[0]["content"] + prefix).split()


class ReadingEngine(Engine):
    """Answers `Where is NAME?` with the words that follow `NAME is in`, if they stand within its reach."""

    groups_at_once = 2

    def __init__(self, reach: int) -> None:
        self.reach = reach
        self.groups: list[int] = []
        self.tokenizer = WordTokenizer()  # type: ignore[assignment]

    @property
    def identity(self) -> dict[str, Any]:
        return {"engine": "reading"}

    def answer(self, groups: Sequence[Sequence[Prompt]], sampling: Sampling, *_: Any) -> list[list[Reply]]:
        assert sampling.max_tokens == 4
        self.groups += map(len, groups)
        return [[self._reply(prompt) for prompt in group] for group in groups]

    def _reply(self, prompt: Prompt) -> Reply:
        text = prompt.messages[0]["content"]
        name = text.rsplit(" ", 1)[1].rstrip("?")
        seen = " ".join(text.split()[: self.reach])
        _, found, after = seen.partition(f"{name} is in ")
        return Reply(after.split(".")[0] if found else "the moon", True, len(text.split()), 3)


def document(words: int) -> str:
    return " ".join(["Ann is in Old Rome."] + ["more"] * (words - 10) + ["Bob is in {Bonn}."])


def questions(tmp_path: Path) -> Path:
    rows = [
        {"context": document(words), "question": f"Where is {name}?", "answers": answers, "task": task}
        for words in (20, 50, 51, 500)
        for name, answers, task in (("Ann", ["rome", "Old Rome"], "first"), ("Bob", "Bonn", "last"))
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    return path


def run(path: Path, output: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, Any]:
    values = {
        "evaluate": {"output": str(output), "tasks": ["qa"], "lengths": [32, 64]},
        "engine": {"model": "none"},
        "qa": {"qa_data": str(path), "qa_tokens": 4, **options},
    }
    monkeypatch.setattr(evaluation, "make_engine", lambda *_, **__: engine)
    evaluation.evaluate(from_dict(values, "test", EvaluationConfig))
    return json.loads((output / "results.json").read_text())["suites"]["qa"]


def test_documents_count_at_the_shortest_length_that_holds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = questions(tmp_path)
    engine = ReadingEngine(reach=40)
    found = run(path, tmp_path / "weak", engine, monkeypatch)
    # With a question of three words and four for the answer the documents have 27, 57, 58 and 507 tokens.
    assert found["asked"] == {"qa/first/32": 1, "qa/last/32": 1, "qa/first/64": 2, "qa/last/64": 2}
    assert engine.groups == [2, 2, 2]
    assert "2 question(s) about documents longer than 64 tokens are left out" in capsys.readouterr().out
    of = found["metrics"]
    assert of["tasks"]["first"]["64"]["score"] == 1 and of["tasks"]["last"]["64"]["score"] == 0
    assert of["average"] == {"32": 1.0, "64": 0.5}
    assert {name: of["scores"][name]["qa"]["64"]["score"] for name in of["scores"]} == {
        "exact_match": 0.5,
        "token_f1": 0.5,
    }
    report = (tmp_path / "weak" / "report.md").read_text()
    assert "| exact match | 100.0 ± 0.0 | 50.0 ± 28.9 |" in report and "| average | 100.0 | 50.0 |" in report

    good = run(path, tmp_path / "good", ReadingEngine(reach=100), monkeypatch)
    assert good["metrics"]["average"] == {"32": 1.0, "64": 1.0}
    write_comparison([tmp_path / "weak", tmp_path / "good"], tmp_path / "comparison")
    lines = json.loads((tmp_path / "comparison" / "comparison.json").read_text())["differences"]
    (line,) = [line for line in lines if line["name"] == "last" and line["length"] == "64"]
    assert line["paired"] and line["other_mean"] - line["first_mean"] == 1
    other = run(path, tmp_path / "f1", ReadingEngine(reach=100), monkeypatch, qa_score="token_f1", qa_samples=2)
    assert other["asked"] == {"qa/first/32": 1, "qa/last/32": 1}
    with pytest.raises(ConfigError, match="qa of weak has"):
        write_comparison([tmp_path / "weak", tmp_path / "f1"], tmp_path / "refused")
    with pytest.raises(DataError, match=r"all 8 question\(s\) are longer than 64 tokens; give --lengths a longer one"):
        run(path, tmp_path / "short", ReadingEngine(9), monkeypatch, qa_prompt="{context}" + " x" * 40 + "{question}")


def test_lengths_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(questions(tmp_path), tmp_path / "own", ReadingEngine(100), monkeypatch, qa_lengths=["1K", "28"])
    assert found["asked"] == {"qa/first/28": 1, "qa/last/28": 1, "qa/first/1024": 3, "qa/last/1024": 3}
    values = {
        "evaluate": {"output": "o", "tasks": ["qa", "ruler"], "lengths": [64]},
        "qa": {"qa_lengths": ["1K", "28"]},
    }
    config = from_dict(values, "test", EvaluationConfig)
    assert SUITES["qa"].lengths(config) == [28, 1024] and SUITES["ruler"].lengths(config) == [64]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("answer", "score"), [("The Rome.", 1.0), ("rome", 1.0), ("Rome, old", 0.0), ("", 0.0), ("bonn", 1.0)]
)
def test_exact_match_ignores_articles_case_and_punctuation(answer: str, score: float) -> None:
    assert exact_match(answer, ("Rome", "Bonn!")) == score


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("[1]", "is not an object"),
        ('{"question": "Who?", "answers": "Ann"}', "has no context"),
        ('{"context": "c", "question": " ", "answers": "Ann"}', "has no question"),
        ('{"context": "c", "question": "Who?", "answers": []}', "has no answers"),
        ('{"context": "c", "question": "Who?", "answers": "Ann", "task": "a/b"}', "has the task 'a/b'"),
        ('{"context": ', "line 2"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path: Path, row: str, message: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"context": "c", "question": "Who?", "answers": ["Ann"]}\n' + row + "\n")
    with pytest.raises(DataError, match=message) as error:
        read_questions(path)
    assert "line 2" in str(error.value) and str(error.value).endswith("correct or remove the line")


def test_files_without_questions(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text("\n")
    with pytest.raises(DataError, match="has no question; give another file with --qa-data"):
        read_questions(tmp_path / "q.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        read_questions(tmp_path / "none.jsonl")
    array = '[\n{"context": "c", "question": "Who?", "answers": "Ann"},\n{"context": "c", "question": "Why?", "answers": "so"}]'
    (tmp_path / "q.json").write_text(array)
    assert [(q.task, q.index, q.answers) for q in read_questions(tmp_path / "q.json")] == [
        ("qa", 0, ("Ann",)),
        ("qa", 1, ("so",)),
    ]


@pytest.mark.parametrize(
    ("qa", "message"),
    [
        ({}, "qa_data is not given"),
        ({"qa_data": "q", "qa_prompt": "{context}"}, "has {question} 0 times"),
        ({"qa_data": "q", "qa_lengths": ["4M"]}, "qa_lengths has '4M', which is not a number of tokens"),
    ],
)
def test_options(qa: dict[str, Any], message: str) -> None:
    values = {"evaluate": {"output": "o", "tasks": ["qa"]}, "engine": {"model": "m"}, "qa": qa}
    with pytest.raises(ConfigError, match=message):
        check(from_dict(values, "x", EvaluationConfig))
