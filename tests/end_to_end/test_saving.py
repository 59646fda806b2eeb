"""What a run leaves: its best checkpoint, Hugging Face weights on the way, an export that is asked as the model was trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_longpo.checkpoint.assets import template_hash
from megatron_longpo.checkpoint.huggingface import HuggingFaceWeights
from megatron_longpo.text.chat import BUILT_IN_TEMPLATES, load_tokenizer
from megatron_longpo.training.metrics import read_metrics
from tests.support.data import text_row, write_lines
from tests.support.launch import command, run
from tests.support.models import make_chat_model
from tests.support.tokenizers import make_fast_tokenizer

# ChatML that mentions an argument.
TEMPLATE = "{% if enable_thinking is defined %}{% endif %}" + BUILT_IN_TEMPLATES["chatml"]
END_OF_SEQUENCE = 0


@pytest.fixture(scope="module")
def brought(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer has no chat template, its checkpoint, and data that were made with ChatML."""
    folder = tmp_path_factory.mktemp("brought")
    make_chat_model(folder / "hf")
    make_fast_tokenizer(folder / "hf", template=None)
    (folder / "hf" / "generation_config.json").write_text(
        json.dumps({"_from_model_config": True, "eos_token_id": END_OF_SEQUENCE})
    )
    snapshot = folder / "models--org--name" / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    (folder / "hf").rename(snapshot)
    run(command("convert", "import", hf=snapshot, output=folder / "ckpt"))
    for name, rows in (("data", range(8)), ("held_out", range(8, 11))):
        lines = [json.dumps(text_row(number)) for number in rows]
        path = write_lines(folder / f"{name}.jsonl", lines)
        arguments = '{"enable_thinking": false}'
        (folder / "template.jinja").write_text(TEMPLATE)
        flags: dict[str, Any] = {
            "tokenizer": snapshot,
            "chat_template": folder / "template.jinja",
            "chat_template_kwargs": arguments,
        }
        run(command("preprocess", input=path, output_prefix=folder / name, **flags))
    return folder


def training(brought: Path, output: Path, **flags: Any) -> list[str]:
    """Four steps, evaluated after each, of which the worst is the best to keep: the first."""
    paths = {"load": brought / "ckpt", "data_path": brought / "data", "valid_data_path": brought / "held_out"}
    settings = {"global_batch_size": 2, "train_iters": 4, "eval_interval": 1, "lr": 1e-3, "save_best": "nll:max"}
    return command("train", "--no-tensorboard", **paths, save=output, **settings, keep_last=1, **flags)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    source = HuggingFaceWeights(folder)
    return {name: source.read(name) for name in source.names()}


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = weights_of(a), weights_of(b)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def trained(brought: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after two steps and resumed, with Hugging Face weights every second step; ``said`` has its log."""
    output = tmp_path_factory.mktemp("run") / "run"
    first = run(training(brought, output, save_hf_interval=2, exit_interval=2)).stdout
    assert sorted(path.name for path in output.glob("iter_*")) == ["iter_0000001", "iter_0000002"]
    # As if it had been killed between the checkpoint and its export.
    shutil.rmtree(output / "hf_0000002")
    second = run(training(brought, output, save_hf_interval=2, exit_interval=4)).stdout
    (output / "said").write_text(first + second)
    return output


def test_the_best_checkpoint_is_kept_beside_the_newest(trained: Path, tmp_path: Path) -> None:
    nll = {record["step"]: record["nll"] for record in read_metrics(trained / "validation.jsonl")}
    assert set(nll) == set(range(5)) and max((1, 2, 3, 4), key=nll.__getitem__) == 1, "the NLL falls"
    assert sorted(path.name for path in trained.glob("iter_*")) == ["iter_0000001", "iter_0000004"]
    best = json.loads((trained / "best.json").read_text())
    assert (best["metric"], best["direction"], best["step"], best["value"]) == ("nll", "max", 1, nll[1])
    assert (trained / "iter_0000001" / "checksums.json").is_file()
    assert "step 1 has the best held-out nll so far" in (trained / "said").read_text()
    for name, source in (("best", trained / "best"), ("first", trained / "iter_0000001")):
        run(command("convert", "export", checkpoint=source, output=tmp_path / name, no_logits=True))
    assert_same_weights(tmp_path / "best", tmp_path / "first")


def test_hugging_face_weights_are_written_on_the_way(trained: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in trained.glob("hf_*")) == ["hf_0000002", "hf_0000004"]
    run(command("convert", "export", checkpoint=trained / "iter_0000004", output=tmp_path / "hf"))
    assert_same_weights(trained / "hf_0000004", tmp_path / "hf")
    files = sorted(path.name for path in (tmp_path / "hf").iterdir())
    assert sorted(path.name for path in (trained / "hf_0000004").iterdir()) == files


def test_the_template_of_the_data_and_its_end_tokens_travel(brought: Path, trained: Path) -> None:
    said = (trained / "said").read_text()
    wanted = template_hash(TEMPLATE)[:12]
    assert f"made with {wanted}, but the model has none of its own" in said
    assert said.index("the model has none of its own") < said.index("step 1/4")
    assert f"the training data's chat template ({wanted}) goes along" in said
    hf = trained / "hf_0000004"
    tokenizer = load_tokenizer(hf)
    assert tokenizer.template == TEMPLATE
    # What older readers read.
    assert json.loads((hf / "tokenizer_config.json").read_text())["chat_template"] == TEMPLATE
    (end,) = tokenizer.answer_ends()
    assert json.loads((hf / "generation_config.json").read_text()) == {"eos_token_id": [END_OF_SEQUENCE, end]}
    settings = json.loads((hf / "chat_settings.json").read_text())
    assert settings["template_hash"] == template_hash(TEMPLATE) and settings["answer_end_ids"] == [end]
    assert settings["chat_template_kwargs"] == {"enable_thinking": False}
    assert settings["special_tokens"]["<|im_end|>"] == end
    assert (
        'ask the model as it was trained (chat_settings.json): chat_template_kwargs {"enable_thinking": false}' in said
    )
    card = (hf / "README.md").read_text()
    assert '| template arguments | {"enable_thinking": false} |' in card
    assert "base_model: org/name" in card and "| base model | org/name at 0123abc |" in card
    assert f"SHA-256 `{template_hash(TEMPLATE)}`" in card


def test_a_best_checkpoint_is_saved_in_the_background_too(brought: Path, tmp_path: Path) -> None:
    run(training(brought, tmp_path / "run", async_save=True, save_hf_interval=3))
    assert sorted(path.name for path in (tmp_path / "run").glob("iter_*")) == ["iter_0000001", "iter_0000004"]
    assert json.loads((tmp_path / "run" / "best.json").read_text())["step"] == 1
    assert [path.name for path in (tmp_path / "run").glob("hf_*")] == ["hf_0000003"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"save_best": "perplexity"}, "save_best=perplexity: 'perplexity' is no metric of this run's held-out data"),
        (
            {"valid_data_path": None, "eval_interval": None},
            "save_best=nll:max concerns held-out data, but valid_data_path is not given",
        ),
        ({"save": None, "save_best": None, "save_hf_interval": 2}, "save_hf_interval is on but save is not given"),
        ({"mlflow_experiment": "e", "save": "new"}, "mlflow"),
    ],
)
def test_what_cannot_be_done_is_said_before_any_work(
    brought: Path, tmp_path: Path, flags: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = training(brought, tmp_path / "run")
    for name, value in flags.items():
        flag = "--" + name.replace("_", "-")
        if flag in arguments:
            place = arguments.index(flag)
            del arguments[place : place + 2]
        arguments += [flag, str(value)] if value is not None else []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://x")
    done = run(arguments, expect=2)
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert "step 1/4" not in done.stdout and not (tmp_path / "run" / "metrics.jsonl").exists()
