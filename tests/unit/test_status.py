"""The file that says where a run is, and the command that reads it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from megatron_longpo import cli
from megatron_longpo.errors import DataError
from megatron_longpo.runtime import status as status_module
from megatron_longpo.runtime.checked_json import read_checked, write_checked
from megatron_longpo.runtime.status import HEARTBEAT_FILE, StatusFile, read_status


def status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ending:
        cli.function_of("status")(list(arguments), prog="status")
    return int(str(ending.value.code))


def test_the_exit_status_says_whether_to_run_it_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = StatusFile(tmp_path, train_iters=10)
    codes = []
    for state in ("starting", "running", "stopped", "failed", "finished"):
        file.write(state, step=4, message="on SIGUSR1" if state == "stopped" else "")
        codes.append(status(str(tmp_path)))
    assert codes == [75, 75, 75, 2, 0]
    line = capsys.readouterr().out.splitlines()[2]
    assert line.startswith(f"{tmp_path}: stopped, step 4 of 10, 0 s ago on ") and line.endswith(" (on SIGUSR1)")


def test_the_failure_of_one_rank_stays(tmp_path: Path) -> None:
    """Another rank's sign of life comes after it: it is ended only then."""
    first, other = StatusFile(tmp_path, train_iters=10), StatusFile(tmp_path, train_iters=10)
    first.write("running", step=4)
    other.write("failed", message="out of memory on rank 1")
    first.write("running", step=5)
    assert read_checked(tmp_path / HEARTBEAT_FILE)["message"] == "out of memory on rank 1"
    # The next start of the run is one that goes on.
    again = StatusFile(tmp_path, train_iters=10)
    again.write("starting")
    again.write("running", step=4)
    assert read_checked(tmp_path / HEARTBEAT_FILE)["state"] == "running"


def test_signs_of_life(tmp_path: Path) -> None:
    StatusFile(tmp_path, train_iters=10).write("running", step=4)
    assert status(str(tmp_path), "--alive", "60") == 0
    path = tmp_path / HEARTBEAT_FILE
    _let_pass(path, 61)
    assert status(str(tmp_path), "--alive", "60") == 1
    StatusFile(tmp_path, train_iters=10).write("finished", step=10)
    _let_pass(path, 61)
    assert status(str(tmp_path), "--alive", "60") == 0


def _let_pass(path: Path, seconds: float) -> None:
    """As if a file had been written so long ago."""
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


@pytest.mark.parametrize("hours", [-24, 24])
def test_clocks_that_differ_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours: int) -> None:
    """Of the run's machine, of the one that asks, or of both from the file server's."""
    StatusFile(tmp_path, train_iters=10).write("running", step=4)
    path = tmp_path / HEARTBEAT_FILE
    write_checked(
        path, {**read_checked(path), "time": "2020-01-02T03:04:05+00:00" if hours < 0 else "2040-01-02T03:04:05+00:00"}
    )
    now = time.time()
    monkeypatch.setattr(status_module.time, "time", lambda: now + 3600 * hours)
    assert status(str(tmp_path), "--alive", "60") == 0 and status_module.silent_seconds(tmp_path) < 60
    _let_pass(path, 61)
    assert status(str(tmp_path), "--alive", "60") == 1
    assert [p.name for p in tmp_path.iterdir()] == [HEARTBEAT_FILE]


def test_in_a_folder_that_is_read_only_the_own_clock_has_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    StatusFile(tmp_path, train_iters=10).write("running", step=4)

    def refuse(**_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(status_module.tempfile, "TemporaryFile", refuse)
    assert status(str(tmp_path), "--alive", "60") == 0
    _let_pass(tmp_path / HEARTBEAT_FILE, 61)
    assert status(str(tmp_path), "--alive", "60") == 1


def test_slow_ranks_are_said_while_it_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = StatusFile(tmp_path, train_iters=10)
    file.slow = "slow in reading its samples: rank 3 (node1)"
    file.write("running", step=4)
    assert status(str(tmp_path)) == 75
    assert capsys.readouterr().out.splitlines()[1] == f"{tmp_path}: slow in reading its samples: rank 3 (node1)"
    file.write("finished", step=10)
    assert status(str(tmp_path)) == 0 and len(capsys.readouterr().out.splitlines()) == 1


def test_steps_are_written_now_and_then_and_changes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(status_module.time, "monotonic", lambda: now)
    file = StatusFile(tmp_path, train_iters=10)
    # It may be a second run on another's folder, which has not said anything yet.
    file.fail("another run works on it")
    assert not (tmp_path / HEARTBEAT_FILE).exists()
    file.beat(1)
    now = 104.0
    file.beat(2)
    assert read_status(tmp_path).step == 1
    now = 105.0
    file.beat(3)
    assert read_status(tmp_path).step == 3
    file.beat(4)
    file.fail("the loss is nan")
    found = read_status(tmp_path)
    assert (found.state, found.step, found.message) == ("failed", 4, "the loss is nan")


def test_other_ranks_than_the_first_say_only_why_they_failed(tmp_path: Path) -> None:
    StatusFile(tmp_path, train_iters=10).write("running", step=3)
    other = StatusFile(tmp_path, train_iters=10, only_failures=True)
    other.fail("another run works on it")
    other.write("starting")
    other.beat(3)
    assert read_status(tmp_path).state == "running"
    other.fail("its disk is full")
    found = read_status(tmp_path)
    assert (found.state, found.step, found.message) == ("failed", 3, "its disk is full")


def test_where_it_cannot_be_written_the_run_goes_on(tmp_path: Path) -> None:
    StatusFile(tmp_path / "missing", train_iters=10).beat(1)
    StatusFile(None, train_iters=10).beat(1)


def test_what_is_no_status_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file; name the output folder of a run"):
        read_status(tmp_path)
    for content in ("", "[]", "{}", '{"state": "done"}', '{"stat": 1}'):
        (tmp_path / HEARTBEAT_FILE).write_text(content)
        with pytest.raises(DataError, match=HEARTBEAT_FILE):
            read_status(tmp_path)
