"""The best plans, checked by the real step on simulated GPUs: peak memory, operations and what the step takes by them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_longpo.planner.search import Plan, Search
from megatron_longpo.simulation.request import Card, Request
from megatron_longpo.simulation.start import simulate

_GIB = 2**30


@dataclass(frozen=True)
class Verified:
    """A plan beside its simulation.

    Attributes:
        layout: the plan's layout.
        stage: pipeline stage of the rank that was simulated.
        estimate_bytes, peak_bytes: peak of the tensors, as planned and as simulated.
        tflop, planned_tflop: operations of the rank, as simulated and as planned.
        fits: whether the simulated peak is within what may be used.
        violations: what kernels and collectives would not take.
    """

    layout: str
    stage: int
    estimate_bytes: int
    peak_bytes: int
    tflop: float
    fits: bool
    violations: tuple[str, ...]

    def __str__(self) -> str:
        change = self.estimate_bytes / self.peak_bytes - 1
        broken = f"; not taken by a kernel: {'; '.join(self.violations)}" if self.violations else ""
        return (
            f"simulated: {self.layout}, stage {self.stage}: peak {self.peak_bytes / _GIB:.2f} GiB, estimate {change:+.1%}, "
            f"{self.tflop:,.4g} TFLOP per step and rank, {'fits' if self.fits else 'does not fit'}{broken}"
        )


def verify(plans: Sequence[Plan], search: Search, *, length: int | None, answer: int, turns: int) -> list[Verified]:
    """Simulate the rank of each plan that is the fullest.

    Args:
        plans: plans.
        search: what was planned.
        length, answer, turns: the made-up rows, or length None for those of the configuration's data.

    Raises:
        PlatformError: this machine cannot simulate.
    """
    requests = [
        request_of(plan, search, plan.memory.stage, length=length, answer=answer, turns=turns) for plan in plans
    ]
    card = Card(memory_bytes=int(search.machine.memory_bytes), per_node=search.machine.gpus_per_node)
    found = []
    for plan, report in zip(plans, simulate(requests, card, quiet=True), strict=True):
        found.append(
            Verified(
                layout=plan.describe(),
                stage=plan.memory.stage,
                estimate_bytes=int(plan.memory.total),
                peak_bytes=report.peak_bytes,
                tflop=sum(report.flops.values()) * plan.candidate.micro_batches / report.micro_batches / 1e12,
                fits=report.peak_bytes <= search.usable_bytes,
                violations=tuple(str(row["problem"]) for row in report.violations),
            )
        )
    return found


def request_of(plan: Plan, search: Search, stage: int, *, length: int | None, answer: int, turns: int) -> Request:
    """What the simulator is asked: the first rank of a pipeline stage."""
    per_stage = search.world_size // plan.candidate.parallel.pipeline_size
    return Request(
        config=plan.config.as_dict(),
        world_size=search.world_size,
        rank=stage * per_stage,
        shape=dataclasses.asdict(search.shape),
        tokens=length,
        answer_tokens=answer,
        turns=turns,
    )
