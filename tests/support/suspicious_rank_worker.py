"""Two ranks in several layouts, of which one is slow, and then one computes wrong: what the run says of them.

torchrun ... -m tests.support.suspicious_rank_worker FOLDER
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_longpo.config import from_dict
from megatron_longpo.errors import PlatformError
from megatron_longpo.runtime import process_groups
from megatron_longpo.runtime.collectives import all_gather_objects
from megatron_longpo.runtime.failure import run_or_fail
from megatron_longpo.runtime.process_groups import destroy_groups
from megatron_longpo.training import rerun
from megatron_longpo.training.memory import StageMemory
from megatron_longpo.training.plan import make_plan
from megatron_longpo.training.rerun import _BOUND_FP32
from megatron_longpo.training.session import open_session
from megatron_longpo.training.trainer import Trainer, start_training
from tests.support.logs import said

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "dp2-overlap": {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
    "cp2-a2a": {"context_parallel_size": 2, "cp_comm_type": "a2a"},
    "cp2-allgather": {"context_parallel_size": 2, "cp_comm_type": "allgather"},
    "tp2-sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "pp2-vpp2": {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
}
# Ranks that something happens to: in reading, in computing, and in arithmetic.
READS_SLOWLY, COMPUTES_SLOWLY, COMPUTES_WRONG = 0, 1, 1
_SECONDS = 0.08
# On a machine that does much else, what it does may take longer for the other rank.
_ATTEMPTS = 12


def _settings(folder: Path, layout: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        "data": {"data_path": str(folder / "data")},
        "parallel": layout,
        "objective": {"objective": "sft"},
        "checkpoint": {"load": str(folder / "llama.ckpt")},
        "training": {"global_batch_size": 4, "train_iters": 100},
        "logging": {"log_interval": 2, "log_straggler": True},
        "faults": {"check_rerun_interval": 1000},
    }


def _while_active(flag: list[bool], action: Callable[[], None]) -> Callable[..., None]:
    return lambda *_: action() if flag else None


def _flip(value: torch.Tensor) -> None:
    """One bit more or less."""
    value.view(torch.int32).view(-1)[5] ^= 1 << 3


def _round(value: torch.Tensor) -> None:
    """What another order of adding does."""
    value.mul_(1 + 2**-22)


def _negate(value: torch.Tensor) -> None:
    """The largest sixteen values; the norm stays."""
    flat = value.view(-1)
    flat[flat.abs().topk(16).indices] *= -1


def _second_time(trainer: Trainer, action: Callable[[], None]) -> None:
    """Act before the second computation of the next check."""
    original, calls = trainer.rerun._compute, []

    def compute(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            action()
        return original(*args, **kwargs)

    trainer.rerun._compute = compute  # type: ignore[method-assign]


def _take(trainer: Trainer, steps: int) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for _ in range(steps):
        record = trainer.train_step()
        trainer.step += 1
    return record


def _until_named(trainer: Trainer, rank: int, what: str) -> dict[str, Any]:
    """Take steps until a rank is said to be slow in something; on all ranks alike."""
    assert trainer.stragglers is not None
    record: dict[str, Any] = {}
    for _ in range(_ATTEMPTS):
        record = _take(trainer, 2)
        if f"slow in {what}: rank {rank} (" in trainer.stragglers.said:
            break
    return record


def run_layout(folder: Path, name: str) -> dict[str, Any]:
    rank = int(os.environ["RANK"])
    config = from_dict(_settings(folder, LAYOUTS[name]), name)
    trainer = start_training(open_session(make_plan(config, 2)), began=time.monotonic())
    assert trainer.stragglers is not None
    computing: list[bool] = []
    layer = trainer.chunks[0].decoder.layers[0]
    layer.register_forward_pre_hook(_while_active(computing, lambda: time.sleep(_SECONDS)))
    trainer._waits.open()

    # The first step does more than others.
    _take(trainer, 2)
    computing[:] = [True] if rank == COMPUTES_SLOWLY else []
    found: dict[str, Any] = {"computing": _until_named(trainer, COMPUTES_SLOWLY, "forward and backward")}
    found["said of computing"] = trainer.stragglers.said
    computing.clear()
    data, samples = trainer.session.data.train, trainer.session.data.train.samples

    def slowly(numbers: Any) -> Any:
        time.sleep(_SECONDS)
        return samples(numbers)

    if rank == READS_SLOWLY:
        data.samples = slowly  # type: ignore[method-assign]
    found |= {"reading": _until_named(trainer, READS_SLOWLY, "reading its samples")}
    found["said of reading"] = trainer.stragglers.said
    trainer._waits.close()

    # The first check finds nothing, the next one will.
    trainer.rerun._interval = 1
    _take(trainer, 1)
    changes: list[Callable[[torch.Tensor], None]] = []

    def changed(_module: Any, _inputs: Any, output: Any) -> Any:
        if not changes:
            return None
        value = output[0].clone()
        with torch.no_grad():
            changes[-1](value)
        return value, *output[1:]

    linear = trainer.chunks[-1].decoder.layers[-1].self_attention.linear_qkv
    linear.register_forward_hook(changed)

    def change(what: Callable[[torch.Tensor], None]) -> None:
        changes.clear()
        if rank == COMPUTES_WRONG:
            _second_time(trainer, lambda: changes.append(what))

    change(_flip)
    try:
        _take(trainer, 1)
    except PlatformError as error:
        found["error"] = str(error)
    # The same step again, with on_rerun_mismatch=continue.
    trainer.rerun._stops = False
    change(_flip)
    with said() as stream:
        found["step"] = _take(trainer, 1)["step"]
    found["warning"] = stream.getvalue()
    # As on CUDA, where kernels add in any order: rounding passes, what is more does not.
    trainer.rerun._bound = _BOUND_FP32
    values = _compared_values(trainer)
    for name, what in (("rounded", _round), ("negated", _negate)):
        change(what)
        with said() as stream:
            _take(trainer, 1)
        found[name] = stream.getvalue()
    changes.clear()
    # The first stage tells the places.
    every = all_gather_objects(values["places"])
    places = values["places"] or max(every)
    counted = _counted_values(trainer, places)
    return {**found, "values": all_gather_objects((values["values"] // 2, counted))}


def _counted_values(trainer: Trainer, places: int) -> int:
    """How many values the memory estimate counts for a rank's part of a micro batch."""
    config, shape, parallel = trainer.config, trainer.session.plan.shape, trainer.parallel
    tokens = places * parallel.context_size * (parallel.tensor_size if parallel.sequence_parallel else 1)
    sizes = {"tokens": tokens, "num_microbatches": 2, "stage": parallel.pipeline_rank, "on_cuda": True}
    found = StageMemory.of(shape, config, parallel, **sizes)  # type: ignore[arg-type]
    return round(found.records / 2 / rerun.RECORD_BYTES)


def _compared_values(trainer: Trainer) -> dict[str, int]:
    """How many values the next check computes, twice, and the places of the micro batch, where the rank has the embedding."""
    original, found = rerun.Record.add, {"values": 0, "places": 0}

    def add(self: rerun.Record, place: rerun.Place, value: torch.Tensor) -> None:
        found["values"] += value.numel()
        if place.name == "the output of embedding.embedding_dropout":
            found["places"] = max(found["places"], value.shape[0])
        original(self, place, value)

    rerun.Record.add = add  # type: ignore[method-assign]
    _take(trainer, 1)
    rerun.Record.add = original  # type: ignore[method-assign]
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    process_groups.start_processes(5)
    found = {}
    for name in LAYOUTS:
        found[name] = run_layout(folder, name)
        destroy_groups()
    if int(os.environ["RANK"]) == 0:
        (folder / "found.json").write_text(json.dumps(found))
    process_groups.stop_processes()


if __name__ == "__main__":
    run_or_fail(main)
