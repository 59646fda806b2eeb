"""A suite that is registered here only goes through a whole evaluation: the example of docs/adding_a_suite.md, as it stands."""

from __future__ import annotations

import inspect
import json
import re
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.config import from_dict
from megatron_longpo.engines.base import Engine, Prompt, Reply, Sampling
from megatron_longpo.errors import ConfigError, DataError
from megatron_longpo.evaluation import evaluate as evaluation
from megatron_longpo.evaluation.compare import write_comparison
from megatron_longpo.evaluation.registry import SUITES
from megatron_longpo.evaluation.sections import EvaluateConfig
from megatron_longpo.evaluation.settings import EvaluationConfig, check
from tests.support.launch import ROOT

PAGE = ROOT / "docs" / "adding_a_suite.md"


class WordTokenizer:
    """A token per word or punctuation mark."""

    vocabulary_hash = "words"

    def prompt(self, messages: Sequence[Any], prefix: str = "") -> list[str]:
        return re.findall(r"\w+|[^\w\s]", messages[0]["content"] + prefix)


class ReadingEngine(Engine):
    """Answers questions about numbered lists correctly up to a number, and refuses prompts above a length."""

    groups_at_once = 4

    def __init__(self, reach: int, longest: int = 10**9) -> None:
        self.reach, self.longest, self.asked = reach, longest, 0
        self.tokenizer = WordTokenizer()  # type: ignore[assignment]

    @property
    def identity(self) -> dict[str, Any]:
        return {"engine": "reading"}

    def answer(self, groups: Sequence[Sequence[Prompt]], sampling: Sampling, *_: Any) -> list[list[Reply]]:
        return [[self._reply(prompt, sampling) for prompt in group] for group in groups]

    def _reply(self, prompt: Prompt, sampling: Sampling) -> Reply:
        self.asked += 1
        text = prompt.messages[0]["content"]
        tokens = len(self.tokenizer.prompt(prompt.messages))
        if tokens > self.longest:
            return Reply("", False, tokens, 0, refused="too long")
        number = int(text.rsplit("number ", 1)[1].rstrip("?"))
        word = dict(line.split(". ") for line in text.split("\n\n")[0].split("\n"))[str(number)]
        answer = f"It is {word}." if number <= self.reach else "I do not know."
        assert sampling.max_tokens == 16
        return Reply(answer, True, tokens, 3)


def python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture
def recall(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """The module of the page's first block of Python, its suite registered."""
    module = types.ModuleType("megatron_longpo.evaluation.suites.recall")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(python_blocks()[0], str(PAGE), "exec"), module.__dict__)
    monkeypatch.setitem(SUITES, "recall", module.RecallSuite())
    yield module


def configuration(recall: types.ModuleType, output: Path, **options: Any) -> Any:
    """The configuration with the suite's section, as its line in EvaluationConfig would add it."""
    section = ("recall", recall.RecallConfig, field(default_factory=recall.RecallConfig))
    cls = make_dataclass("WithRecall", [section], bases=(EvaluationConfig,), frozen=True)
    values = {
        "evaluate": {"output": str(output), "tasks": ["recall"], "lengths": ["256", "1K"]},
        "engine": {"model": "none"},
        "recall": {"recall_samples": 6, **options},
    }
    return from_dict(values, "test", cls)


def run(config: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(evaluation, "make_engine", lambda *_, **__: engine)
    evaluation.evaluate(config)
    return json.loads((config.output / "results.json").read_text())["suites"]["recall"]


def test_a_new_suite_is_prepared_answered_reported_and_compared(
    recall: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configuration(recall, tmp_path / "good")
    good = run(config, ReadingEngine(reach=10**9), monkeypatch)
    assert good["metrics"]["average"] == {"256": 1.0, "1024": 1.0}
    assert good["asked"] == {"recall/word/256": 6, "recall/word/1024": 6}
    assert good["settings"]["version"] == 1 and len(good["settings"]["words"]) == 16
    rows = [json.loads(line) for line in (tmp_path / "good" / "recall" / "samples.jsonl").read_text().splitlines()]
    assert [row["key"] for row in rows[:2]] == ["recall/word/256/0", "recall/word/256/1"]
    assert all(0.9 * row["length"] <= row["prompt_tokens"] + 16 <= row["length"] for row in rows)
    report = (tmp_path / "good" / "report.md").read_text()
    assert "## Recall: words found by their number" in report and "| average | 100.0 | 100.0 |" in report
    assert "Recall: words found by their number" in capsys.readouterr().out

    # Another model, half of whose long prompts are refused; then asked again with more memory.
    weak = run(configuration(recall, tmp_path / "weak"), ReadingEngine(reach=40, longest=500), monkeypatch)
    assert weak["metrics"]["tasks"]["word"]["1024"] == {
        "score": 0,
        "stderr": 0,
        "samples": 6,
        "refused": 6,
        "no_answer": {"refused": 6},
        "score_of_answers": None,
    }
    report = (tmp_path / "weak" / "report.md").read_text()
    assert "6 samples have no answer and count as wrong: 6 refused by the engine." in report
    assert "| word | 1024 | 6 | 6 | 0.0 | - |" in report
    more_memory = ReadingEngine(reach=40)
    weak = run(configuration(recall, tmp_path / "weak"), more_memory, monkeypatch)
    assert more_memory.asked == 6 and "refused" not in weak["metrics"]["tasks"]["word"]["1024"]

    differences = write_comparison([tmp_path / "good", tmp_path / "weak"], tmp_path / "comparison")
    assert [(d.name, d.length) for d in differences] == [("word", "256"), ("word", "1024")]
    assert all(d.paired and d.samples == 6 and d.change <= 0 for d in differences)
    assert "| recall word | 1024 | weak |" in (tmp_path / "comparison" / "comparison.md").read_text()


def test_a_new_suite_resumes_and_refuses_another_version(
    recall: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration(recall, tmp_path / "out")
    first = run(config, ReadingEngine(reach=10**9), monkeypatch)
    answers = tmp_path / "out" / "recall" / "parts" / "0-of-1" / "answers.jsonl"
    lines = answers.read_text().splitlines(keepends=True)
    answers.write_text("".join(lines[:4]) + lines[4][:30])
    engine = ReadingEngine(reach=10**9)
    again = run(config, engine, monkeypatch)
    assert engine.asked == 8 and again["metrics"] == first["metrics"]
    monkeypatch.setattr(recall.RecallSuite, "version", 2)
    with pytest.raises(ConfigError, match=r"version was 1 and is 2.*--restart"):
        run(config, engine, monkeypatch)


def test_options_of_a_new_suite_are_checked(recall: types.ModuleType, tmp_path: Path) -> None:
    check(configuration(recall, tmp_path))
    with pytest.raises(ConfigError, match="recall_samples=0 must be at least 1"):
        check(configuration(recall, tmp_path, recall_samples=0))
    with pytest.raises(ConfigError, match="recall_sample is unknown; did you mean 'recall_samples'"):
        configuration(recall, tmp_path, recall_sample=1)


def test_without_registration_the_name_is_unknown(tmp_path: Path) -> None:
    values = {"evaluate": {"output": str(tmp_path), "tasks": ["recall"]}, "engine": {"model": "none"}}
    with pytest.raises(ConfigError, match=f"tasks has 'recall'; use {', '.join(SUITES)}"):
        check(from_dict(values, "test", EvaluationConfig))


@pytest.mark.usefixtures("recall")
def test_the_tests_of_the_page_pass() -> None:
    (block,) = (block for block in python_blocks() if "def test_" in block)
    names: dict[str, Any] = {}
    exec(compile(block, str(PAGE), "exec"), names)
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert len(tests) == 3
    for test in tests:
        test()


def test_a_length_without_room_is_refused_by_name(recall: types.ModuleType) -> None:
    with pytest.raises(
        DataError, match=r"recall at 20 tokens: the shortest possible sample has .*; ask for longer samples"
    ):
        recall.make_sample(["word"], lambda message, _: len(message.split()), 7, "word", 20, 0)


def test_help_and_the_page_of_suites_name_every_suite() -> None:
    text = re.search(r'tasks: .*\n +"""(.*?)"""', inspect.getsource(EvaluateConfig))
    assert text is not None and text[1].endswith(f": {', '.join(SUITES)}.")
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^### `(\w+)`$", page, re.MULTILINE)) == sorted(SUITES)
