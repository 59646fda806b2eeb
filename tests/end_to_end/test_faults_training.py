"""Faults of machines, disks and users in training: each ends in one line that names it, and no good checkpoint is lost."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_longpo.checkpoint.folders import folder_of, latest_step, whole_steps
from megatron_longpo.runtime.status import read_status
from megatron_longpo.training.metrics import read_metrics
from tests.support.damages import flip_bit_of
from tests.support.data import make_data
from tests.support.launch import PYTHON, Running, command, environment, run, torchrun
from tests.support.models import make_model
from tests.support.runs import assert_same_samples, assert_same_tensors, metrics_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama's checkpoint and data, and ``run``, a run of it that stopped after three of its ten steps."""
    folder = tmp_path_factory.mktemp("model")
    make_model("llama", folder / "hf", num_hidden_layers=2)
    run(command("convert", "import", hf=folder / "hf", output=folder / "ckpt"))
    make_data(folder / "data", 6, longest=60)
    run([PYTHON, *train(folder, folder / "run", "--exit-interval", "3")])
    return folder


def train(model: Path, output: Path, *flags: str, module: str = "megatron_longpo.train") -> list[str]:
    """Arguments of a run without a reference that saves every step."""
    return [
        *("-m", module, "--data-path", str(model / "data"), "--load", str(model / "ckpt"), "--save", str(output)),
        *("--global-batch-size", "2", "--train-iters", "10", "--save-interval", "1", "--objective", "sft"),
        *("--lr", "1e-3", "--adam-eps", "1e-4", "--no-tensorboard", "--plot-interval", "1000", *flags),
    ]


def meddle(
    model: Path,
    output: Path,
    what: str,
    *flags: str,
    rank: int = 0,
    processes: int = 1,
    launcher: Sequence[str] = (),
    **extra: str,
) -> Running:
    """Start a run in which something happens after its second step; see tests/support/meddling_training.py."""
    arguments = train(model, output, *flags, module="tests.support.meddling_training")
    line = [PYTHON, *arguments] if processes == 1 else torchrun(processes, *launcher, *arguments)
    return Running(line, env=environment(MEDDLE=what, MEDDLE_RANK=str(rank), **extra))


def error_of(stderr: str) -> str:
    """The only error line. torchrun's own traceback follows it in a launch of several processes."""
    (line,) = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert "Traceback" not in stderr[: stderr.index(line) + len(line)], stderr
    return line


def wait_for_steps(process: Running, output: Path, steps: int) -> None:
    deadline = time.monotonic() + 60
    while len(read_metrics(output / "metrics.jsonl")) < steps:
        assert process.poll() is None and time.monotonic() < deadline, process.output()
        time.sleep(0.1)


# --------------------------------------------------------------------------------------------------
# Damaged checkpoints
# --------------------------------------------------------------------------------------------------


def _cut(pattern: str, size: int | None) -> Callable[[Path], None]:
    """Cut the largest file that matches; None removes it."""

    def damage(folder: Path) -> None:
        path = max(folder.glob(pattern), key=lambda p: p.stat().st_size)
        if size is None:
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:size])

    return damage


DAMAGES: dict[str, Callable[[Path], None]] = {
    "distcp cut": _cut("*.distcp", 1000),
    "distcp empty": _cut("*.distcp", 0),
    "distcp missing": _cut("*.distcp", None),
    "metadata missing": _cut(".metadata", None),
    "metadata cut": _cut(".metadata", 100),
    "common missing": _cut("common.pt", None),
    "common cut": _cut("common.pt", 50),
    "json cut": _cut("metadata.json", 1),
    "common of another program": lambda folder: (folder / "common.pt").write_bytes(b"PK\x03\x04 junk") and None,
}


def test_damaged_checkpoints_are_named_and_an_older_one_used(model: Path, tmp_path: Path) -> None:
    """One of each kind of damage, all newer than the good one."""
    output = tmp_path / "run"
    shutil.copytree(model / "run", output)
    damaged = {name: folder_of(output, 4 + number) for number, name in enumerate(DAMAGES)}
    for name, folder in damaged.items():
        shutil.copytree(folder_of(output, 3), folder)
        DAMAGES[name](folder)
    done = run([PYTHON, *train(model, output, "--exit-interval", "4")])
    assert "Traceback" not in done.stderr, done.stderr
    for name, folder in damaged.items():
        aside = f"damaged_{folder.name}"
        (line,) = [line for line in done.stdout.splitlines() if f"it is now {aside}" in line]
        assert str(folder) in line and "resumes from step 3" in line, name
        assert (output / aside).is_dir()
    assert latest_step(output) == 4
    assert [r["step"] for r in read_metrics(output / "metrics.jsonl")] == [1, 2, 3, 4]


def test_where_no_checkpoint_is_good_none_is_touched(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(model / "run", output)
    for step in (1, 2, 3):
        _cut("*.distcp", 10)(folder_of(output, step))
    done = run([PYTHON, *train(model, output)], expect=2)
    assert str(folder_of(output, 3)) in error_of(done.stderr)
    assert sorted(p.name for p in output.glob("*iter_0*")) == [f"iter_000000{step}" for step in (1, 2, 3)]


def test_an_incomplete_newest_checkpoint_is_passed_over_and_said(model: Path, tmp_path: Path) -> None:
    """With other remains of crashes beside it: they do not matter."""
    output = tmp_path / "run"
    shutil.copytree(model / "run", output)
    (folder_of(output, 3) / "metadata.json").unlink()
    (output / "latest_checkpointed_iteration.txt").write_text("7\n")
    (output / "iter_0000009").mkdir()
    (output / "iter_junk").mkdir()
    (output / ".writing_0000004").mkdir()
    (folder_of(output, 2) / "model.json").write_text("{")
    lines = ["{", "[" * 200000, '{"step": "x"}', '{"step": 2, "loss": "low"}', "\0"]
    (output / "metrics.jsonl").write_text("\n".join(lines) + "\n" + json.dumps({"step": 1, "loss": 6.0}) + "\n")
    done = run([PYTHON, *train(model, output, "--exit-interval", "4")])
    assert f"{folder_of(output, 3)}: has no metadata.json, so it is incomplete and is passed over" in done.stdout
    assert "iter_0000009: has no metadata.json" in done.stdout and "names step 7" in done.stdout
    assert "metrics.jsonl: 5 line(s) that hold no metrics are dropped" in done.stdout
    assert f"resumed from {folder_of(output, 2)} after step 2" in done.stdout
    assert [r["step"] for r in read_metrics(output / "metrics.jsonl")] == [1, 3, 4]


# --------------------------------------------------------------------------------------------------
# Values that are not finite
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["nan weight", "infinite weight", "state"])
def test_what_is_not_finite_is_not_saved(model: Path, tmp_path: Path, what: str) -> None:
    flags = ["--use-distributed-optimizer", "--bf16"] if what == "state" else []
    done = meddle(model, tmp_path / "run", what, *flags).wait(expect=2)
    line = error_of(done.stderr)
    assert line.startswith("error: step 2: ") and "is not finite after it (samples [" in line, line
    assert "embedding.word_embeddings.weight" in line or "(exp_avg_sq of the optimizer)" in line
    assert f"{folder_of(tmp_path / 'run', 1)} are finite" in line and latest_step(tmp_path / "run") == 1


@pytest.mark.parametrize("what", ["saved nan weight", "saved state"])
def test_a_checkpoint_that_is_not_finite_is_refused_and_an_older_one_used(
    model: Path, tmp_path: Path, what: str
) -> None:
    output = tmp_path / "run"
    meddle(model, output, what, "--exit-interval", "2").wait()
    assert latest_step(output) == 2
    done = run([PYTHON, *train(model, output, "--exit-interval", "3")])
    assert "holds values that are not finite" in done.stdout and "resumes from step 1" in done.stdout
    if what == "saved nan weight":
        bad = output / "damaged_iter_0000002"
        done = run([PYTHON, *train(model, tmp_path / "other", "--load", str(bad))], expect=2)
        line = error_of(done.stderr)
        assert f"{bad}: embedding.word_embeddings.weight holds values that are not finite" in line


@pytest.mark.parametrize("lr", ["1e3", "1e20"])
def test_a_learning_rate_that_destroys_the_weights_is_stopped(model: Path, tmp_path: Path, lr: str) -> None:
    output = tmp_path / "run"
    flags = ["--lr", lr, "--adam-eps", "1e-8", "--clip-grad", "0", "--keep-last", "1", "--lr-decay-style", "constant"]
    done = run([PYTHON, *train(model, output, *flags)], expect=None)
    if done.returncode:
        line = error_of(done.stderr)
        assert done.returncode == 2 and "lower lr" in line and "is good" not in line
        assert "may fail again" in line and "use another --save" in line


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--lr", "1e38"), ("--lr", "nan"), ("--lr", "inf"), ("--weight-decay", "1e300"), ("--adam-beta2", "1")],
)
def test_values_beyond_the_range_are_refused_in_the_configuration(flag: str, value: str) -> None:
    from megatron_longpo.command_line import ConfigOptions, parse_with_config
    from megatron_longpo.config import Config, check
    from megatron_longpo.errors import ConfigError

    _, config = parse_with_config(Config, [flag, value], prog="p", description="", options=ConfigOptions, quiet=True)
    with pytest.raises(ConfigError, match=flag[2:].replace("-", "_")):
        check(config)


# --------------------------------------------------------------------------------------------------
# Disks and folders
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("processes", "rank"), [(1, 0), (2, 1)])
def test_a_disk_that_takes_no_more_is_named(model: Path, tmp_path: Path, processes: int, rank: int) -> None:
    """Here a limit on the size of files, of one rank only."""
    output = tmp_path / "run"
    flags = ["--tensor-model-parallel-size", str(processes)]
    done = meddle(model, output, "limit", *flags, rank=rank, processes=processes).wait(expect=None, timeout=90)
    assert done.returncode == (2 if processes == 1 else 1)
    line = error_of(done.stderr)
    # The system's own error on the rank that has it; its peers know only what torch's writer says.
    assert f"{output}: {'file too large' if processes == 1 else 'a write failed'}" in line and "ulimit -f" in line, line
    assert latest_step(output) == 1


def test_a_run_may_go_on_while_the_disk_takes_nothing(model: Path, tmp_path: Path) -> None:
    """After step 2 and until step 4 is done: the checkpoints of these steps cannot be written, and nothing else is lost."""
    output = tmp_path / "run"
    flags = ["--on-save-failure", "continue", "--exit-interval", "6"]
    done = meddle(model, output, "limit for a while", *flags).wait()
    said = [step for step in range(1, 7) if f"step {step} is not saved, and training goes on" in done.stdout]
    assert said == [2, 3] and "file too large" in done.stdout
    assert whole_steps(output) == [1, 4, 5, 6]
    assert [r["step"] for r in read_metrics(output / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert not list(output.glob(".writing_*"))


def test_ranks_go_on_where_the_first_cannot_complete_a_checkpoint(model: Path, tmp_path: Path) -> None:
    """After steps 2, 3 and 4 rank 0 cannot write what it writes alone; the other rank waits for it neither there nor later."""
    output = tmp_path / "run"
    flags = ["--on-save-failure", "continue", "--exit-interval", "6", "--save-hf-interval", "4"]
    done = meddle(model, output, "complete", *flags, processes=2).wait(timeout=120)
    for step, name in ((2, "save_common"), (3, "finish"), (4, "save_config")):
        lost = "not saved, nor exported to hf_0000004" if step == 4 else "not saved"
        assert f"{name}: no space left on device; free space" in done.stdout
        assert f"step {step} is {lost}, and training goes on" in done.stdout
    assert whole_steps(output) == [1, 5, 6] and not list(output.glob(".writing_*"))
    assert [r["step"] for r in read_metrics(output / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("what", ["remove", "replace"])
def test_an_output_that_is_removed_is_named(model: Path, tmp_path: Path, what: str) -> None:
    output = tmp_path / "run"
    done = meddle(model, output, what).wait(expect=2)
    assert f"{output}: the folder was removed or replaced while the run was writing to it" in error_of(done.stderr)


@pytest.mark.parametrize("name", ["metrics.jsonl", "validation.jsonl"])
def test_a_folder_in_the_place_of_a_file_is_named(model: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "run" / name).mkdir(parents=True)
    done = run([PYTHON, *train(model, tmp_path / "run")], expect=2)
    assert f"{tmp_path / 'run' / name}: is not a file; move it away" in error_of(done.stderr)


def test_curves_do_not_fail_a_run(model: Path, tmp_path: Path) -> None:
    done = meddle(model, tmp_path / "run", "curves", "--exit-interval", "3").wait()
    assert "curves.png: cannot be drawn (TypeError: unsupported operand); training continues" in done.stdout


@pytest.mark.parametrize(
    ("what", "status", "words"), [("memory", 2, "out of memory"), ("recursion", 1, "nested too deeply")]
)
def test_other_errors_are_one_line_with_a_traceback_in_a_file(
    model: Path, tmp_path: Path, what: str, status: int, words: str
) -> None:
    done = meddle(model, tmp_path / "run", what).wait(expect=status)
    line = error_of(done.stderr)
    traceback = tmp_path / "run" / "traceback_rank_0.txt"
    assert words in line and line.endswith(f"(traceback: {traceback})") and "in _step" in traceback.read_text()


# --------------------------------------------------------------------------------------------------
# Several processes
# --------------------------------------------------------------------------------------------------


def test_a_second_run_into_the_same_folder_is_refused(model: Path, tmp_path: Path) -> None:
    """And the first is not disturbed; killed, it leaves the folder free."""
    output = tmp_path / "run"
    first = Running([PYTHON, *train(model, output, "--train-iters", "100000")])
    wait_for_steps(first, output, 2)
    second = run([PYTHON, *train(model, output, "--train-iters", "100000")], expect=2)
    line = error_of(second.stderr)
    assert f"{output}: process {first.pid} on host " in line and "works on it" in line
    steps = len(read_metrics(output / "metrics.jsonl"))
    wait_for_steps(first, output, steps + 1)
    first.kill()
    steps = [r["step"] for r in read_metrics(output / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
    third = run([PYTHON, *train(model, output, "--train-iters", "100000", "--exit-interval", "1")])
    assert "resumed from" in third.stdout and not (output / ".holder.json").exists()


def test_two_runs_on_one_data_score_the_reference_once(model: Path, tmp_path: Path) -> None:
    flags = ["--objective", "longpo", "--reference-cache", str(tmp_path / "cache"), "--exit-interval", "1"]
    both = [Running([PYTHON, *train(model, tmp_path / name, *flags)]) for name in "ab"]
    outputs = [process.wait().stdout for process in both]
    assert sorted("scoring 6 samples once" in out for out in outputs) == [False, True]
    assert sorted("found in" in out for out in outputs) == [False, True]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGKILL], ids=["SIGUSR1", "SIGKILL"])
def test_ranks_end_with_their_launcher(model: Path, tmp_path: Path, number: int) -> None:
    process = Running(torchrun(2, *train(model, tmp_path / "run", "--train-iters", "100000")))
    wait_for_steps(process, tmp_path / "run", 1)
    ranks = psutil.Process(process.pid).children()
    assert len(ranks) >= 2
    os.kill(process.pid, number)
    _, alive = psutil.wait_procs(ranks, timeout=15)
    alive = [rank for rank in alive if rank.status() != psutil.STATUS_ZOMBIE]
    try:
        assert not alive
    finally:
        process.kill()


def test_a_rank_that_hangs_is_named() -> None:
    """The first of two or the second; at once, since the launches only wait."""
    launches = [Running(torchrun(2, "-m", "tests.support.stopping_rank", str(rank))) for rank in (0, 1)]
    deadline = time.monotonic() + 60
    for rank, process in enumerate(launches):
        while "error:" not in (text := process.output()[1]) and time.monotonic() < deadline:
            time.sleep(0.2)
        process.kill()
        assert f"error: rank {rank} hangs: rank {1 - rank} waited for longer than" in error_of(text)


@pytest.mark.parametrize("what", ["stop", "kill"])
def test_a_rank_that_stops_or_dies_is_named_and_the_run_restarted(model: Path, tmp_path: Path, what: str) -> None:
    """By torchrun, which starts both ranks again: no step twice, none left out, the undisturbed run's weights."""
    output = tmp_path / "run"
    process = meddle(
        model,
        output,
        what,
        # Long enough for a machine that does much else.
        *("--heartbeat-timeout-seconds", "15" if what == "stop" else "60", "--save-interval", "3"),
        rank=1,
        processes=2,
        launcher=["--max-restarts=1"],
        MEDDLE_STEP="5",
        MEDDLE_ONCE=str(tmp_path / "once"),
    )
    done = process.wait(timeout=240)
    line = error_of(done.stderr)
    place = f"(host {socket.gethostname()}, process "
    if what == "stop":
        assert f"error: rank 1 {place}" in line and "has given no sign of life for 15 s" in line
    else:
        assert f"rank 1 died {place}" in line and "rank 0 lost its connection" in line
    assert ", last heard of in " in line
    assert f"resumed from {folder_of(output, 3)} after step 3" in done.stdout
    assert [r["step"] for r in read_metrics(output / "metrics.jsonl")] == list(range(1, 11))
    whole = tmp_path / "whole"
    run(torchrun(2, *train(model, whole, "--save-interval", "3")))
    assert metrics_of(output) == metrics_of(whole)
    assert_same_tensors(folder_of(output, 10), folder_of(whole, 10))


def test_data_that_were_replaced_between_launches_are_refused(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model / "run", tmp_path / "run")
    make_data(tmp_path / "data", 6, seed=1, longest=60)
    flags: list[Any] = ["--data-path", str(tmp_path / "data")]
    done = run([PYTHON, *train(model, tmp_path / "run", *flags)], expect=2)
    assert "data_sha256=" in error_of(done.stderr)


# --------------------------------------------------------------------------------------------------
# Skipped steps
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["nan loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_on_all_ranks(model: Path, tmp_path: Path, what: str) -> None:
    """Step 3 of two ranks, one of which has the fault."""
    output = tmp_path / "run"
    flags = ["--exit-interval", "5"]
    flags += ["--use-distributed-optimizer"] if what == "gradient" else []
    done = meddle(model, output, what, *flags, rank=1, processes=2).wait()
    fault = "the loss is nan" if what == "nan loss" else "the gradient norm is inf"
    path = output / "skipped" / "step_0000003.json"
    assert f"step 3 is skipped (1 of at most 10): {fault}; {path} has the samples" in done.stdout
    records = read_metrics(output / "metrics.jsonl")
    assert [(r["step"], r.get("skipped")) for r in records] == [(1, None), (2, None), (3, 1), (4, None), (5, None)]
    assert ("loss" in records[2]) == (what == "gradient") and "grad_norm" not in records[2]
    skipped = json.loads(path.read_text())
    assert skipped["reason"] == fault and {s["data"] for s in skipped["samples"]} == {str(model / "data")}
    assert len({s["sample"] for s in skipped["samples"]}) == 2
    # The weights after it are those before it, which are saved already.
    assert not folder_of(output, 3).exists() and latest_step(output) == 5
    if what == "gradient":
        return
    line = torchrun(2, "-m", "megatron_longpo.cli", "replay", str(output), "3")
    again = run(line).stdout.splitlines()
    assert "step 3, from the checkpoint after step 2" in again and again[-1] == "all values are finite"
    assert [line.split(":")[0] for line in again if line.startswith(str(model / "data"))] == [
        f"{s['data']} sample {s['sample']}" for s in skipped["samples"]
    ]


def test_a_spike_is_skipped_and_one_too_many_ends_the_run(model: Path, tmp_path: Path) -> None:
    """A run with spikes at steps 23 and 24 of 30 that resumes in between, and may skip only one."""
    output = tmp_path / "run"
    flags = ["--train-iters", "30", "--save-interval", "20", "--check-for-spiky-loss", "--max-skipped-steps", "1"]
    done = meddle(model, output, "high loss", *flags, "--exit-interval", "23", MEDDLE_STEP="22").wait()
    assert "step 23 is skipped (1 of at most 1): the loss of " in done.stdout and " is a spike (above " in done.stdout
    done = meddle(model, output, "high loss", *flags, MEDDLE_STEP="24").wait(expect=2)
    line = error_of(done.stderr)
    assert line.startswith("error: step 25: the loss of ") and "max_skipped_steps=1 steps were skipped before" in line
    assert read_status(output).state == "failed"


def test_weights_that_were_destroyed_are_not_trained_on_and_replay_says_where(model: Path, tmp_path: Path) -> None:
    """Every step after the first is skipped. The newest checkpoint but one is not given up for the same weights again."""
    output = tmp_path / "run"
    flags = ["--lr", "1e30", "--lr-decay-style", "constant", "--clip-grad", "0", "--adam-eps", "1e-8"]
    done = run([PYTHON, *train(model, output, *flags, "--keep-last", "2")], expect=2)
    line = error_of(done.stderr)
    assert line.startswith("error: step 10: the run ends with 9 skipped steps") and "may fail again" in line
    assert whole_steps(output) == [1]
    again = run([PYTHON, "-m", "megatron_longpo.cli", "replay", str(output), "3"]).stdout
    assert "the first value that is not finite is in the gradient of the output of decoder.layers.1 on rank 0" in again
    assert "step 2 is trained again" not in again


# --------------------------------------------------------------------------------------------------
# Signals
# --------------------------------------------------------------------------------------------------


def test_a_signal_stops_a_run_which_then_goes_on(model: Path, tmp_path: Path) -> None:
    """First one that only rank 1 gets, then one that torchrun passes on: the undisturbed run's numbers and weights.

    Ranks that are compared and micro batches that are computed twice change none of them.
    """
    whole, output = tmp_path / "whole", tmp_path / "run"
    flags = ["--save-interval", "100"]
    run(torchrun(2, *train(model, whole, *flags)))
    flags += ["--log-straggler", "--check-rerun-interval", "2"]
    for step, what in ((2, "SIGUSR1"), (5, "SIGTERM to the launcher")):
        # torchrun knows only success and failure.
        done = meddle(model, output, what, *flags, rank=1, processes=2, MEDDLE_STEP=str(step)).wait(expect=1)
        name = what.split()[0]
        assert f"stopped after step {step} on {name}; rerun the same command to continue" in done.stdout
        assert latest_step(output) == step and "error:" not in done.stderr
        found = read_status(output)
        assert (found.state, found.step, found.message) == ("stopped", step, f"on {name}")
    run(torchrun(2, *train(model, output, *flags)))
    assert read_status(output).state == "finished"
    last = read_metrics(output / "metrics.jsonl")[-1]
    assert last["seconds/rerun"] > 0 and last["straggler/data_rank"] in (0, 1)
    assert metrics_of(output) == metrics_of(whole) and len(metrics_of(output)) == 10
    assert_same_tensors(folder_of(output, 10), folder_of(whole, 10))


def test_a_single_process_says_by_its_status_that_it_goes_on(model: Path, tmp_path: Path) -> None:
    """The evaluation after the step waits for the next launch."""
    output = tmp_path / "run"
    held_out = ["--valid-data-path", str(model / "data"), "--eval-interval", "2", "--save-best", "loss"]
    meddle(model, output, "SIGTERM", *held_out).wait(expect=75)
    path = output / "validation.jsonl"
    assert [r["step"] for r in read_metrics(path)] == [0] and not (output / "best.json").exists()
    done = run([PYTHON, *train(model, output, *held_out, "--exit-interval", "3")])
    assert [r["step"] for r in read_metrics(path)] == [0, 2]
    assert "step 2 has the best held-out loss so far" in done.stdout
    assert json.loads((output / "best.json").read_text())["step"] == 2


# --------------------------------------------------------------------------------------------------
# Faults at random
# --------------------------------------------------------------------------------------------------


def test_random_faults_lose_and_double_no_sample_and_change_no_weight(model: Path, tmp_path: Path) -> None:
    """Five faults over sixty steps: killed, asked to stop, out of disk, and the newest checkpoint damaged meanwhile. Two steps of
    both runs are skipped."""
    seed = int(time.time())
    rng = random.Random(seed)
    flags = ["--train-iters", "60", "--save-interval", "6", "--keep-last", "3"]
    bad = json.dumps({"8": "nan loss", "33": "gradient"})
    whole, output = tmp_path / "whole", tmp_path / "run"
    meddle(model, whole, "nothing", *flags, MEDDLE_LEDGER=str(tmp_path / "whole.jsonl"), MEDDLE_DATA=bad).wait()
    ledger, done, story = tmp_path / "run.jsonl", 0, []
    for fault in rng.sample(["kill", "SIGTERM", "SIGUSR1", "limit", "kill"], 5):
        step = done + rng.randint(3, 11)
        env = {"MEDDLE_STEP": str(step), "MEDDLE_LEDGER": str(ledger), "MEDDLE_DATA": bad}
        ended = meddle(model, output, fault, *flags, **env).wait(expect=None)
        steps = whole_steps(output)
        story.append((fault, step, ended.returncode, steps))
        assert ended.returncode == {"kill": -9, "limit": 2}.get(fault, 75), (seed, story)
        if len(steps) > 1 and rng.random() < 0.5:
            # Anywhere in a file that the run needs.
            path = rng.choice(sorted(folder_of(output, steps[-1]).glob("*.distcp")))
            steps, story = steps[:-1], [*story, (flip_bit_of(path, rng), path.name)]
        done = steps[-1] if steps else 0
    meddle(model, output, "nothing", *flags, MEDDLE_LEDGER=str(ledger), MEDDLE_DATA=bad).wait()
    print(seed, story)
    assert_same_samples(ledger, tmp_path / "whole.jsonl", steps=60)
    assert metrics_of(output) == metrics_of(whole)
    assert_same_tensors(folder_of(output, 60), folder_of(whole, 60))
