"""Rounds by the command line: the stages are the project's own commands; broken off, resumed, extended."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from megatron_longpo.commands.evolve import _planner as planner_of
from megatron_longpo.errors import DataError
from megatron_longpo.evolution import run as runner
from megatron_longpo.evolution.gate import read_gate
from megatron_longpo.evolution.records import read_record
from megatron_longpo.evolution.status import read_status
from tests.support.launch import PYTHON, Running, run
from tests.support.rounds import make_inputs, write_rounds

TOOL = [PYTHON, "tools/self_evolve.py"]
# Enough steps to be stopped among them.
CHANGES = {
    "defaults": {
        "train": {"training": {"train_iters": 60}, "checkpoint": {"save_interval": 5, "keep_last": 1}},
        "gate": [{"suite": "preference", "name": "nll", "at_most": 0.0}],
    }
}


def quick(command: list[str], path: Path, variables: dict[str, str]) -> int:
    """What ``run._tee`` does, in a process that has the imports already."""
    done = run(command, env=variables, expect=None)
    path.write_text(done.stdout + done.stderr)
    return done.returncode


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One round."""
    folder = tmp_path_factory.mktemp("evolution")
    make_inputs(folder)
    config = write_rounds(folder, rounds=[{"name": "first"}], **CHANGES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "_tee", quick)
        runner.run_rounds(planner_of(str(config)))
    return folder


def weights(folder: Path) -> bytes:
    return (folder / "rounds" / "first" / "longpo" / "model" / "model.safetensors").read_bytes()


def test_a_round_ends_with_an_evaluated_model(made: Path) -> None:
    first = made / "rounds" / "first"
    lines = [json.loads(line) for line in (first / "longpo" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 60
    content = json.loads((first / "comparison" / "comparison.json").read_text())
    assert content["first"] == "before" and {line["other"] for line in content["differences"]} == {"longpo"}
    assert read_gate(first / "gate.json") == "go"
    counts = [len((first / name).read_text().splitlines()) for name in ("pairs.jsonl", "train.jsonl", "held_out.jsonl")]
    assert counts[0] == counts[1] + counts[2] and counts[2] == 2


def test_stopped_while_it_trains_it_resumes(made: Path) -> None:
    """Every process ends with the driver, and the model is the same as undisturbed, bit for bit."""
    before, config = weights(made), str(made / "rounds.yaml")
    run([*TOOL, "--config", config, "--redo", "first/train:longpo"])
    log = made / "rounds" / "first" / "stages" / "train-longpo" / "log.txt"
    driver = Running([*TOOL, "--config", config], fresh=True)
    for _ in range(1200):
        if log.exists() and " 6/60 |" in log.read_text():
            break
        time.sleep(0.05)
    stages = driver.children()
    os.kill(driver.pid, signal.SIGTERM)
    driver.wait(60, expect=128 + signal.SIGTERM)
    # A writer's helper ends a moment after its process.
    ends = time.monotonic() + 20
    while any(psutil.pid_exists(pid) for pid in stages) and time.monotonic() < ends:
        time.sleep(0.1)
    assert stages and not any(psutil.pid_exists(pid) for pid in stages)
    record = read_record(log.parent)
    assert record is not None and record.state == "failed" and record.attempts == 1
    assert "60/60 |" not in log.read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "_tee", quick)
        runner.run_rounds(planner_of(config))
    record = read_record(log.parent)
    assert record is not None and record.state == "done" and record.attempts == 2
    assert weights(made) == before


def test_another_round_begins_with_the_model_of_the_first(made: Path) -> None:
    config = write_rounds(made, **CHANGES)
    planner = planner_of(str(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "_tee", quick)
        runner.run_rounds(planner)
    assert all(status.word == "done" for status in read_status(planner))
    settings = json.loads((made / "rounds" / "second" / "before" / "results.json").read_text())
    assert settings["suites"]
    config_text = (made / "rounds" / "second" / "stages" / "generate" / "config.yaml").read_text()
    assert str(made / "rounds" / "first" / "longpo" / "model") in config_text
    done = run([*TOOL, "status", "--config", str(config)])
    assert "second/gate" in done.stdout and "waiting" not in done.stdout
    run([*TOOL, "report", "--config", str(config)])
    page = (made / "rounds" / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 6 and "Round second" in page


def test_a_changed_input_is_noticed(made: Path) -> None:
    path = made / "rounds" / "first" / "train.jsonl"
    before = path.read_bytes()
    config = str(write_rounds(made, rounds=[{"name": "first"}], **CHANGES))
    path.write_bytes(before + b"\n")
    planner = planner_of(config)
    runner.redo(planner, "first/preprocess")
    try:
        with pytest.raises(DataError, match=r"first/split is done, but .*train\.jsonl.* was changed or removed since"):
            runner.run_rounds(planner)
    finally:
        path.write_bytes(before)


def test_a_stage_that_fails_is_named_with_its_error(made: Path, tmp_path: Path) -> None:
    changes = {
        "evolve": {"model": str(made / "model")},
        "defaults": {"generate": {"questions": {"question_pattern": "(never)"}}},
    }
    texts = {"documents": {"documents": [str(made / "texts")]}}
    changes["defaults"]["generate"].update(texts)  # type: ignore[index]
    config = write_rounds(tmp_path, rounds=[{"name": "first"}], **changes)
    done = run([*TOOL, "--config", str(config)], expect=2)
    assert "no sample was made" in done.stderr and "Traceback" not in done.stderr
