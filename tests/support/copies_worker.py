"""Two ranks as two nodes, each with a checkpoint on a disk of its own: what is verified, and what a failure of one does.

torchrun ... -m tests.support.copies_worker FOLDER
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_longpo.checkpoint import checksums
from megatron_longpo.checkpoint.checksums import Verification
from megatron_longpo.errors import CheckpointError, DamagedError
from megatron_longpo.runtime import collectives, process_groups
from megatron_longpo.runtime.collectives import all_gather_objects, on_rank0, work_on_all_ranks
from megatron_longpo.runtime.failure import run_or_fail
from megatron_longpo.runtime.files import sha256_of


def _said(action: Callable[[], object]) -> str:
    try:
        action()
    except CheckpointError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _verify(folder: Path) -> dict[str, Any]:
    """What verifying says, on each rank, and which files each rank has hashed."""
    hashed: list[str] = []

    def note(path: Path) -> str:
        hashed.append(path.name)
        return sha256_of(path)

    checksums.sha256_of = note  # type: ignore[assignment]
    said = _said(lambda: Verification(folder).wait())
    checksums.sha256_of = sha256_of
    return {"said": all_gather_objects(said), "hashed": all_gather_objects(sorted(hashed))}


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)


def _failing(rank: int, error: Exception) -> dict[str, Any]:
    """Work that fails on one rank at once, while it would take the other one a minute."""
    began = time.monotonic()

    def work(is_stopped: Callable[[], bool]) -> None:
        if int(os.environ["RANK"]) == rank:
            raise error
        while not is_stopped() and time.monotonic() < began + 60:
            time.sleep(0.01)

    said = _said(lambda: work_on_all_ranks(work, Path("out")))
    return {"said": all_gather_objects(said), "seconds": all_gather_objects(time.monotonic() - began)}


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    process_groups.start_processes(1)
    # All files count as large.
    checksums._SMALL_BYTES = -1
    own, found = folder / f"node{rank}" / "iter_0000001", {}
    found["shared"] = _verify(folder / "node0" / "iter_0000001")
    found["copies"] = _verify(own)
    found["again"] = _verify(own)
    for name in sorted(path.name for path in own.glob("*.distcp")):
        if rank == 1:
            _flip(own / name)
        found[name] = _verify(own)
        if rank == 1:
            _flip(own / name)
    # The second copy lacks a file, and the first one is damaged.
    checksums._SECONDS_UNTIL_SEEN = 0.1
    if rank == 1:
        (own / "model.json").unlink()
    else:
        _flip(own / "__0_0.distcp")
    found["incomplete"] = _verify(own)
    collectives._POLL_SECONDS = 0.05
    found["failing"] = _failing(1, DamagedError("the file is damaged; use another"))
    found["slow"] = _said(lambda: work_on_all_ranks(lambda _: time.sleep(0.5 * rank), Path("out")))
    if on_rank0(lambda: True) and rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    process_groups.stop_processes()


if __name__ == "__main__":
    run_or_fail(main)
