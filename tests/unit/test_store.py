"""Checkpoints in an S3 store: what counts as complete, what is brought here, and what is said where that cannot be done."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import s3fs

from megatron_longpo.checkpoint import remote, store, uploading
from megatron_longpo.checkpoint.checksums import (
    CHECKSUMS,
    Checksum,
    Verification,
    hash_own_files,
    parse_checksums,
    write_checksums,
)
from megatron_longpo.checkpoint.folders import folder_of, from_newest_good, resolve
from megatron_longpo.checkpoint.remote import CACHE_VARIABLE, complete_steps, fetch
from megatron_longpo.checkpoint.retention import Retention
from megatron_longpo.checkpoint.store import Stopped, Store, StoreError
from megatron_longpo.checkpoint.uploading import Uploader
from megatron_longpo.errors import CheckpointError, ConfigError, DamagedError
from megatron_longpo.runtime.failure import explain
from megatron_longpo.training import uploads
from tests.fuzz.readers import wait_until
from tests.support.s3 import BUCKET, SECRET, S3Server

URL = f"s3://{BUCKET}/run"


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def settings(server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(store, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(uploading, "_FIRST_WAIT", 0.05)
    monkeypatch.setattr(uploading, "_POLL_SECONDS", 0.05)
    # botocore would wait for seconds between its own tries.
    monkeypatch.setitem(store._S3_CONNECTION, "retries", {"mode": "standard", "max_attempts": 1})
    server.status = ""
    for key in server.names():
        server.client.delete_object(Bucket=BUCKET, Key=key)


def write_checkpoint(output: Path, step: int, ranks: int = 2) -> Path:
    """A folder with the names of a checkpoint's files."""
    folder = folder_of(output, step)
    (folder / "hf").mkdir(parents=True)
    for name in (".metadata", "common.pt", "metadata.json", "model.json", "hf/config.json"):
        (folder / name).write_text(f"{name} of step {step}")
    for rank in range(ranks):
        (folder / f"__{rank}_0.distcp").write_bytes(bytes([rank, step]) * 1000)
        hash_own_files(folder, rank)
    write_checksums(folder)
    return folder


def content_of(folder: Path) -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith(".copying")}


def uploader(
    output: Path,
    rank: int = 0,
    *,
    ranks: int = 1,
    keep_last: int | None = None,
    patience: float = 60,
    check_owner: Callable[[], None] = lambda: None,
) -> Uploader:
    return Uploader(
        Store(URL, name="upload_to"),
        output,
        rank=rank,
        world_size=ranks,
        retention=Retention(keep_last),
        check_owner=check_owner,
        patience=patience,
    )


def upload(output: Path, *steps: int, keep_last: int | None = None, best: int | None = None) -> None:
    up = uploader(output, keep_last=keep_last)
    for step in steps:
        up.put(step, best=best)
    assert wait_until(lambda: up.is_done, 30)


def test_ranks_upload_what_they_wrote_and_the_checksums_come_last(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(tmp_path, 10)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    first, second = (uploader(tmp_path, rank, ranks=2) for rank in (0, 1))
    first.put(10)
    assert wait_until(lambda: f"run/{folder.name}/__0_0.distcp" in server.names(), 30)
    # The other rank has not sent its file, so there is no checkpoint: a kill here leaves nothing that is taken for one.
    assert complete_steps(first.store.files()) == [] and first.uploading == 10 and not first.is_done
    with pytest.raises(CheckpointError, match=r"load=s3://bucket/run: holds neither .* \(but \d other files\)"):
        fetch(URL)
    second.put(10)
    assert wait_until(lambda: first.is_done and second.is_done, 30)
    assert complete_steps(first.store.files()) == [10]
    puts = [path for method, path in server.requests if method == "PUT" and "/iter_" in path]
    assert puts[-1].endswith(CHECKSUMS)
    assert {key.removeprefix(f"run/{folder.name}/") for key in server.names("run/iter_")} == set(content_of(folder))
    assert {"run/metrics.jsonl", "run/latest_checkpointed_iteration.txt"} <= set(server.names())
    for url in (URL, f"{URL}/{folder.name}", f"{URL}/"):
        assert content_of(resolve(url)) == content_of(folder)
    # What is there is not copied again, and without the weights only the small files are.
    server.requests.clear()
    assert content_of(fetch(URL)) == content_of(folder)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "empty"))
    small = fetch(f"{URL}/{folder.name}/", weights=False)
    assert not [path for method, path in server.requests if method == "GET" and path.endswith(".distcp")]
    assert content_of(folder).keys() - content_of(small).keys() == {"__0_0.distcp", "__1_0.distcp", CHECKSUMS}


def test_processes_share_the_copying(server: S3Server, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 10, ranks=6)
    upload(tmp_path, 10)
    server.requests.clear()
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(fetch(URL))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(found) == 3 and content_of(found[0]) == content_of(folder)
    weights = [path for method, path in server.requests if method == "GET" and path.endswith(".distcp")]
    assert len(weights) == len(set(weights)) == 6


def test_a_damaged_checkpoint_is_passed_over(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write_checkpoint(tmp_path, 10)
    write_checkpoint(tmp_path, 20)
    upload(tmp_path, 10, 20)
    weights, checksums = "run/iter_0000020/__1_0.distcp", f"run/iter_0000020/{CHECKSUMS}"
    content = {key: server.read(key) for key in (weights, checksums)}
    for number, (key, changed, reason) in enumerate(
        [
            (weights, bytes([content[weights][0] ^ 1]) + content[weights][1:], "its content differs from its checksum"),
            (weights, content[weights][:-1], "has 1999 bytes instead of 2000"),
            (weights, None, "is missing"),
            (checksums, b"{}", "its schema_version is not 1"),
        ]
    ):
        monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / f"cache_{number}"))
        if changed is None:
            server.client.delete_object(Bucket=BUCKET, Key=key)
        else:
            server.write(key, changed)
        with pytest.raises(DamagedError, match=rf"s3://bucket/{key}: .*{reason}"):
            fetch(f"{URL}/iter_0000020")
        assert content_of(fetch(URL)) == content_of(before)
        server.write(key, content[key])
    server.flip_a_bit(weights)
    server.flip_a_bit("run/iter_0000010/common.pt")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "none"))
    with pytest.raises(DamagedError, match=r"iter_0000020/.*damaged; use another"):
        from_newest_good(URL, lambda folder: folder)


def test_a_full_disk_is_no_fault_of_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, 10)
    upload(tmp_path, 10)

    async def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "cache"))

    with monkeypatch.context() as patch:
        patch.setattr(s3fs.S3FileSystem, "_get_file", full)
        s3fs.S3FileSystem.clear_instance_cache()
        with pytest.raises(OSError, match="No space left on device") as caught:
            fetch(URL)
    s3fs.S3FileSystem.clear_instance_cache()
    assert explain(caught.value) == f"{tmp_path}/cache: no space left on device; free space, then run the command again"
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=100))
    with pytest.raises(CheckpointError, match=r"needs 0\.0 GB, but the disk has 0\.0 GB free; .* set MEGATRON_LONGPO"):
        fetch(URL)


def test_what_s3fs_does_not_know_is_the_stores_fault(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, 10)
    upload(tmp_path, 10)
    there = Store(URL, name="upload_to")
    monkeypatch.setattr(store, "_TRIES", 2)
    actions: list[Callable[[], object]] = [
        lambda: there.remove(["x"]),
        lambda: there.read("x", most=1),
        lambda: there.files(),
        lambda: there.download("iter_0000010/common.pt", tmp_path / "part"),
        lambda: there.upload(folder_of(tmp_path, 10) / "common.pt", "x"),
        lambda: there.write("x", b""),
    ]
    for status, some in (
        ("429 Too Many Requests", actions[-1:]),
        ("504 Gateway Timeout", actions[-1:]),
        ("502 Bad Gateway", actions),
    ):
        server.status = status
        for action in some:
            with pytest.raises(StoreError, match="the store cannot be reached, or fails") as caught:
                action()
            assert not caught.value.is_lasting
    # An upload is tried for as long as it may fail, and reading more than once.
    up = uploader(tmp_path)
    up.put(10)
    assert wait_until(lambda: up.uploading == 10, 30) and up.trouble is None
    server.status = ""
    assert wait_until(lambda: up.is_done, 30)


def test_a_damaged_file_of_the_cache_is_copied_again(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 10)
    upload(tmp_path, 10)
    cached = fetch(URL)
    (cached / "__1_0.distcp").write_bytes(b"x" * 2000)
    with pytest.raises(
        DamagedError, match=r"__1_0\.distcp: .*is removed, so run the command again to copy it once more"
    ):
        Verification(cached).wait()
    assert content_of(fetch(URL)) == content_of(folder)
    # Small files are read before anything is verified.
    (cached / "model.json").write_bytes(b"x" * (folder / "model.json").stat().st_size)
    assert content_of(fetch(URL)) == content_of(folder)


def test_what_others_copy_takes_room_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path, 10)
    upload(tmp_path, 10)
    needed = sum(len(content) for name, content in content_of(folder).items() if name != CHECKSUMS)
    # Of a process that was killed.
    claim = "common.pt" + hashlib.sha256(f"{folder.name}/common.pt".encode()).hexdigest()[:8]
    half = remote._cache() / "copy" / remote.COPYING / f"{claim}.1.part"
    half.parent.mkdir(parents=True)
    half.write_bytes(bytes(1000))
    there = Store(URL, name="load")
    for free, fits in ((needed - 1001, False), (needed - 1000, True)):
        monkeypatch.setattr(remote.shutil, "disk_usage", lambda _, free=free: types.SimpleNamespace(free=free))
        with contextlib.nullcontext() if fits else pytest.raises(CheckpointError, match="GB free"):
            remote.copy_here(there, f"{folder.name}/", half.parent.parent, there.files())
    assert not list(half.parent.glob("*.part"))


def test_a_checkpoint_that_is_removed_meanwhile_makes_way_for_the_newer(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, 10)
    folder = write_checkpoint(tmp_path, 20)
    upload(tmp_path, 10)
    download = Store.download

    def slow(self: Store, path: str, target: Path, **others: Any) -> None:
        if path.startswith("iter_0000010"):
            upload(tmp_path, 20, keep_last=1)
        download(self, path, target, **others)

    monkeypatch.setattr(Store, "download", slow)
    monkeypatch.setattr(remote, "_THREADS", 1)
    assert content_of(fetch(URL)) == content_of(folder)


def test_one_failure_breaks_the_other_copies_off(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(tmp_path, 10)
    upload(tmp_path, 10)
    there, prefix = Store(URL, name="load"), f"{folder.name}/"
    monkeypatch.setattr(remote, "_THREADS", 1)
    first = next(iter(parse_checksums((folder / CHECKSUMS).read_bytes())))
    server.flip_a_bit(f"run/{prefix}{first}")
    server.requests.clear()
    with pytest.raises(DamagedError, match="its content differs"):
        remote.copy_here(there, prefix, tmp_path / "copy", there.files())
    got = {path for method, path in server.requests if method == "GET" and prefix in path}
    assert got == {f"/{BUCKET}/run/{prefix}{name}" for name in (CHECKSUMS, first)}


def test_a_copy_is_broken_off_however_a_package_tells_of_its_parts() -> None:
    """s3fs and gcsfs tell of the bytes that are new, adlfs of those so far."""
    callback = store._Stopping(lambda: True)
    for update in (callback.relative_update, callback.absolute_update, callback.set_size):
        with pytest.raises(Stopped):
            update(1000)
    callback = store._Stopping(lambda: False)
    callback.relative_update(1000)
    callback.absolute_update(2000)


def test_who_has_waited_for_another_copy_of_a_file_looks_whether_to_go_on(tmp_path: Path) -> None:
    source, target, locks = tmp_path / "there", tmp_path / "here" / "file", tmp_path / "here" / ".copying"
    source.mkdir()
    (source / "file").write_bytes(b"content")
    there, asked = Store(f"file://{source}", name="load"), []
    checksum = Checksum(bytes=7, sha256=hashlib.sha256(b"content").hexdigest())

    def is_stopped() -> bool:
        asked.append(target.exists())
        return True

    with pytest.raises(Stopped):
        remote._copy_file(there, "file", target, checksum, locks, wait=True, is_stopped=is_stopped)
    assert asked == [False] and not target.exists()
    assert remote._copy_file(there, "file", target, checksum, locks, wait=True, is_stopped=lambda: False)
    assert target.read_bytes() == b"content"


def test_a_copy_is_broken_off_between_two_parts_of_a_file(server: S3Server, tmp_path: Path) -> None:
    server.write("run/large", bytes(2**20))
    asked: list[int] = []
    there = Store(URL, name="load")
    with pytest.raises(Stopped):
        there.download("large", tmp_path / "large", is_stopped=lambda: len(asked) == 3 or asked.append(1) is not None)
    assert len(asked) == 3 and (tmp_path / "large").stat().st_size < 2**20
    there.download("large", tmp_path / "large")
    assert (tmp_path / "large").stat().st_size == 2**20


def test_an_old_one_that_is_damaged_here_is_only_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (10, 20):
        write_checkpoint(tmp_path, step)
    (folder_of(tmp_path, 10) / "common.pt").write_text("other")
    up = uploader(tmp_path)
    up.put(10, is_old=True)
    up.put(20)
    assert wait_until(lambda: up.is_done, 30) and up.trouble is None
    assert complete_steps(up.store.files()) == [20]
    assert "step 10 is not uploaded: " in capsys.readouterr().out


def test_names_that_lead_out_of_the_folder_are_refused(server: S3Server, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 10)
    upload(tmp_path, 10)
    listed = json.loads(server.read(f"run/iter_0000010/{CHECKSUMS}"))
    listed["files"]["../out"] = listed["files"].pop("common.pt")
    server.write(f"run/iter_0000010/{CHECKSUMS}", json.dumps(listed).encode())
    with pytest.raises(DamagedError, match="is outside the folder"):
        fetch(URL)


def test_old_ones_go_after_the_new_one_is_there(server: S3Server, tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write_checkpoint(tmp_path, step)
    upload(tmp_path, 10)
    # What a broken-off upload left.
    server.write("run/iter_0000015/__0_0.distcp", b"half")
    server.requests.clear()
    upload(tmp_path, 20, 30, keep_last=1, best=10)
    assert {key.split("/")[1] for key in server.names("run/iter_")} == {"iter_0000010", "iter_0000030"}
    deleted = [path for method, path in server.requests if method == "DELETE" and "iter_0000020" in path]
    # Without it nothing takes the rest for a checkpoint, which goes in one request.
    assert [path.rpartition("/")[2] for path in deleted] == [CHECKSUMS]
    names = [
        path
        for path in (f"iter_0000010/{name}" for name in (".metadata", "common.pt"))
        if f"run/{path}" in server.names()
    ]
    there = Store(URL, name="upload_to")
    for status, requests in (("", ["POST"]), ("501 Not Implemented", ["POST", "DELETE", "DELETE"])):
        for name in names:
            there.write(name, b"x")
        server.requests.clear()
        # A store that does not know removing in bulk.
        server.status_of_posts = status
        there.remove([*names, "iter_0000010/gone"])
        server.status_of_posts = ""
        assert [method for method, _ in server.requests if method in ("POST", "DELETE")] == requests
        assert not [name for name in names if f"run/{name}" in server.names()]
    upload(tmp_path, 10)
    (tmp_path / "best.json").write_text('{"step": 10}')
    upload(tmp_path, 30)
    server.write("run/best.json", b'{"step": 10}')
    assert fetch(f"{URL}/best").name == "iter_0000010"


def test_an_upload_goes_on_when_the_store_is_back(
    server: S3Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_checkpoint(tmp_path, 10)
    server.status = "503 Service Unavailable"
    up = uploader(tmp_path, patience=0.1)
    up.put(10)
    assert wait_until(lambda: up.trouble is not None, 30)
    trouble = up.trouble
    assert trouble is not None and trouble.step == 10 and "Service Unavailable" in trouble.reason
    server.status = ""
    assert wait_until(lambda: up.is_done, 30)
    assert up.trouble is None and content_of(fetch(URL)) == content_of(folder)
    said = capsys.readouterr().out
    assert said.count("step 10 is not uploaded yet") == 1 and f"step 10 is in {URL}/iter_0000010" in said
    # One that is given up makes way for the next.
    server.status = "500 Internal Server Error"
    write_checkpoint(tmp_path, 20)
    write_checkpoint(tmp_path, 30)
    up.put(20)
    up.put(30)
    assert wait_until(lambda: up.trouble is not None, 30)
    up.give_up(20)
    assert wait_until(lambda: up.uploading == 30, 30)
    server.status = ""
    assert wait_until(lambda: up.is_done, 30)
    assert complete_steps(up.store.files()) == [10, 30]


def test_what_is_being_uploaded_is_not_removed(server: S3Server, tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write_checkpoint(tmp_path, step)
    server.status = "503 Service Unavailable"
    up = uploader(tmp_path, patience=0.1)
    for step in (10, 20, 30):
        up.put(step)
    assert wait_until(lambda: up.trouble is not None, 30)
    # Step 20 waits, so it may go; a rank that is ahead gives up what the first rank removes, and that is no failure.
    assert up.release([10, 20]) == [20]
    shutil.rmtree(folder_of(tmp_path, 10))
    up.give_up(10, 20)
    assert up.trouble is None and wait_until(lambda: up.uploading == 30, 30)
    server.status = ""
    assert wait_until(lambda: up.is_done, 30) and complete_steps(up.store.files()) == [30]


def test_a_rank_that_sends_nothing_is_named(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path, 10)
    first = uploader(tmp_path, ranks=2, patience=0.3)
    first.put(10)
    assert wait_until(lambda: first.trouble is not None, 30)
    trouble = first.trouble
    assert trouble is not None and "rank 1 has not sent its files of step 10 (1 ranks have not)" in trouble.reason
    # As long as that rank is sending there is no trouble.
    for oldest, expected in ((10, None), (None, trouble), (20, trouble)):
        monkeypatch.setattr(uploads, "all_gather_objects", lambda own, oldest=oldest: [own, (None, oldest)])
        assert uploads._first_trouble(first) == expected
    # One that does not see the folder tries again, and says so.
    away = tmp_path / "away"
    folder.rename(away)
    second = uploader(tmp_path, 1, ranks=2, patience=0.1)
    second.put(10)
    assert wait_until(lambda: second.trouble is not None, 30)
    assert second.trouble is not None and f"{folder}: is not there any more" in second.trouble.reason
    away.rename(folder)
    assert wait_until(lambda: first.is_done and second.is_done, 30)
    assert uploads._first_trouble(first) is None and content_of(fetch(URL)) == content_of(folder)
    # What is lost or cut in the store is sent again, whoever wrote it.
    server.client.delete_object(Bucket=BUCKET, Key=f"run/{folder.name}/__1_0.distcp")
    server.write(f"run/{folder.name}/common.pt", b"cut")
    second.put(10)
    first.put(10)
    assert wait_until(lambda: first.is_done and second.is_done, 30)
    assert server.read(f"run/{folder.name}/__1_0.distcp") == (folder / "__1_0.distcp").read_bytes()
    assert server.read(f"run/{folder.name}/common.pt") == (folder / "common.pt").read_bytes()
    assert len(server.names(f"run/{folder.name}/")) == len(content_of(folder)), "no note is left"


def test_notes_stay_until_the_checkpoint_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store refuses the checksums once, and a note's removal once: no rank would write its note again."""
    folder = write_checkpoint(tmp_path, 10)
    refused: set[str] = set()
    real_write, real_remove = Store.write, Store.remove

    def refuse(what: str) -> None:
        if what not in refused:
            refused.add(what)
            raise StoreError("slow down", is_lasting=False)

    def write(self: Store, path: str, content: bytes) -> None:
        if path.endswith(CHECKSUMS):
            refuse("checksums")
        real_write(self, path, content)

    def remove(self: Store, paths: Iterable[str]) -> None:
        listed = list(paths)
        if any(uploading._NOTE in path for path in listed):
            refuse("note")
        real_remove(self, listed)

    monkeypatch.setattr(Store, "write", write)
    monkeypatch.setattr(Store, "remove", remove)
    first, second = (uploader(tmp_path, rank, ranks=2) for rank in range(2))
    for each in (first, second):
        each.put(10)
    assert wait_until(lambda: first.is_done and second.is_done, 30)
    assert refused == {"checksums", "note"} and content_of(fetch(URL)) == content_of(folder)
    assert not any(uploading._NOTE in path for path in Store(URL, name="load").files())


def test_an_upload_that_comes_on_is_not_failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, 10)
    calls: list[str] = []
    real = Store.upload

    def upload_slowly(self: Store, source: Path, path: str) -> None:
        calls.append(path)
        if len(calls) == 1:
            raise StoreError("slow down", is_lasting=False)
        real(self, source, path)
        time.sleep(0.3)

    monkeypatch.setattr(Store, "upload", upload_slowly)
    monkeypatch.setattr(uploading, "_THREADS", 1)
    up = uploader(tmp_path, patience=1.5)
    up.put(10)
    assert wait_until(lambda: len(calls) > 1, 30)
    seen = []
    assert wait_until(lambda: bool(seen.append(up.trouble)) or up.is_done, 30)
    assert len(calls) > 6 and seen.count(None) == len(seen)


def test_a_complete_checkpoint_stays_whole_until_it_is_declared_incomplete(server: S3Server, tmp_path: Path) -> None:
    before = write_checkpoint(tmp_path / "a", 10)
    upload(tmp_path / "a", 10)
    folder = write_checkpoint(tmp_path / "b", 10)
    (folder / "__1_0.distcp").write_bytes(b"other")
    write_checksums(folder)
    second = uploader(tmp_path / "b", 1, ranks=2)
    server.requests.clear()
    second.put(10)
    assert wait_until(lambda: len(server.requests) > 3, 30)
    assert not [path for method, path in server.requests if method == "PUT"]
    assert server.read(f"run/{folder.name}/__1_0.distcp") == (before / "__1_0.distcp").read_bytes()
    first = uploader(tmp_path / "b", ranks=2)
    first.put(10)
    assert wait_until(lambda: first.is_done and second.is_done, 30)
    assert server.read(f"run/{folder.name}/__1_0.distcp") == b"other" and content_of(fetch(URL)) == content_of(folder)


def test_what_is_damaged_here_is_not_uploaded(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 10)
    (folder / "common.pt").write_text("other" + (folder / "common.pt").read_text()[5:])
    up = uploader(tmp_path)
    up.put(10)
    assert wait_until(lambda: up.trouble is not None, 30)
    assert up.trouble is not None and f"{folder}/common.pt: its content differs" in up.trouble.reason
    assert complete_steps(up.store.files()) == []
    up.give_up(10)


def test_a_store_that_another_run_has_taken_over_is_left_alone(server: S3Server, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", 10)
    owner = uploads._own_id(Store(URL, name="upload_to"), tmp_path / "a")
    taken = uploads._take(Store(URL, name="upload_to"), tmp_path / "a", owner)
    first = uploader(tmp_path / "a", check_owner=lambda: uploads._check_owner(Store(URL, name="upload_to"), taken))
    first.put(10)
    assert wait_until(lambda: first.is_done, 30)
    # The same folder is the same run; an empty one goes on with it; one with checkpoints of its own does not.
    assert uploads._own_id(first.store, tmp_path / "a") == owner
    write_checkpoint(tmp_path / "c", 5)
    with pytest.raises(CheckpointError, match=f"another run .*{tmp_path}/a.*, but save={tmp_path}/c has checkpoints"):
        uploads._own_id(first.store, tmp_path / "c")
    # So is a copy of the folder refused, id and all, unless the owner's file is removed.
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    with pytest.raises(
        CheckpointError, match=r"another run .*if this is that run .*, remove owner\.json from the store"
    ):
        uploads._own_id(first.store, tmp_path / "copy")
    content = server.read("run/owner.json")
    server.client.delete_object(Bucket=BUCKET, Key="run/owner.json")
    assert uploads._own_id(first.store, tmp_path / "copy") != owner
    server.write("run/owner.json", content)
    (tmp_path / "b").mkdir()
    uploads._take(first.store, tmp_path / "b", uploads._own_id(first.store, tmp_path / "b"))
    write_checkpoint(tmp_path / "a", 20)
    first.put(20)
    assert wait_until(lambda: first.trouble is not None, 30)
    assert first.trouble is not None and f"{tmp_path}/b) has taken it over" in first.trouble.reason
    assert complete_steps(first.store.files()) == [10] and server.names("run/iter_0000020") == []
    first.give_up(20)


def test_checkpoints_of_version_0_1_stay_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_checkpoint(tmp_path, 10)
    (folder / CHECKSUMS).unlink()
    upload(tmp_path, 10)
    assert "so it is not uploaded" in capsys.readouterr().out and complete_steps(Store(URL, name="x").files()) == []


def test_another_checkpoint_of_the_same_step_takes_its_place(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", 10)
    upload(tmp_path / "a", 10)
    folder = write_checkpoint(tmp_path / "b", 10, ranks=1)
    first = fetch(URL)
    upload(tmp_path / "b", 10)
    assert fetch(URL) != first and content_of(fetch(URL)) == content_of(folder)


def _no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_folders_by_url_are_stores_too(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "run", 10)
    target = Store(f"file://{tmp_path}/store", name="upload_to")
    for name, content in content_of(folder).items():
        target.write(f"{folder.name}/{name}", content)
    assert content_of(fetch(f"file://{tmp_path}/store")) == content_of(folder)
    # A file that is cut short never has its name.
    link = tmp_path / "missing-room"
    link.write_bytes(b"content")
    target.upload(link, "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", _no_room)
        for act in (lambda: target.upload(link, "whole"), lambda: target.write("whole", b"other")):
            with pytest.raises(StoreError, match="No space left"):
                act()
    assert target.read("whole", most=100) == b"content" and not [path for path in target.files() if "part" in path]
    target.remove(["whole"])
    target.remove([f"{folder.name}/hf/config.json", f"{folder.name}/nothing"])
    assert not (tmp_path / "store" / folder.name / "hf").exists() and (tmp_path / "store" / folder.name).exists()
    target.remove(target.files())
    assert list((tmp_path / "store").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "url", "message"),
    [
        ({}, "s3://other/run", "no such bucket or file .*; create the bucket, or correct the URL"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, URL, "no credentials .*; set AWS_PROFILE"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, URL, r"cannot be reached, or fails \(EndpointConnectionError"),
        ({}, "xyz://bucket/run", "Protocol not known: xyz.*; use s3://"),
    ],
)
def test_a_store_that_cannot_be_used_is_named_in_one_line(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, str], url: str, message: str
) -> None:
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(store, "_TRIES", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StoreError, match=f"^upload_to={url}: .*{message}") as caught:
        Store(url, name="upload_to").files()
    s3fs.S3FileSystem.clear_instance_cache()
    assert SECRET not in str(caught.value) and "\n" not in str(caught.value)


def test_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(f"failed for {SECRET} at http://me:password@host/x")

    target = Store(URL, name="upload_to")
    monkeypatch.setattr(target._fs, "pipe_file", fail)
    with pytest.raises(StoreError, match="failed for ") as caught:
        target.write("x", b"")
    said = store._shown(f"failed for {SECRET} at http://me:password@host/x")
    assert said == "failed for [AWS_SECRET_ACCESS_KEY] at http://[credentials]@host/x"
    assert SECRET not in str(caught.value) and "password" not in str(caught.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(store.fsspec.core, "url_to_fs", missing)
    with pytest.raises(
        StoreError, match=r"Install s3fs .*; it needs the package s3fs: pip install s3fs \(the extra `s3`"
    ):
        Store(URL, name="upload_to")


@pytest.mark.parametrize(
    "url", ["s3://key:secret@bucket/run", "https://h/run?X-Amz-Signature=secret", "s3://b/run#secret"]
)
def test_urls_with_credentials_are_refused_and_not_quoted(url: str) -> None:
    with pytest.raises(ConfigError, match="could be credentials") as caught:
        Store(url, name="load")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["bucket/run", "s3:///run", "://x", "simplecache::s3://bucket/run"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="is no URL of a folder; write it as s3://BUCKET/RUN"):
        Store(url, name="upload_to")


def test_the_names_in_a_store_are_those_of_a_run() -> None:
    files = ["iter_0000010/checksums.json", "iter_0000020/.metadata", "metrics.jsonl", "iter_5/checksums.json"]
    assert complete_steps(files) == [10] and [remote.step_of(path) for path in files] == [10, 20, None, None]
