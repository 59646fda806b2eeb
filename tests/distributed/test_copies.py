"""Nodes that have copies of a checkpoint on disks of their own: all of each is verified; a failure of one reaches all at once."""

from __future__ import annotations

import json
import shutil
import socket
from typing import Any

import pytest

from tests.support.launch import run, torchrun
from tests.support.listed import NAMES, WEIGHTS, make_listed


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two ranks found, by case."""
    folder = tmp_path_factory.mktemp("copies")
    make_listed(folder / "node0" / "iter_0000001")
    shutil.copytree(folder / "node0", folder / "node1")
    run(torchrun(2, "-m", "tests.support.copies_worker", str(folder)))
    return dict(json.loads((folder / "found.json").read_text()))


def test_a_shared_folder_is_read_once_and_each_copy_whole(found: dict[str, Any]) -> None:
    assert found["shared"]["said"] == ["", ""]
    shares = found["shared"]["hashed"]
    assert sorted(shares[0] + shares[1]) == list(NAMES) and all(len(share) == 3 for share in shares)
    # Rank 0 has verified its copy just now.
    assert found["copies"] == {"said": ["", ""], "hashed": [[], [*NAMES]]}
    assert found["again"] == {"said": ["", ""], "hashed": [[], []]}


@pytest.mark.parametrize("name", WEIGHTS)
def test_damage_of_one_nodes_copy_is_named_with_the_host(found: dict[str, Any], name: str) -> None:
    said = found[name]["said"]
    rule = f"its content differs from its checksum in checksums.json on host {socket.gethostname()}, so the checkpoint is damaged"
    assert said[0] == said[1] and f"/node1/iter_0000001/{name}: {rule}" in said[0]


def test_a_copy_that_lacks_a_file_is_refused(found: dict[str, Any]) -> None:
    said = found["incomplete"]["said"]
    rule = f"is missing on host {socket.gethostname()}, so the checkpoint is damaged"
    assert said[0] == said[1] and f"/node1/iter_0000001/model.json: {rule}" in said[0]


def test_a_failure_of_one_rank_reaches_all_while_they_work(found: dict[str, Any]) -> None:
    assert found["failing"]["said"] == ["DamagedError: the file is damaged; use another"] * 2
    assert max(found["failing"]["seconds"]) < 20
    assert found["slow"] == ""
