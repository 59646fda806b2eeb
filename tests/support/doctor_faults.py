"""The doctor's checks on several ranks, one fault after another; the last one hangs.

torchrun ... -m tests.support.doctor_faults FOLDER

Writes FOLDER/found.json: lines by fault; and FOLDER/doctor.json when it hangs.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_longpo.config import Config, ParallelConfig
from megatron_longpo.doctor import collectives as doctor_collectives
from megatron_longpo.doctor import resources
from megatron_longpo.doctor.checkpoints import checkpoint_check
from megatron_longpo.doctor.collectives import collective_checks
from megatron_longpo.doctor.examination import Check, Examination
from megatron_longpo.doctor.findings import Report
from megatron_longpo.doctor.ranks import Ranks
from megatron_longpo.doctor.resources import Wanted, resource_checks
from megatron_longpo.doctor.steps import SHAPE, Workshop, step_checks
from megatron_longpo.runtime import process_groups
from megatron_longpo.runtime.failure import run_or_fail
from megatron_longpo.training import batch
from megatron_longpo.training.checkpointer import Checkpointer

# Long enough for a machine with much else to do.
CHECK_SECONDS, HANG_SECONDS = 120.0, 8.0


def _rank_dropped(all_reduce: Any) -> Callable[..., Any]:
    """Rank 1 takes part with zeros."""

    def dropping(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, **kwargs: Any) -> Any:
        if dist.get_rank() == 1 and op == dist.ReduceOp.SUM:
            tensor.zero_()
        return all_reduce(tensor, op, **kwargs)

    return dropping


class _Permuted:
    """Waits, and then has the pieces in another order."""

    def __init__(self, work: Any, out: torch.Tensor) -> None:
        self._work, self._out = work, out

    def wait(self) -> None:
        self._work.wait()
        self._out.copy_(self._out.roll(self._out.shape[0] // dist.get_world_size(), 0))


def _permuted(all_to_all: Any) -> Callable[..., Any]:
    return lambda out, given, **kwargs: _Permuted(all_to_all(out, given, **kwargs), out)


def _own_shard_twice(all_gather: Any) -> Callable[..., Any]:
    """What the other rank sends is not what arrives."""

    def gathering(out: torch.Tensor, given: torch.Tensor, **kwargs: Any) -> Any:
        return all_gather(out, given + 1 if dist.get_rank() == 1 and given.dtype == torch.bfloat16 else given, **kwargs)

    return gathering


def _slowly(function: Any, seconds: float) -> Callable[..., Any]:
    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return function(*args, **kwargs)

    return slow


def _without_a_tensor(content: Any) -> Callable[..., Any]:
    def losing(self: Checkpointer, *args: Any, is_loading: bool, **kwargs: Any) -> Any:
        found = content(self, *args, is_loading=is_loading, **kwargs)
        if not is_loading:
            del found["model0"]["decoder.final_layernorm.weight"]
        return found

    return losing


def _never_on_rank_1(reduce_scatter: Any) -> Callable[..., Any]:
    def hanging(*args: Any, **kwargs: Any) -> Any:
        if dist.get_rank() == 1:
            time.sleep(600)
        return reduce_scatter(*args, **kwargs)

    return hanging


def main() -> None:
    folder = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as own:
        workshop = Workshop(Path(own))
        workshop.prepare()
        process_groups.start_processes(5)
        _go_through(workshop, folder)


def _go_through(workshop: Workshop, folder: Path) -> None:
    ranks, report, found = Ranks.of_process_group(), Report(), dict[str, list[Any]]()
    examination = Examination(
        ranks,
        report,
        check_seconds=CHECK_SECONDS,
        on_change=lambda r: r.write(folder / "doctor.json"),
        on_end=lambda _: None,
    )
    collectives = collective_checks(ParallelConfig(), world_size=2, local_size=2, links="")
    # Little to exchange and to write: what is slow are the faults.
    resources._BYTES["cpu"] = 2**20
    doctor_collectives._TIMES["cpu"] = 1
    disk = resource_checks(Wanted(Config(), None, None), folder, world_size=2, local_size=2)[1:]
    steps = step_checks(workshop, 2)

    def step(name: str) -> list[Check]:
        return [c for c in steps if c.name == f"step, {name}, float32"]

    def look(fault: str, checks: list[Check], *patches: tuple[Any, str, Any]) -> None:
        before = len(report.lines)
        for where, name, value in patches:
            patch = mock.patch.object(where, name, value)
            patch.start()
        try:
            examination.run(checks, seconds=600)
        finally:
            mock.patch.stopall()
        found[fault] = [[line.name, line.status, line.detail] for line in report.lines[before:]]
        if ranks.rank == 0:
            (folder / "found.json").write_text(json.dumps(found))

    look("ready", steps[:1])
    look("a rank dropped", collectives, (dist, "all_reduce", _rank_dropped(dist.all_reduce)))
    look("pieces permuted", collectives, (dist, "all_to_all_single", _permuted(dist.all_to_all_single)))
    look(
        "another tensor gathered",
        collectives,
        (dist, "all_gather_into_tensor", _own_shard_twice(dist.all_gather_into_tensor)),
    )
    look("a slow broadcast", collectives[:1], (dist, "broadcast", _slowly(dist.broadcast, 3.0)))
    look("a slow disk", disk, (os, "fsync", _slowly(os.fsync, 6.0)))
    # Each node has a folder of this name of its own.
    here = folder if ranks.rank == 0 else folder / "elsewhere"
    own_disk = resource_checks(Wanted(Config(), None, None), here, world_size=2, local_size=1)[1:]
    look("a folder of one node", [*own_disk, checkpoint_check(workshop, here)])
    if ranks.rank == 0:
        SHAPE.write(folder)
    model = str(folder if ranks.rank == 0 else folder / "elsewhere")
    look("a model of one node", resource_checks(Wanted(Config(), model, 1024), folder, world_size=2, local_size=2)[:1])
    # The sum over context-parallel ranks is left out: each has its own part of the loss.
    look("a sum left out", step("CP 2 a2a") + step("DP 2"), (batch, "sum_over_group", lambda x, group: x))
    look(
        "a tensor lost",
        [checkpoint_check(workshop, folder)],
        (Checkpointer, "_content", _without_a_tensor(Checkpointer._content)),
    )
    examination._check_seconds = HANG_SECONDS
    look("a hang", collectives[1:3], (dist, "reduce_scatter_tensor", _never_on_rank_1(dist.reduce_scatter_tensor)))


if __name__ == "__main__":
    run_or_fail(main)
