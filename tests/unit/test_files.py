"""Files that appear whole, and locks on folders."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_longpo.errors import CheckpointError, DataError
from megatron_longpo.runtime.files import FolderLock, write_atomically
from tests.support.launch import environment

HOLDER = """
import sys
from pathlib import Path
from megatron_longpo.runtime.files import FolderLock
lock = FolderLock(Path(sys.argv[1]))
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
