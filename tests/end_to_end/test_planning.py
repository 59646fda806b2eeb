"""A plan that is run: what ``plan`` writes, ``train`` takes; what is left out is chosen for the processes that there are."""

from __future__ import annotations

from pathlib import Path

from megatron_longpo.config import from_yaml
from tests.support.data import make_data
from tests.support.launch import PYTHON, command, run, torchrun
from tests.support.models import make_model
from tests.support.runs import metrics_of


def test_train_takes_the_best_plan(tmp_path: Path) -> None:
    make_model("llama", tmp_path / "hf", max_position_embeddings=512)
    run(command("convert", "import", hf=tmp_path / "hf", output=tmp_path / "ckpt"))
    make_data(tmp_path / "data", 8)
    flags = [
        "--hf",
        str(tmp_path / "hf"),
        "--gpus",
        "2",
        "--data-path",
        str(tmp_path / "data"),
        "--global-batch-size",
        "4",
    ]
    # A fixed degree, so that there is something to be taken over.
    run([PYTHON, "tools/plan.py", *flags, "--context-parallel-size", "2", "--output", str(tmp_path / "plan")])
    planned = from_yaml(tmp_path / "plan" / "train.yaml")
    assert planned.parallel.context_parallel_size == 2
    arguments = ["-m", "megatron_longpo.train", "--config", str(tmp_path / "plan" / "train.yaml"), "--auto-layout"]
    arguments += [
        "--load",
        str(tmp_path / "ckpt"),
        "--save",
        str(tmp_path / "run"),
        "--train-iters",
        "1",
        "--no-tensorboard",
    ]
    done = run(torchrun(2, *arguments))
    assert "layout: TP 1, PP 1, CP 2" in done.stdout and "planned for 2 x cpu" in done.stdout
    assert len(metrics_of(tmp_path / "run")) == 1
    ran = from_yaml(tmp_path / "run" / "run.yaml")
    assert (ran.parallel.context_parallel_size, ran.parallel.auto_layout) == (2, False)
