"""Files that appear whole, and locks on folders."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_longpo.errors import CheckpointError, DataError
from megatron_longpo.runtime import files
from megatron_longpo.runtime.files import HOLDER_FILE, FolderLock, write_atomically
from tests.support.launch import environment

HOLDER = """
import sys
from pathlib import Path
from megatron_longpo.runtime.files import FolderLock
lock = FolderLock(Path(sys.argv[1]), record=len(sys.argv) > 2)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_held_folder_is_refused_and_its_holder_named(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(DataError, match=rf"{tmp_path}: (process {other.pid} \(.+\)|another process) works on it"):
            FolderLock(tmp_path)
        with pytest.raises(CheckpointError, match=r"^out: .* works on it; wait for it"):
            FolderLock(tmp_path, name=Path("out"), error=CheckpointError)
        # The death of its process releases a lock.
        other.kill()
        other.wait()
        with FolderLock(tmp_path) as lock:
            assert list(tmp_path.iterdir()) == [], "no lock file is left behind"
            lock.release()
            FolderLock(tmp_path, wait=True).release()


NO_FOLDER_LOCKS = """
import os, stat
from megatron_longpo.runtime import files
real = files._flock
files._flock = lambda d, wait: not stat.S_ISDIR(os.fstat(d).st_mode) and real(d, wait=wait)
"""


def _holder(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLDER, *map(str, arguments)]
    held = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment())
    assert held.stdout is not None and held.stdout.readline() == "held\n"
    return held


@pytest.mark.parametrize("directories", [True, False], ids=["local", "network"])
def test_a_record_tells_who_holds_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], directories: bool
) -> None:
    """Also where only files can be locked; and a killed holder's record is taken over."""
    if not directories:
        real = files._flock

        def only_files(descriptor: int, *, wait: bool) -> bool:
            return not stat.S_ISDIR(os.fstat(descriptor).st_mode) and real(descriptor, wait=wait)

        monkeypatch.setattr(files, "_flock", only_files)
        holder = HOLDER.replace("\nlock =", f"\n{NO_FOLDER_LOCKS}\nlock =")
        monkeypatch.setattr(sys.modules[__name__], "HOLDER", holder)
    with _holder(tmp_path, "record") as other:
        with pytest.raises(DataError, match=rf"process {other.pid} on host \S+, at work since \d{{4}}-.* works on it"):
            FolderLock(tmp_path, record=True)
        other.kill()
        other.wait()
        assert [p.name for p in tmp_path.iterdir()] == [HOLDER_FILE]
        with FolderLock(tmp_path, record=True) as lock:
            assert str(os.getpid()) in (tmp_path / HOLDER_FILE).read_text() and lock.is_in_place
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def test_a_record_of_another_host_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / HOLDER_FILE).write_text('{"host": "far", "process": 7, "started": "then", "command": "train"}')
    FolderLock(tmp_path, record=True).release()
    assert "process 7 on host far, at work since then (train) did not release it" in capsys.readouterr().out
    for junk in ("[" * 100000, "[]", "{", "\0"):
        (tmp_path / HOLDER_FILE).write_text(junk)
        FolderLock(tmp_path, record=True).release()


def test_a_file_system_without_locks_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(files, "_flock", lambda *_, **__: False)
    FolderLock(tmp_path, record=True).release()
    assert "its file system has no locks" in capsys.readouterr().out


def test_a_forked_child_does_not_keep_a_lock(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.write(write, b"forked")
        time.sleep(30)
        os._exit(0)
    try:
        assert os.read(read, 6) == b"forked"
        lock.release()
        FolderLock(tmp_path).release()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_removed_folder_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with FolderLock(folder, record=True) as lock:
        shutil.rmtree(folder)
        assert not lock.is_in_place
        folder.mkdir()
        assert not lock.is_in_place


def test_a_locked_folder_can_be_emptied_and_renamed(tmp_path: Path) -> None:
    folder = tmp_path / "writing"
    folder.mkdir()
    with FolderLock(folder):
        os.replace(folder, tmp_path / "done")
        with pytest.raises(DataError):
            FolderLock(tmp_path / "done")
    FolderLock(tmp_path / "done").release()


def test_a_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "file", b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
