"""Checksums of a checkpoint: every kind of damage is found, by the quick look, in the threads, and in the file itself."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from megatron_longpo.checkpoint import checksums
from megatron_longpo.checkpoint.checksums import (
    CHECKSUMS,
    find_damage,
    hash_own_files,
    quick_damage,
    read_checksums,
    verified,
    write_checksums,
)
from megatron_longpo.errors import DamagedError


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Files named as in a checkpoint of two ranks, with random content."""
    folder, rng = tmp_path / "iter_0000001", random.Random(0)
    (folder / "hf").mkdir(parents=True)
    for name, size in {"__0_0.distcp": 9000, "__0_1.distcp": 0, "__1_0.distcp": 7000, ".metadata": 500}.items():
        (folder / name).write_bytes(rng.randbytes(size))
    for name in ("common.pt", "metadata.json", "model.json", "hf/config.json"):
        (folder / name).write_bytes(rng.randbytes(300))
    for writer in (0, 1):
        hash_own_files(folder, writer)
    write_checksums(folder)
    return folder


@pytest.fixture
def in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """All files count as large."""
    monkeypatch.setattr(checksums, "_SMALL_BYTES", -1)


def test_all_files_are_listed_and_nothing_else_is_left(checkpoint: Path) -> None:
    written = {p.relative_to(checkpoint).as_posix() for p in checkpoint.rglob("*") if p.is_file()}
    assert set(read_checksums(checkpoint)) == written - {CHECKSUMS} and not any("rank" in name for name in written)
    assert find_damage(checkpoint) is None
    with verified(checkpoint):
        pass


def test_what_a_rank_has_hashed_is_not_read_again(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a background save, whose process hashes what it wrote."""
    for writer in (0, 1):
        hash_own_files(checkpoint, writer)
    hashed: list[str] = []
    own = checksums.sha256_of
    monkeypatch.setattr(checksums, "sha256_of", lambda path: hashed.append(path.name) or own(path))
    write_checksums(checkpoint)
    assert len(hashed) == 5 and not any(name.endswith(".distcp") for name in hashed)


@pytest.mark.parametrize("name", ["__1_0.distcp", "__0_1.distcp", ".metadata", "common.pt", "hf/config.json"])
@pytest.mark.parametrize("what", ["missing", "cut", "longer", "a folder", "a symbolic link to nothing"])
def test_missing_and_cut_files_are_named(checkpoint: Path, name: str, what: str) -> None:
    path = checkpoint / name
    content = path.read_bytes()
    path.unlink()
    if what == "cut" and content:
        path.write_bytes(content[:-1])
    elif what == "longer":
        path.write_bytes(content + b"\0")
    elif what == "a folder":
        path.mkdir()
    elif what != "missing":
        path.symlink_to("nothing")
    with (
        pytest.raises(DamagedError, match=f"{name}: .*, so the checkpoint is damaged; restore the file"),
        verified(checkpoint),
    ):
        raise AssertionError("the body must not run")


def test_a_changed_large_file_is_found_when_the_body_ends(checkpoint: Path, in_threads: None) -> None:
    path = checkpoint / "__1_0.distcp"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert quick_damage(checkpoint) is None
    body: list[int] = []
    with pytest.raises(DamagedError, match=r"__1_0\.distcp: its content differs"), verified(checkpoint):
        body.append(1)
    assert body == [1]


def test_damage_is_named_instead_of_what_a_library_says_of_it(checkpoint: Path, in_threads: None) -> None:
    path = checkpoint / ".metadata"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(DamagedError, match=r"\.metadata: its content differs"), verified(checkpoint):
        raise ValueError("invalid load key")


def test_errors_of_the_body_stay_where_nothing_is_damaged(checkpoint: Path, in_threads: None) -> None:
    with pytest.raises(ValueError, match="another"), verified(checkpoint):
        raise ValueError("another reason")


def test_a_folder_is_read_once_unless_it_changes(
    checkpoint: Path, in_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    own = checksums.sha256_of
    monkeypatch.setattr(checksums, "sha256_of", lambda path: hashed.append(path.name) or own(path))
    for _ in range(2):
        with verified(checkpoint):
            pass
    assert len(hashed) == len(set(hashed)) == 8
    path = checkpoint / "__0_0.distcp"
    path.write_bytes(bytes(9000))
    with pytest.raises(DamagedError, match="__0_0"), verified(checkpoint):
        pass


def test_a_run_resumes_without_the_files_that_only_export_reads(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / "model.json").unlink()
    with verified(checkpoint, state_only=True):
        pass
    assert "model.json: is missing; the run can resume without it" in capsys.readouterr().out
    with pytest.raises(DamagedError, match=r"model\.json"), verified(checkpoint):
        pass


def test_a_checkpoint_without_checksums_is_read_with_one_line(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / CHECKSUMS).unlink()
    for _ in range(3):
        with verified(checkpoint):
            pass
    (line,) = capsys.readouterr().out.splitlines()
    assert f"{checkpoint}: has no checksums.json" in line and "not verified" in line


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"[" * 300000,
        b'{"schema_version": 2, "files": {}}',
        b'{"schema_version": 1, "files": []}',
        b'{"schema_version": 1, "files": {"a": 1}}',
        b'{"schema_version": 1, "files": {"a": {"bytes": 1, "sha256": "x"}}}',
        b'{"schema_version": 1, "files": {"a": {"bytes": 1, "sha256": 1}}}',
        json.dumps({"schema_version": 1, "files": {"../a": {"bytes": 1, "sha256": "0" * 64}}}).encode(),
        json.dumps({"schema_version": 1, "files": {"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}}}).encode(),
    ],
)
def test_a_damaged_checksum_file_is_refused_by_name(checkpoint: Path, content: bytes) -> None:
    (checkpoint / CHECKSUMS).write_bytes(content)
    with pytest.raises(DamagedError, match=r"checksums\.json: cannot be read \("), verified(checkpoint):
        pass


def test_a_bit_flipped_anywhere_is_found(checkpoint: Path) -> None:
    """Also in the file of checksums: a flipped bit leaves neither its names, sizes and hashes nor its white space valid."""
    rng = random.Random(1)
    files = [p for p in sorted(checkpoint.rglob("*")) if p.is_file() and p.stat().st_size]
    for _ in range(200):
        path = rng.choice(files)
        content = path.read_bytes()
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        assert find_damage(checkpoint) is not None, path
        path.write_bytes(content)
    assert find_damage(checkpoint) is None
