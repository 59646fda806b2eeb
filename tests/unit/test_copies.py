"""Copies of a checkpoint on several nodes: none is taken for whole that is not, and each is verified whole; ranks are threads."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.checkpoint import checksums
from megatron_longpo.checkpoint.checksums import CHECKSUMS, COPYING, Verification
from megatron_longpo.errors import DamagedError
from megatron_longpo.runtime import collectives
from megatron_longpo.runtime.files import is_on_local_disk
from tests.support.listed import NAMES, make_listed


class Ranks:
    """Ranks that verify, each in a thread.

    Attributes:
        hosts: name of each rank's host.
        folders: folder of each rank.
        hashed: names of the files that each rank has hashed.
        viewed: how often each rank has looked at the files to tell the copies apart.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, hosts: list[str], folders: list[Path]) -> None:
        self.hosts, self.folders = hosts, folders
        self.hashed: list[list[str]] = [[] for _ in hosts]
        self.viewed = [0 for _ in hosts]
        self._own, self._values = threading.local(), [None] * len(hosts)
        self._barrier = threading.Barrier(len(hosts), timeout=20)
        own_hash, own_view = checksums.sha256_of, checksums._view_of

        def note_hash(path: Path) -> str:
            # The threads of a verification are of no rank; their paths tell.
            rank = next(number for number, folder in enumerate(folders) if folder == path.parent)
            self.hashed[rank].append(path.name)
            return own_hash(path)

        def note_view(folder: Path) -> Any:
            self.viewed[self._own.rank] += 1
            return own_view(folder)

        for module in (checksums, collectives):
            monkeypatch.setattr(module, "rank", lambda: self._own.rank)
        monkeypatch.setattr(checksums, "all_gather_objects", self._gather)
        monkeypatch.setattr(checksums.socket, "gethostname", lambda: hosts[self._own.rank])
        monkeypatch.setattr(checksums, "sha256_of", note_hash)
        monkeypatch.setattr(checksums, "_view_of", note_view)
        monkeypatch.setattr(checksums, "_SMALL_BYTES", -1)
        monkeypatch.setattr(checksums, "_SECONDS_UNTIL_SEEN", 0.2)
        monkeypatch.setattr(checksums, "_SECONDS_BETWEEN_LOOKS", 0.02)

    def _gather(self, value: Any) -> list[Any]:
        self._values[self._own.rank] = value
        self._barrier.wait()
        found = list(self._values)
        self._barrier.wait()
        return found

    def verify(self, **options: bool) -> list[str]:
        """What each rank says."""
        said = ["did not end"] * len(self.hosts)

        def work(rank: int) -> None:
            self._own.rank = rank
            try:
                Verification(self.folders[rank], **options).wait()
                said[rank] = ""
            except DamagedError as error:
                said[rank] = str(error)

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(self.hosts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return said


@pytest.fixture
def node0(tmp_path: Path) -> Path:
    return make_listed(tmp_path / "node0" / "iter_0000001")


@pytest.fixture
def node1(tmp_path: Path, node0: Path) -> Path:
    """A copy on another disk."""
    return Path(shutil.copytree(node0, tmp_path / "node1" / "iter_0000001"))


def _linked(folder: Path, other: Path) -> Path:
    """A folder with the same files, whose numbers and times are equal."""
    return Path(shutil.copytree(folder, other, copy_function=os.link))


def _damage(path: Path) -> None:
    path.write_bytes(b"!" + path.read_bytes()[1:])


@pytest.mark.parametrize("lost", [*NAMES, CHECKSUMS])
@pytest.mark.parametrize("which", [0, 1])
def test_a_copy_without_a_file_counts_by_itself(
    node0: Path, node1: Path, monkeypatch: pytest.MonkeyPatch, lost: str, which: int
) -> None:
    """Its ranks would take a share of the other copy's files, and hash it in their own."""
    folders = [node0, node1]
    (folders[which] / lost).unlink()
    said = Ranks(monkeypatch, ["a", "b"], folders).verify()
    rule = f"{folders[which] / lost}: is missing on host {'ab'[which]}, so the checkpoint is damaged"
    assert said[0] == said[1] and said[0].startswith(rule)
    assert node0 not in checksums._VERIFIED and node1 not in checksums._VERIFIED


def test_damage_of_one_copy_is_not_passed_where_another_lacks_a_file(
    node0: Path, node1: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What rank 0 would leave to rank 1 is whole in the second copy."""
    (node1 / "metadata.json").unlink()
    _damage(node0 / "__0_0.distcp")
    said = Ranks(monkeypatch, ["a", "b"], [node0, node1]).verify()
    assert said[0] == said[1] != "" and node0 not in checksums._VERIFIED


@pytest.mark.parametrize("damaged", NAMES[:4])
def test_both_copies_are_verified_whole_where_one_lacks_what_a_run_can_do_without(
    node0: Path, node1: Path, monkeypatch: pytest.MonkeyPatch, damaged: str
) -> None:
    (node1 / "model.json").unlink()
    ranks = Ranks(monkeypatch, ["a", "b"], [node0, node1])
    assert ranks.verify(state_only=True) == ["", ""]
    assert [sorted(names) for names in ranks.hashed] == [sorted(NAMES), sorted(set(NAMES) - {"model.json"})]
    _damage(node0 / damaged)
    said = ranks.verify(state_only=True)
    rule = f"{node0 / damaged}: its content differs from its checksum in {CHECKSUMS} on host a, so"
    assert said[0] == said[1] and said[0].startswith(rule)


def test_a_late_node_waits_for_files_that_others_see(
    node0: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shared folder; the second node sees one of its files only at its third look."""
    monkeypatch.setattr(checksums, "is_on_local_disk", lambda _: False)
    node1 = _linked(node0, tmp_path / "late" / "iter_0000001")
    (node1 / "common.pt").unlink()
    ranks = Ranks(monkeypatch, ["a", "b"], [node0, node1])
    view: Callable[[Path], Any] = checksums._view_of

    def later(folder: Path) -> Any:
        if ranks.viewed[1] == 2 and folder == node1:
            os.link(node0 / "common.pt", node1 / "common.pt")
        return view(folder)

    monkeypatch.setattr(checksums, "_view_of", later)
    monkeypatch.setattr(checksums, "_SECONDS_UNTIL_SEEN", 20.0)
    assert ranks.verify() == ["", ""]
    assert ranks.viewed == [1, 3]
    # They share the copy.
    assert sorted(ranks.hashed[0] + ranks.hashed[1]) == sorted(NAMES) and [len(names) for names in ranks.hashed] == [
        3,
        3,
    ]


def test_a_file_that_appears_after_all_is_not_removed_from_a_copy_of_a_store(
    node0: Path, node1: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (node1 / "common.pt").unlink()
    (node1 / COPYING).mkdir()
    refusal = checksums._remove_copied

    def appears(damage: checksums.Damage, folder: Path) -> None:
        shutil.copy(node0 / "common.pt", node1)
        refusal(damage, folder)

    monkeypatch.setattr(checksums, "_remove_copied", appears)
    assert "common.pt: is missing on host b" in Ranks(monkeypatch, ["a", "b"], [node0, node1]).verify()[0]
    assert (node1 / "common.pt").is_file()


def test_one_rank_per_host_looks(node0: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "is_on_local_disk", lambda _: False)
    ranks = Ranks(monkeypatch, ["a", "a", "b", "b"], [node0] * 4)
    assert ranks.verify() == [""] * 4
    assert ranks.viewed == [1, 0, 1, 0]
    # All share one copy; all hash in the same folder, so the names are those of rank 0's.
    assert sorted(ranks.hashed[0]) == sorted(NAMES)


@pytest.mark.parametrize("is_local", [True, False])
def test_local_disks_from_one_snapshot_are_several_copies(
    node0: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_local: bool
) -> None:
    node1 = _linked(node0, tmp_path / "snapshot" / "iter_0000001")
    monkeypatch.setattr(checksums, "is_on_local_disk", lambda _: is_local)
    ranks = Ranks(monkeypatch, ["a", "b"], [node0, node1])
    assert ranks.verify() == ["", ""]
    assert [len(names) for names in ranks.hashed] == ([6, 6] if is_local else [3, 3])


def test_a_checkpoint_without_checksums_is_read_as_it_is(
    node0: Path, node1: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (node0, node1):
        (folder / CHECKSUMS).unlink()
    ranks = Ranks(monkeypatch, ["a", "b"], [node0, node1])
    assert ranks.verify() == ["", ""] and ranks.viewed == [1, 1]


def test_local_disks_are_known_by_the_table_of_mounts(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        f"23 22 0:40 / {tmp_path}/home rw - nfs4 server:/home rw\n"
        f"24 23 0:41 / {tmp_path}/home/on\\040node rw master:2 - tmpfs tmpfs rw\n"
        f"25 22 0:42 / {tmp_path}/data rw - xfs /dev/sdb rw\n"
        f"26 25 0:43 / {tmp_path}/data rw - lustre mds:/data rw\n"
        "\n"
    )
    found = {
        name: is_on_local_disk(tmp_path / name, mounts=mounts)
        for name in ("home/x", "home/on node/x", "homely", "data")
    }
    assert found == {"home/x": False, "home/on node/x": True, "homely": True, "data": False}
    assert not is_on_local_disk(tmp_path, mounts=tmp_path / "none")
