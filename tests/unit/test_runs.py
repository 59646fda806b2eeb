"""Runs seen from outside: two of them compared, one watched."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from megatron_longpo import cli
from megatron_longpo.commands.runs import compare_runs
from megatron_longpo.errors import ConfigError, DataError
from megatron_longpo.runs import compare, watch
from megatron_longpo.runtime.status import StatusFile

# The order of a record's keys is not the order in which its values come about.
STEP = {
    "loss": 1.0,
    "nll": 0.5,
    "grad_norm": 2.0,
    "lr": 1e-6,
    "tokens": 100,
    "tokens_per_second": 50.0,
    "step_seconds": 2.0,
}
PRINTS = {"fingerprint/batch": 7, "fingerprint/gradients": 8, "fingerprint/weights": 9}


def write(folder: Path, steps: int = 3, changes: dict[int, dict[str, float]] | None = None, **also: float) -> Path:
    """A run of some steps; ``changes`` are of single steps, ``also`` of all."""
    folder.mkdir(exist_ok=True)
    records = [{"step": n, **STEP, **PRINTS, **also, **(changes or {}).get(n, {})} for n in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "run.yaml").write_text(yaml.safe_dump({"training": {"train_iters": 4, "seed": 1}}))
    return folder


# --------------------------------------------------------------------------------------------------
# compare-runs
# --------------------------------------------------------------------------------------------------


def test_the_first_difference_is_that_of_the_cause(tmp_path: Path) -> None:
    """From step 2 on everything differs, and the batch comes before all that is computed of it."""
    first = write(tmp_path / "a", 4)
    changed = {"loss": 1.5, "grad_norm": 3.0, "fingerprint/batch": 1, "fingerprint/weights": 1}
    other = write(tmp_path / "b", 3, {2: changed, 3: {"loss": 0.0, "nll": 0.25}})
    found = compare.compare_runs(first, other)
    assert [(d.step, d.metric) for d in found.differences] == [
        *((2, "fingerprint/batch"), (2, "loss"), (2, "grad_norm"), (2, "fingerprint/weights")),
        (3, "nll"),
    ]
    assert (found.steps, found.further) == (3, (1, 0))
    # |1.0 - 1.5| / 1.5 and |0.5 - 0.25| / 0.5.
    assert math.isclose(found.differences[1].relative, 1 / 3) and found.differences[-1].relative == 0.5


def test_clocks_and_memory_do_not_count(tmp_path: Path) -> None:
    machine = {
        "tokens_per_second": 1.0,
        "step_seconds": 9.0,
        "peak_memory_gb": 3.0,
        "seconds/optimizer": 1.0,
        "tflops_per_rank": 2.0,
        "memory/weights_gb": 1.0,
    }
    found = compare.compare_runs(write(tmp_path / "a"), write(tmp_path / "b", **machine))
    assert found.differences == () and found.only == ((), ()) and found.metrics == 8


def test_what_is_small_enough_is_equal(tmp_path: Path) -> None:
    first, other = write(tmp_path / "a"), write(tmp_path / "b", loss=1.00001)
    assert compare.compare_runs(first, other).differences[0].metric == "loss"
    assert compare.compare_runs(first, other, tolerance=1e-4).differences == ()


def test_nan_equals_nan(tmp_path: Path) -> None:
    first, other = write(tmp_path / "a", loss=math.nan), write(tmp_path / "b", loss=math.nan)
    assert compare.compare_runs(first, other).differences == ()
    assert compare.compare_runs(first, write(tmp_path / "c")).differences[0].relative == math.inf


def test_held_out_data_are_compared_after_the_step(tmp_path: Path) -> None:
    folders = [write(tmp_path / name) for name in "ab"]
    for folder, nll in zip(folders, (1.0, 2.0), strict=True):
        (folder / "validation.jsonl").write_text(json.dumps({"step": 0, "nll": nll, "seconds": nll, "by_length": {}}))
    found = compare.compare_runs(*folders)
    assert [(d.step, d.metric) for d in found.differences] == [(0, "held-out nll")] and found.steps == 3


def test_what_only_one_run_has_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, other = write(tmp_path / "a", preference=1.0, loss=2.0), write(tmp_path / "b", 4)
    (other / "run.yaml").write_text(yaml.safe_dump({"training": {"train_iters": 4, "seed": 2}}))
    found = compare.compare_runs(first, other)
    assert found.settings == {"training.seed": (1, 2)}
    compare.print_comparison(found, "a", "b")
    text = capsys.readouterr().out
    assert "a and b differ first in loss of step 1: 2 and 1" in text
    assert "b has 1 further steps" in text and "only a has preference" in text and "training.seed: 1 and 2" in text


def test_runs_without_a_common_step_are_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "a", 1)
    (first / "metrics.jsonl").write_text(json.dumps({"step": 9, **STEP}))
    with pytest.raises(DataError, match=r"has steps 9 to 9 and .* 1 to 3, none in common"):
        compare.compare_runs(first, write(tmp_path / "b"))
    with pytest.raises(DataError, match="there is no step in it"):
        compare.compare_runs(tmp_path / "nothing", tmp_path / "b")


def test_the_exit_status_says_whether_runs_differ(tmp_path: Path) -> None:
    first, other = str(write(tmp_path / "a")), str(write(tmp_path / "b", loss=1.5))
    compare_runs([first, first], prog="compare-runs")
    compare_runs([first, other, "--tolerance", "0.4"], prog="compare-runs")
    with pytest.raises(SystemExit) as ending:
        compare_runs([first, other], prog="compare-runs")
    assert ending.value.code == 1


# --------------------------------------------------------------------------------------------------
# watch
# --------------------------------------------------------------------------------------------------


def shown(folder: Path, **settings: Any) -> str:
    stream = io.StringIO()
    watch.watch_run(folder, once=True, interval=1.0, console=Console(file=stream, width=200, **settings))
    return stream.getvalue()


def test_a_running_run_is_shown(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", 3, {1: {"loss": 4.0}, 2: {"loss": 2.0}})
    (folder / "iter_0000002").mkdir()
    (folder / "validation.jsonl").write_text(json.dumps({"step": 0, "nll": 0.75}) + "\n")
    text = shown(folder)
    assert "step 3 of 4" in text and "checkpoint iter_0000002" in text and "held-out data evaluated" in text
    # Two seconds a step, and one step is left; 100 tokens in each.
    assert "2.00 s per step, 50 tokens/s, 0:02 left" in text
    # 4, 2, 1 between 1 and 4: the top, a third of seven levels, the bottom. The mean of them is 2.3333.
    assert "█▃▁" in text and "2.3333" in text and "0.7500" in text


def test_what_the_run_says_of_itself_is_shown(tmp_path: Path) -> None:
    folder = write(tmp_path / "run")
    status = StatusFile(folder, train_iters=9)
    status.write("running", step=3)
    assert "step 3 of 9, running on" in shown(folder) and not watch.look(folder).has_ended
    status.slow = "slow in reading its samples: rank 5 (node1)"
    status.write("running", step=3)
    assert status.slow in shown(folder)
    status.write("failed", message="no space")
    text = shown(folder)
    assert "failed on" in text and "no space" in text and "left" not in text and "slow" not in text
    assert watch.look(folder).has_ended


def test_a_run_that_has_not_taken_a_step_is_shown(tmp_path: Path) -> None:
    StatusFile(tmp_path, train_iters=9).write("starting")
    assert "step 0 of 9, starting" in shown(tmp_path)
    with pytest.raises(DataError, match=r"holds no metrics\.jsonl"):
        watch.look(tmp_path / "nothing")


def test_a_live_view_ends_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "run", 3)
    looks: list[float] = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        write(folder, 4)

    monkeypatch.setattr(watch.time, "sleep", sleep)
    stream = io.StringIO()
    console = Console(file=stream, width=100, force_terminal=True)
    watch.watch_run(folder, once=False, interval=0.25, console=console)
    assert looks == [0.25] and "step 4 of 4" in stream.getvalue()


def test_a_curve_has_a_block_per_stretch() -> None:
    assert watch.curve([0.0, 1.0, 2.0, 7.0]) == "▁▂▃█"
    assert watch.curve([1.0, 1.0]) == "▁▁"
    assert watch.curve([math.nan, 1.0, 2.0]) == " ▁█"
    assert watch.curve([math.nan]) == " "
    # Eight values in four stretches: means 0, 0, 1, 1.
    assert watch.curve([0.0] * 4 + [1.0] * 4, width=4) == "▁▁██"


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("watch", ["--interval", "-1"], "interval=-1"),
        ("compare-runs", ["OTHER", "--tolerance", "nan"], "tolerance=nan"),
        ("compare-runs", ["OTHER", "--tolerance", "5"], "tolerance=5"),
        ("status", ["--alive", "-1"], "alive=-1"),
    ],
)
def test_settings_have_ranges(command: str, arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        cli.function_of(command)([str(tmp_path), *arguments], prog=command)
