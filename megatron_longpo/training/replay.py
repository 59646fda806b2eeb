"""Computes a step of a run again: the values of its samples, and the first place where a value is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_longpo.config import Config
from megatron_longpo.errors import DataError
from megatron_longpo.model.gpt import PolicyModel
from megatron_longpo.runs.records import METRICS, read_metric_lines
from megatron_longpo.runtime.collectives import all_gather_objects, on_rank0
from megatron_longpo.runtime.log import log
from megatron_longpo.training.checkpointer import Checkpointer
from megatron_longpo.training.metrics import reduce_samples
from megatron_longpo.training.optimization import gather_weights
from megatron_longpo.training.plan import make_plan
from megatron_longpo.training.plausibility import first_not_finite
from megatron_longpo.training.session import open_session
from megatron_longpo.training.trainer import Trainer


@dataclass(frozen=True)
class Replay:
    """A step that was computed again; the same on all ranks.

    Attributes:
        step: the step, counted from 1.
        start: steps that the checkpoint had that it began from; 0: the weights that the run began from.
        means: means over the batch.
        samples: where each sample is and its own metrics, in the order of the batch.
        grad_norm: norm of the gradient, before clipping.
        not_finite: first place where a value is not finite, or None.
    """

    step: int
    start: int
    means: dict[str, float]
    samples: list[dict[str, Any]]
    grad_norm: float
    not_finite: str | None


def _skipped(output: Path) -> set[int]:
    """Steps that the run skipped; not those that a later launch has trained, of which a file may be left in its folder."""
    return {line.record["step"] for line in read_metric_lines(output / METRICS).lines if "skipped" in line.record}


def replay(config: Config, step: int) -> Replay:
    """Compute a step of a run again; its folder stays as it is. Collective.

    The steps between the newest checkpoint before it and the step are trained again, in memory; those that the run skipped are
    skipped.

    Args:
        config: the run's configuration; ``save`` is its folder.
        step: the step, counted from 1.

    Raises:
        LongPOError: there is no such step, or the run's checkpoints or data cannot be used.
    """
    plan = make_plan(config, dist.get_world_size())
    if not 1 <= step <= plan.train_iters:
        raise DataError(
            f"step {step} is not one of the run's {plan.train_iters} steps; give one from 1 to {plan.train_iters}"
        )
    session = open_session(plan)
    session.score_reference()
    checkpointer = Checkpointer(plan, session.parallel, reference_weights=session.reference.weights)
    start = next(iter(checkpointer.steps_before(step)), 0)
    if not start:
        session.load_weights()
    trainer = Trainer(session, checkpointer, began=0.0, is_replay=True)
    if start:
        checkpointer.load_step(start, trainer.state)
    output = plan.output
    assert output is not None
    skipped = on_rank0(lambda: _skipped(output))
    for done in range(start, step - 1):
        trainer.step = done
        if done + 1 in skipped:
            trainer.scheduler.step(increment=1)
            trainer.guard.skip(done + 1)
        else:
            log(f"step {done + 1} is trained again", active=session.parallel.rank == 0)
            trainer.train_step()

    gather_weights(trainer.model)
    weights = first_not_finite(session.chunks)
    numbers = trainer.sampler.batch(step - 1)
    with _watching(session.chunks) as places:
        found = trainer.forward_backward(numbers)
    trainer.optimizer.prepare_grads()
    grad_norm = trainer.optimizer.get_grad_norm()
    return Replay(
        step=step,
        start=start,
        means=reduce_samples(found, len(numbers), session.parallel),
        samples=trainer.describe(numbers, found),
        grad_norm=grad_norm,
        not_finite=f"the weight {weights}" if weights else _first(places),
    )


@dataclass(frozen=True)
class _Place:
    """Where a value was not finite: in the backward or not, how many values were looked at before on that rank, and its name."""

    is_backward: bool
    order: int
    name: str


def _first(places: Sequence[_Place]) -> str | None:
    """The first place of all ranks, forward before backward; collective."""
    mine = min(places, key=lambda p: (p.is_backward, p.order), default=None)
    found = [(p.is_backward, p.order, rank, p.name) for rank, p in enumerate(all_gather_objects(mine)) if p is not None]
    if not found:
        return None
    # Stages of a pipeline follow each other by rank, in the backward the other way round.
    is_backward, _, rank, name = min(found, key=lambda f: (f[0], -f[2] if f[0] else f[2], f[1]))
    return f"{'the gradient of ' if is_backward else ''}{name} on rank {rank}"


@contextmanager
def _watching(chunks: Sequence[PolicyModel]) -> Iterator[list[_Place]]:
    """Note what modules give that is not finite, and gradients of what they gave."""
    places: list[_Place] = []
    looked_at = 0

    def look(x: Tensor, name: str, *, is_backward: bool) -> None:
        nonlocal looked_at
        looked_at += 1
        if not any(p.is_backward == is_backward for p in places) and not x.isfinite().all():
            places.append(_Place(is_backward, looked_at, name))

    def hook(name: str) -> Callable[..., None]:
        def after(_module: Any, _inputs: Any, output: Any) -> None:
            for x in output if isinstance(output, tuple | list) else [output]:
                if isinstance(x, Tensor) and x.is_floating_point():
                    look(x.detach(), f"the output of {name}", is_backward=False)
                    if x.requires_grad:
                        x.register_hook(lambda g: look(g, f"the output of {name}", is_backward=True))

        return after

    handles = [
        module.register_forward_hook(hook(name or "the model"))
        for chunk in chunks
        for name, module in chunk.named_modules()
    ]
    try:
        yield places
    finally:
        for handle in handles:
            handle.remove()


def lines_of(result: Replay) -> list[str]:
    """What people are told of it."""
    names = [name for name in ("loss", "nll", "preference", "logps/chosen", "logps/rejected") if name in result.means]
    lines = [
        f"step {result.step}, from {f'the checkpoint after step {result.start}' if result.start else 'the first weights'}"
    ]
    for sample in result.samples:
        values = ", ".join(f"{name} {sample[name]:.6g}" for name in names)
        bad = "" if all(math.isfinite(sample[name]) for name in names) else "  <- not finite"
        lines.append(f"{sample['data']} sample {sample['sample']}: {values}{bad}")
    lines.append(f"mean: {', '.join(f'{n} {result.means[n]:.6g}' for n in names)}, grad norm {result.grad_norm:.6g}")
    lines.append(
        "all values are finite"
        if result.not_finite is None
        else f"the first value that is not finite is in {result.not_finite}"
    )
    return lines
