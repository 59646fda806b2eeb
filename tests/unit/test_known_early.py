"""What would fail after hours of answers is known before the first one; a tool that made nothing useful fails."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.commands import generate as command
from megatron_longpo.config import from_dict
from megatron_longpo.engines.base import Engine, EngineError, Prompt, Reply, Sampling
from megatron_longpo.engines.loading import check_vocabulary
from megatron_longpo.engines.make import make_engine
from megatron_longpo.engines.settings import EngineConfig
from megatron_longpo.errors import ConfigError, DataError
from megatron_longpo.evaluation import evaluate as evaluation
from megatron_longpo.evaluation.preferences import check_inputs
from megatron_longpo.evaluation.settings import EvaluationConfig
from megatron_longpo.evaluation.suites.base import Launch
from megatron_longpo.generation import run as generation
from megatron_longpo.generation.pairs import make_part
from megatron_longpo.generation.settings import GenerationConfig
from megatron_longpo.runtime.share import Share
from megatron_longpo.text.chat import BUILT_IN_TEMPLATES, load_tokenizer
from tests.support.data import make_data
from tests.support.launch import free_port
from tests.support.models import make_chat_model, make_model
from tests.support.tokenizers import TEXT, make_fast_tokenizer

Usage = namedtuple("Usage", ["total", "used", "free"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_fast_tokenizer(folder)
    return make_chat_model(folder)


class Speechless(Engine):
    """Refuses, or says nothing."""

    def __init__(self, model: Path, reply: Reply) -> None:
        self.tokenizer, self._reply = load_tokenizer(model), reply
        self.asked = 0

    @property
    def identity(self) -> dict[str, Any]:
        return {"engine": "speechless"}

    def answer(self, groups: Sequence[Sequence[Prompt]], sampling: Sampling, *_: Any) -> list[list[Reply]]:
        self.asked += sum(map(len, groups))
        return [[self._reply for _ in group] for group in groups]


# --------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------


def test_a_report_that_cannot_be_written_is_known_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"output=.*file: cannot be written .*; name a folder"):
        evaluation.make_folder(tmp_path / "file")
    (tmp_path / "out" / "report.md").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"report\.md: is a folder, and a file belongs there"):
        evaluation.make_folder(tmp_path / "out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.json").write_text("{damaged")
    with pytest.raises(ConfigError, match="is not a result of this version"):
        evaluation.make_folder(tmp_path / "other")
    evaluation.make_folder(tmp_path / "new" / "folder")
    assert not list((tmp_path / "new" / "folder").iterdir())


def launch(model: Path, output: Path, **sections: dict[str, Any]) -> Launch:
    output.mkdir(exist_ok=True)
    evaluate = {"output": str(output), "tasks": ["preference"]}
    values = {"evaluate": evaluate, "engine": {"model": str(model)}, **sections}
    return Launch(from_dict(values, "test", EvaluationConfig), Share())


def test_pairs_that_do_not_fit_the_model_are_known_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_data(tmp_path / "pairs", 2, seed=1)
    options = {"preference": {"pairs": str(tmp_path / "pairs")}}
    for name, size in (("model", 101), ("small", 50)):
        make_model("llama", tmp_path / name, vocab_size=size)
    check_inputs(launch(tmp_path / "model", tmp_path / "out", **options))
    with pytest.raises(DataError, match=r"vocab_size=\d+ is larger than the model's 50"):
        check_inputs(launch(tmp_path / "small", tmp_path / "out", **options))
    make_model("llama", tmp_path / "deep", num_hidden_layers=5)
    reference = {"preference": {**options["preference"], "reference_model": str(tmp_path / "deep")}}
    with pytest.raises(ConfigError, match="differs in architecture"):
        check_inputs(launch(tmp_path / "model", tmp_path / "out", **reference))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 1000))
    with pytest.raises(
        ConfigError, match=r"converts 0\.00 GB of weights there for a while, but its disk has 0\.00 GB free"
    ):
        check_inputs(launch(tmp_path / "model", tmp_path / "out", **options))
    monkeypatch.setenv("WORLD_SIZE", "3")
    split = {"preference": {**options["preference"], "tensor_model_parallel_size": 3}}
    three = Launch(launch(tmp_path / "model", tmp_path / "out", **split).config, Share(0, 3, "torchrun"))
    with pytest.raises(ConfigError, match="tensor_model_parallel_size=3 does not divide"):
        check_inputs(three)


def test_an_evaluation_without_any_answer_fails(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Speechless(model, Reply("", False, 9, 5, thinking_tokens=5))
    monkeypatch.setattr(evaluation, "make_engine", lambda *_, **__: engine)
    values = {
        "evaluate": {"output": str(tmp_path / "out"), "tasks": ["ruler"], "lengths": ["2K"], "samples": 1},
        "engine": {"model": str(model)},
        "ruler": {"ruler_tasks": ["niah_single_1", "fwe"]},
    }
    fix = r"ruler: no sample has an answer \(2 only thinking\); raise thinking_tokens, or turn thinking off"
    with pytest.raises(evaluation.NoAnswers, match=fix):
        evaluation.evaluate(from_dict(values, "test", EvaluationConfig))
    # Its report is there.
    assert "2 samples have no answer" in (tmp_path / "out" / "report.md").read_text()
    assert json.loads((tmp_path / "out" / "results.json").read_text())["suites"]["ruler"]["asked"]


# --------------------------------------------------------------------------------------------------
# Generation
# --------------------------------------------------------------------------------------------------


def config(model: Path, folder: Path, **engine: Any) -> GenerationConfig:
    (folder / "texts").mkdir(exist_ok=True)
    (folder / "texts" / "a.txt").write_text(TEXT * 3)
    values = {
        "documents": {
            "documents": [str(folder / "texts")],
            "seq_length": 1200,
            "min_document_tokens": 50,
            "min_chunk_tokens": 50,
            "max_chunk_tokens": 200,
            "chunks_per_document": 1,
            "overlong": "cut",
        },
        "answers": {"answer_tokens": 16},
        "engine": {"model": str(model), **engine},
        "run": {"output": str(folder / "pairs.jsonl")},
    }
    return from_dict(values, "test", GenerationConfig)


def test_outputs_that_cannot_be_written_are_known_first(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.report").write_text("x")
    with pytest.raises(ConfigError, match=r"a\.jsonl\.report: is a file, and the report's folder belongs there"):
        generation.check_output(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl.rejects.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"b\.jsonl\.rejects\.jsonl: is a folder, and a file belongs there"):
        generation.check_output(tmp_path / "b.jsonl")
    with pytest.raises(ConfigError, match="cannot be written"):
        generation.check_output(tmp_path)
    with pytest.raises(ConfigError, match="cannot be written"):
        generation.check_output(tmp_path / "a.jsonl.report" / "c.jsonl")
    generation.check_output(tmp_path / "new" / "c.jsonl")


def test_a_server_that_does_not_answer_is_known_before_documents_are_cut(model: Path, tmp_path: Path) -> None:
    served = config(
        model, tmp_path, engine="openai", tokenizer=str(model), base_url=f"http://127.0.0.1:{free_port()}/v1", retries=0
    )
    with pytest.raises(EngineError, match="no answer after 1 tries"):
        make_part(served, make_engine(served.engine, 1200), 0, 1)
    assert not (tmp_path / "pairs.jsonl.work" / "part-00-of-01" / "documents.jsonl").exists()


def test_positions_and_space_are_told_first(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """4096 positions; documents of 1200 - 16 - 128 tokens with their answer, of 16, and thinking."""
    generation.warn_of_positions(config(model, tmp_path))
    assert capsys.readouterr().out == ""
    generation.warn_of_positions(config(model, tmp_path, thinking_tokens=4000))
    told = capsys.readouterr().out
    assert "the model declares 4096 positions, and documents with their answers have up to 5072 tokens" in told
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 10))
    engine = Speechless(model, Reply("", True, 9, 0))
    make_part(config(model, tmp_path), engine, 0, 1)
    assert "are stored twice; " in capsys.readouterr().out and engine.asked


def test_a_generation_without_any_pair_fails(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = Speechless(model, Reply("", True, 9, 0))
    monkeypatch.setattr(generation, "make_engine", lambda *_, **__: engine)
    monkeypatch.setenv("LOCAL_RANK", "0")
    (tmp_path / "c.yaml").write_text(config(model, tmp_path).as_yaml())
    with pytest.raises(DataError, match=r"pairs\.jsonl: no sample was made; see .*pairs\.jsonl\.rejects\.jsonl"):
        command.generate(["--config", str(tmp_path / "c.yaml")], prog="generate")
    assert "0 samples" in capsys.readouterr().out
    reasons = json.loads((tmp_path / "pairs.jsonl.report" / "report.json").read_text())["reasons"]
    assert reasons == {"empty_questions": 1, "no_turn_left": 1}
    with pytest.raises(DataError, match="no sample was made"):
        command.merge(["--output", str(tmp_path / "pairs.jsonl")], prog="merge")


# --------------------------------------------------------------------------------------------------
# Engines
# --------------------------------------------------------------------------------------------------


def test_a_tokenizer_of_another_model_is_known_first(model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(model)
    shutil.copytree(model, tmp_path / "model")
    hf_config = json.loads((model / "config.json").read_text())

    def with_rows(rows: int) -> Path:
        (tmp_path / "model" / "config.json").write_text(json.dumps({**hf_config, "vocab_size": rows}))
        return tmp_path / "model"

    check_vocabulary(tokenizer, with_rows(tokenizer.vocab_size))
    with pytest.raises(DataError, match=rf"ids up to {tokenizer.vocab_size - 1}, and the model 300 embeddings"):
        check_vocabulary(tokenizer, with_rows(300))
    # A padding token that no conversation holds does no harm.
    padded = AutoTokenizer.from_pretrained(tmp_path / "model")
    padded.add_special_tokens({"pad_token": "<pad>"})
    padded.save_pretrained(tmp_path / "model")
    more = load_tokenizer(tmp_path / "model")
    assert more.vocab_size == tokenizer.vocab_size + 1
    check_vocabulary(more, with_rows(tokenizer.vocab_size))


def test_a_template_that_opens_thinking_is_told(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "template"
    template.write_text(BUILT_IN_TEMPLATES["chatml"].removesuffix("{% endif %}") + "<think>\n{% endif %}")
    make_engine(EngineConfig(model=str(model), chat_template=str(template)), 100)
    assert "note: the chat template opens thinking (<think>), which has no tokens of its own" in capsys.readouterr().out
    make_engine(EngineConfig(model=str(model), chat_template=str(template), thinking_tokens=9), 100)
    assert "note" not in capsys.readouterr().out
