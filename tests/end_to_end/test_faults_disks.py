"""Disks that are really full or really read-only, and ranks that are really killed: one line each, and the run resumes."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_longpo.checkpoint.folders import latest_step
from megatron_longpo.training.metrics import read_metrics
from tests.end_to_end.test_faults_training import error_of, meddle, model, train, wait_for_steps  # noqa: F401 - a fixture
from tests.fuzz.readers import wait_until
from tests.support.launch import PYTHON, Running, run, torchrun


def _mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mount {' '.join(arguments)} is not permitted here ({done.stderr.strip()})")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB: room for one or two checkpoints of the tiny model."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        _mount("-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder))
    except FileNotFoundError:
        pytest.skip("there is no mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_named_and_the_run_resumes_with_room(model: Path, disk: Path) -> None:  # noqa: F811
    output = disk / "run"
    done = run([PYTHON, *train(model, output)], expect=2)
    line = error_of(done.stderr)
    assert "no space left on device; free space" in line or f"{output}: a write failed" in line, line
    saved = latest_step(output)
    _mount("-o", "remount,size=64m", str(disk))
    steps = (saved or 0) + 2
    done = run([PYTHON, *train(model, output, "--exit-interval", str(steps))])
    assert latest_step(output) == steps and [r["step"] for r in read_metrics(output / "metrics.jsonl")][-1] == steps
    assert (f"resumed from {output}" in done.stdout) == (saved is not None)


def test_a_read_only_disk_is_named(model: Path, disk: Path) -> None:  # noqa: F811
    (disk / "run").mkdir()
    _mount("-o", "remount,ro", str(disk))
    for output in (disk / "run", disk / "new" / "run"):
        line = error_of(run([PYTHON, *train(model, output)], expect=2).stderr)
        assert str(output) in line and ("ead-only file system" in line or "cannot be written to" in line), line


@pytest.mark.parametrize("who", ["launcher SIGTERM", "rank 1 SIGKILL", "rank 0 SIGUSR1"])
def test_a_launch_that_is_killed_ends_and_resumes(model: Path, tmp_path: Path, who: str) -> None:  # noqa: F811
    output = tmp_path / "run"
    process = Running(torchrun(2, *train(model, output, "--train-iters", "100000")))
    wait_for_steps(process, output, 2)
    # The heartbeats' helpers and the like end with their ranks.
    ranks = psutil.Process(process.pid).children(recursive=True)
    workers = [p for p in ranks if p.ppid() == process.pid]
    name, number = who.rsplit(" ", 1)
    victim = process.pid if name == "launcher" else sorted(p.pid for p in workers)[int(name[-1])]
    os.kill(victim, getattr(signal, number))
    done = process.wait(timeout=60, expect=None)
    assert done.returncode != 0
    _, alive = psutil.wait_procs(ranks, timeout=15)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    saved = latest_step(output)
    assert saved is not None
    done = run([PYTHON, *train(model, output, "--train-iters", "100000", "--exit-interval", "1")])
    assert f"after step {saved}" in done.stdout and latest_step(output) == saved + 1
    assert [r["step"] for r in read_metrics(output / "metrics.jsonl")] == list(range(1, saved + 2))


def test_a_rank_that_hangs_in_training_is_named(model: Path, tmp_path: Path) -> None:  # noqa: F811
    """Stopped as by SIGSTOP or a machine that swaps; its peer waits in a collective of the next step."""
    output = tmp_path / "run"
    process = meddle(model, output, "stop", rank=1, processes=2, MEDDLE_SECONDS="8")
    wait_until(lambda: "error:" in process.output()[1], 60)
    text = process.output()[1]
    process.kill()
    assert "error: rank 1 hangs: rank 0 waited for longer than distributed_timeout_minutes" in error_of(text)
    assert latest_step(output) is not None
