"""A checkpoint of the tiny model, saved in the middle of a run and resumed from: in the same layout and in another."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_longpo.doctor.bounds import bounds_of
from megatron_longpo.doctor.examination import Check
from megatron_longpo.doctor.findings import Line, by_error
from megatron_longpo.doctor.ranks import Ranks
from megatron_longpo.doctor.resources import NOT_SHARED, sees
from megatron_longpo.doctor.steps import (
    NOT_READY,
    Layout,
    Numbers,
    Workshop,
    layouts,
    numbers_of,
    quietly,
    step_errors,
    whole,
)
from megatron_longpo.errors import LongPOError
from megatron_longpo.runtime import platform
from megatron_longpo.runtime.collectives import all_gather_objects
from megatron_longpo.runtime.process_groups import destroy_groups
from megatron_longpo.training.trainer import Trainer

_REMEDY = (
    "do not save to this folder: run again with --folder on another file system; if it fails there as well, with another version "
    "of torch or megatron-core"
)
_HANG = "see whether the file system of --folder answers (ls, df, dmesg on each node); name another with --folder"


def checkpoint_check(workshop: Workshop, folder: Path) -> Check:
    """Save, resume, and go on.

    Args:
        workshop: the tiny model.
        folder: folder that all ranks see.
    """
    return Check("checkpoint", functools.partial(_check, workshop=workshop, folder=folder), _HANG)


def _check(ranks: Ranks, *, workshop: Workshop, folder: Path) -> Iterator[Line]:
    if not workshop.is_ready:
        yield Line("checkpoint", "skipped", NOT_READY)
        return
    mine = sees(folder)
    if not all(all_gather_objects(mine)):
        if not mine:
            yield Line(
                "checkpoint", "fail", f"rank {ranks.rank} does not see what rank 0 writes to {folder}", NOT_SHARED
            )
        return
    # A run keeps its optimizer's kind: where there is a distributed one, its states change places.
    found = layouts(ranks.world_size)
    first = next((x for x in found if x.parallel["use_distributed_optimizer"]), found[0])
    kind = first.parallel["use_distributed_optimizer"]
    other = next((x for x in reversed(found) if x != first and x.parallel["use_distributed_optimizer"] == kind), None)
    output = folder / "run"
    with quietly():
        ranks.at("saving a checkpoint")
        saved, after = _saved(workshop, first, output)
        ranks.at("loading a checkpoint")
        again = _resumed(workshop, first, output)
        ranks.at("loading a checkpoint in another layout")
        elsewhere = None if other is None else _resumed(workshop, other, output)
    if ranks.rank == 0:
        bound = bounds_of(torch.float32, platform.CURRENT.device.type).step
        yield _line(f"checkpoint, saved and resumed in {first.name}", again, saved, after, bound)
        if other is not None and elsewhere is not None:
            yield _line(f"checkpoint, resumed in {other.name}", elsewhere, saved, after, bound)


_Weights = dict[str, torch.Tensor]


def _saved(workshop: Workshop, layout: Layout, output: Path) -> tuple[_Weights, Numbers]:
    """Weights of the checkpoint, and what the step after it computes; collective."""
    trainer = workshop.trainer(layout, torch.float32, save=output)
    numbers_of(trainer)
    trainer.save(last=True)
    weights, after = _weights_and_step(trainer)
    _close(trainer)
    return weights, after


def _resumed(workshop: Workshop, layout: Layout, output: Path) -> tuple[_Weights, Numbers] | str:
    """The same of a run that resumes; or why it cannot. Collective."""
    try:
        trainer = workshop.trainer(layout, torch.float32, save=output)
    except LongPOError as error:
        return str(error)
    if trainer.step != 1:
        return f"it resumes after step {trainer.step}, not after step 1"
    weights, after = _weights_and_step(trainer)
    _close(trainer)
    return weights, after


def _weights_and_step(trainer: Trainer) -> tuple[_Weights, Numbers]:
    """A trainer's weights, and what its next step computes; collective."""
    weights, trouble = whole(trainer, lambda p: p.detach())
    numbers = numbers_of(trainer)
    return weights, dataclasses.replace(numbers, trouble=trouble or numbers.trouble)


def _close(trainer: Trainer) -> None:
    trainer.checkpointer.close()
    dist.barrier()
    destroy_groups()


def _line(name: str, found: tuple[_Weights, Numbers] | str, saved: _Weights, after: Numbers, bound: float) -> Line:
    if isinstance(found, str):
        return Line(name, "fail", found, _REMEDY)
    weights, numbers = found
    if after.trouble or numbers.trouble:
        return Line(name, "fail", after.trouble or numbers.trouble, _REMEDY)
    # What is loaded is what was saved, to the last bit.
    changed = [key for key, value in saved.items() if not torch.equal(value, weights.get(key, torch.empty(0)))]
    if changed:
        return Line(name, "fail", f"{len(changed)} of {len(saved)} weights differ, such as {changed[0]}", _REMEDY)
    errors = step_errors(numbers, after)
    return by_error(name, {f"{n} of the next step": e for n, e in errors.items()}, bound, remedy=_REMEDY)
