"""What is known of a run before its hours of work: packages, credentials, permissions, disks, templates and positions."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.checkpoint.assets import (
    add_end_tokens,
    end_tokens_of,
    set_template,
    template_hash,
    template_of,
)
from megatron_longpo.errors import CheckpointError, ConfigError
from megatron_longpo.training import preflight
from megatron_longpo.training.best import Best, Rule, read_best, rule_of, write_best
from megatron_longpo.training.objective import OBJECTIVES, spec_of
from megatron_longpo.training.plan import RunPlan
from megatron_longpo.training.preflight import cautions, check_run, checkpoint_bytes
from tests.support.plans import plan_of

# 4 layers of 48 x (2 x 48 + 2 x 24) attention and 3 x 48 x 96 MLP weights, embedding and output layer of 101 x 48.
WEIGHTS = 4 * (48 * 144 + 3 * 48 * 96) + 2 * 101 * 48


@pytest.mark.parametrize(
    ("logging", "package", "message"),
    [
        ({"tensorboard": True}, "tensorboard", "pip install tensorboard, or --no-tensorboard"),
        ({"wandb_project": "p"}, "wandb", "wandb_project=p needs the package wandb.*or leave out --wandb-project"),
        (
            {"mlflow_experiment": "e"},
            "mlflow",
            "pip install mlflow-skinny, or mlflow, or leave out --mlflow-experiment",
        ),
        ({"swanlab_project": "s"}, "swanlab", "swanlab_project=s needs the package swanlab, which is not installed"),
    ],
)
def test_a_missing_package_is_said_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logging: dict[str, Any], package: str, message: str
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
    with pytest.raises(ConfigError, match=message):
        check_run(plan_of(tmp_path, logging={"tensorboard": False, **logging}))
    assert not (tmp_path / "run").exists()


def test_missing_credentials_are_said_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "check_trackers", lambda _: None)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    plan = plan_of(tmp_path, logging={"wandb_project": "p"})
    with pytest.raises(
        ConfigError, match=r"no credentials for api.wandb.ai, neither WANDB_API_KEY nor an entry of .*netrc"
    ):
        check_run(plan)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    check_run(plan)
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    with pytest.raises(ConfigError, match=r"no credentials for wandb\.example\.org"):
        check_run(plan)
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_run(plan)


def _size(plan: RunPlan) -> int:
    return checkpoint_bytes(plan.shape, plan.config)


def test_a_checkpoints_size_is_known(tmp_path: Path) -> None:
    """fp32: 4 bytes per weight and 8 of Adam's moments, 4 of RMSProp's; bf16: 2, and master weights of 4."""
    assert _size(plan_of(tmp_path)) == 12 * WEIGHTS
    assert _size(plan_of(tmp_path, training={"bf16": True})) == 14 * WEIGHTS
    assert _size(plan_of(tmp_path, optimizer={"optimizer": "rmsprop"})) == 8 * WEIGHTS
    assert _size(plan_of(tmp_path, checkpoint={"no_save_optim": True})) == 4 * WEIGHTS


def test_disks_and_permissions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)

    def free(size: int) -> None:
        monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage._replace(free=size))

    free(12 * WEIGHTS - 1)
    with pytest.raises(ConfigError, match=r"a checkpoint needs at least 0\.0 GB, but the disk has 0\.0 GB free"):
        check_run(plan_of(tmp_path))
    free(25 * WEIGHTS)
    check_run(plan_of(tmp_path))
    # Two of five fit.
    (line,) = cautions(plan_of(tmp_path, checkpoint={"save_interval": 2}))
    assert line.startswith("disk: 5 checkpoints need") and "--keep-last" in line
    assert cautions(plan_of(tmp_path, checkpoint={"save_interval": 2, "keep_last": 1})) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is not a folder"):
        check_run(plan_of(tmp_path, checkpoint={"save": str(tmp_path / "file" / "run")}))
    # A user without the right, whoever runs the test.
    monkeypatch.setattr(preflight.os, "access", lambda path, _: Path(path).name != "locked")
    (tmp_path / "locked").mkdir()
    with pytest.raises(ConfigError, match=r"reference_cache=.*locked cannot be written to.*another --reference-cache"):
        check_run(plan_of(tmp_path, reference={"reference_cache": str(tmp_path / "locked" / "cache")}))
    with pytest.raises(ConfigError, match=r"reference_cache=.*data.reference: .*locked cannot be written to"):
        check_run(plan_of(tmp_path, data={"data_path": str(tmp_path / "locked" / "data")}))
    both = {"data_path": ["1", str(tmp_path / "data"), "1", str(tmp_path / "locked" / "data")]}
    held_out = {"valid_data_path": str(tmp_path / "locked" / "data")}
    for data in (both, held_out):
        with pytest.raises(ConfigError, match=r"reference_cache=.*data.reference: .*locked cannot be written to"):
            check_run(plan_of(tmp_path, data=data))
    # Nothing is scored, so nothing is written there.
    check_run(plan_of(tmp_path, data={"data_path": str(tmp_path / "locked" / "data")}, objective={"objective": "sft"}))
    check_run(plan_of(tmp_path, data=both, objective={"objective": "dpo", "loss_type": "simpo"}))
    # A cache that is there is only read.
    (tmp_path / "locked" / "data.reference").mkdir()
    (tmp_path / "locked" / "data.reference" / "0123.npy").touch()
    for data in (both, held_out):
        check_run(plan_of(tmp_path, data=data))


def test_another_chat_template_is_said(tmp_path: Path) -> None:
    theirs = template_hash("the data's")
    plan = plan_of(tmp_path, manifest={"template_hash": theirs})
    (line,) = cautions(plan)
    assert f"made with {theirs[:12]}, but the model has none of its own" in line
    hf = tmp_path / "ckpt" / "hf"
    (hf / "tokenizer_config.json").write_text(json.dumps({"chat_template": "the model's"}))
    (line,) = cautions(plan)
    assert f"but the model's own is {template_hash('the model' + chr(39) + 's')[:12]}" in line
    # As a file, it goes before the entry.
    (hf / "chat_template.jinja").write_text("the data's")
    assert cautions(plan) == []


def test_positions_that_the_models_never_saw_are_said(tmp_path: Path) -> None:
    """Both models claim 512; the long row has 600 tokens, the longest short one 520."""
    long, short = {"longest": 600}, {"longest": 600, "longest_short": 520}
    (line,) = cautions(plan_of(tmp_path, manifest=long))
    assert "longest row has 600 tokens, but the model claims a context of 512 and keeps its RoPE (theta 10000)" in line
    assert cautions(plan_of(tmp_path, manifest=long, model={"rotary_base": 1e6})) == []
    (line,) = cautions(plan_of(tmp_path, manifest=short, model={"rotary_base": 1e6}))
    assert "the reference scores rows of up to 520 tokens" in line
    # DPO's reference sees the long rows, SFT has none.
    assert len(cautions(plan_of(tmp_path, manifest=long, objective={"objective": "dpo"}))) == 2
    assert len(cautions(plan_of(tmp_path, manifest=short, objective={"objective": "sft"}))) == 1


def test_templates_and_end_tokens_of_a_folder(tmp_path: Path) -> None:
    assert template_of(tmp_path) is None and end_tokens_of(tmp_path) == []
    path = tmp_path / "tokenizer_config.json"
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    path.write_text(json.dumps({"chat_template": named, "eos_token": "x"}))
    assert template_of(tmp_path) == "a"
    set_template(tmp_path, "c")
    assert template_of(tmp_path) == (tmp_path / "chat_template.jinja").read_text() == "c"
    assert json.loads(path.read_text()) == {
        "chat_template": [{"name": "default", "template": "c"}, named[1]],
        "eos_token": "x",
    }
    path.write_text("{")
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json: cannot be read"):
        template_of(tmp_path)
    # Without a generation config transformers takes config.json's.
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2, "bos_token_id": 1}))
    assert add_end_tokens(tmp_path, [2]) == [2] and not (tmp_path / "generation_config.json").exists()
    assert add_end_tokens(tmp_path, [7]) == [2, 7]
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 7]}
    # transformers would derive it from config.json again.
    (tmp_path / "generation_config.json").write_text(json.dumps({"_from_model_config": True, "eos_token_id": [2, 3]}))
    assert add_end_tokens(tmp_path, [7, 3]) == [2, 3, 7]
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": [2, 3, 7]}


def test_what_counts_as_best() -> None:
    longpo = OBJECTIVES["longpo"]
    assert rule_of("nll", longpo) == Rule("nll", "min") and rule_of("rewards/margins", longpo) == Rule(
        "rewards/margins", "max"
    )
    assert rule_of("kl/rejected:max", longpo) == Rule("kl/rejected", "max")
    for text, objective, message in (
        ("accuracy", longpo, "'accuracy' is no metric of this run's held-out data; use one of loss, nll"),
        ("nll:up", longpo, "'up' is no direction; use nll:min or nll:max"),
        (
            "rewards/margins",
            OBJECTIVES["sft"],
            "is no metric of this run's held-out data; use one of loss, nll, logps/chosen",
        ),
        ("kl/chosen", spec_of("longpo", "simpo"), "is no metric of this run's"),
    ):
        with pytest.raises(ConfigError, match=message):
            rule_of(text, objective)
    assert Rule("nll", "min").is_better(1.0, 2.0) and not Rule("nll", "min").is_better(1.0, 1.0)
    assert Rule("nll", "max").is_better(2.0, 1.0)


def test_the_best_checkpoint_is_found_again(tmp_path: Path) -> None:
    """Steps 2, 4 and 6 were evaluated, 2 and 4 are there: 4 is the best of them until best.json says of 1 that it is better."""
    for step in (1, 2, 4):
        (tmp_path / f"iter_{step:07d}").mkdir()
        (tmp_path / f"iter_{step:07d}" / "metadata.json").write_text("{}")
    lines = [{"step": step, "nll": nll} for step, nll in ((0, 0.1), (2, 3.0), (4, 2.0), (6, 1.0))]
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rule = Rule("nll", "min")
    assert read_best(tmp_path, rule, until=4) == Best(4, 2.0) and read_best(tmp_path, rule, until=3) == Best(2, 3.0)
    write_best(tmp_path, rule, Best(1, 0.5))
    assert read_best(tmp_path, rule, until=4) == Best(1, 0.5)
    # Of another metric, or damaged, it does not count.
    assert read_best(tmp_path, Rule("nll", "max"), until=4) == Best(2, 3.0)
    content = json.loads((tmp_path / "best.json").read_text())
    (tmp_path / "best.json").write_text(json.dumps({**content, "value": 0.4}))
    assert read_best(tmp_path, rule, until=4) == Best(4, 2.0)
    os.unlink(tmp_path / "validation.jsonl")
    assert read_best(tmp_path, rule, until=4) is None
