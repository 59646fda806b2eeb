"""Who names the cause when a process of several fails before they have made a group."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
import torch.distributed as dist

from megatron_longpo.errors import DataError
from megatron_longpo.runtime import failure


class _Ended(BaseException):
    pass


def _end(code: int) -> NoReturn:
    raise _Ended(code)


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Lets a rank fail, and gives the last line that it says."""
    monkeypatch.setattr(failure.os, "_exit", _end)
    monkeypatch.setattr(failure.time, "sleep", lambda _: None)
    # Another test of this process may have made a group.
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)

    def failing(rank: str, error: Exception) -> str:
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)

        def action() -> None:
            raise error

        with pytest.raises(_Ended, match="2" if isinstance(error, (DataError, OSError, MemoryError)) else "1"):
            failure.run_or_fail(action)
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) <= 1, "one line"
        return (lines or [""])[-1].split(" (traceback: ")[0]

    return failing


def test_where_ranks_cannot_ask_the_first_names_it(fail) -> None:  # type: ignore[no-untyped-def]
    assert fail("1", DataError("no such file")) == ""
    assert fail("0", DataError("no such file")) == "error: no such file"
    assert fail("1", RuntimeError("out of memory")) == ""


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (DataError("no such file"), "error: no such file"),
        (RuntimeError("out of memory"), "error: rank 1 failed: RuntimeError: out of memory"),
    ],
)
def test_under_torchrun_whoever_fails_first_names_it(  # type: ignore[no-untyped-def]
    fail, error: Exception, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a rank other than the first, which may fail alone; and only one."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    assert fail("1", error) == told
    assert fail("0", error) == ""


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(28, "No space left on device", "/data/run/x"), "/data/run/x: no space left on device; free space"),
        (OSError(30, "Read-only file system", "/ro"), "/ro: read-only file system; mount"),
        (PermissionError(13, "Permission denied", "/secret"), "/secret: permission denied; change"),
        (OSError(5, "Input/output error"), "input/output error; check the disk"),
        (OSError(122, "Disk quota exceeded", "/home"), "/home: disk quota exceeded; free space within the quota"),
        (OSError(24, "Too many open files", "/x"), "/x: too many open files; raise the limit"),
        (MemoryError(), "out of memory (MemoryError); use fewer"),
    ],
)
def test_what_a_user_can_fix_is_one_line_with_status_2(  # type: ignore[no-untyped-def]
    fail, error: Exception, told: str
) -> None:
    assert fail("0", error).startswith(f"error: {told}")


def test_errors_that_libraries_wrap_are_unwrapped() -> None:
    from torch.distributed.checkpoint.api import CheckpointException

    full = OSError(28, "No space left on device")
    assert "no space left" in (failure.explain(CheckpointException("write", {1: (full, [])}), Path("/run")) or "")
    quoted = RuntimeError("Worker failed with error [Errno 30] Read-only file system: '/x'")
    assert failure.explain(quoted, Path("/run")) == (
        "/run: read-only file system; mount the file system writable, or choose another folder, then run the command again"
    )
    writer = RuntimeError("Worker failure: [enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    assert "/run: a write failed" in (failure.explain(writer, Path("/run")) or "")
    assert failure.explain(RuntimeError("unknown")) is None
    assert (
        failure.describe(CheckpointException("write", {0: (ValueError("bad\nshape"), [])})) == "ValueError: bad shape"
    )
    assert "nested too deeply" in failure.describe(RecursionError("maximum recursion depth exceeded"))
    text = "value cannot be converted to type float without overflow"
    assert "out of range: check the configuration" in failure.describe(RuntimeError(text))


def test_the_traceback_goes_to_the_folder_of_the_run(  # type: ignore[no-untyped-def]
    fail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failure, "_folder", tmp_path)
    fail("0", RuntimeError("unknown"))
    text = (tmp_path / "traceback_rank_0.txt").read_text()
    assert "Traceback (most recent call last)" in text and "RuntimeError: unknown" in text


def test_a_rank_that_hangs_is_named(fail, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    timeout = RuntimeError("[..gloo/unbound_buffer.cc:92] Timed out waiting 60000ms for recv operation to complete")
    monkeypatch.setattr(failure, "silent_ranks", lambda: [3])
    assert fail("0", timeout).startswith(
        "error: rank 3 hangs: rank 0 waited for longer than distributed_timeout_minutes"
    )
    monkeypatch.setattr(failure, "silent_ranks", list)
    assert fail("0", timeout).startswith("error: a rank hangs") and "all ranks are alive" in fail("0", timeout)


def test_a_reader_that_has_gone_is_no_error() -> None:
    """``... | head``: no message, and the status that shells know of SIGPIPE."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "megatron_longpo.cli", "train", "--print-config"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
