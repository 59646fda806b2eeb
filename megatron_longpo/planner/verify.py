"""The best plans, checked by the real step on simulated GPUs: peak memory, operations and what the step takes by them."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_longpo.planner.machine import Curve, Machine
from megatron_longpo.planner.search import Plan, Search
from megatron_longpo.planner.timing import Groups, TimeModel, dtype_of
from megatron_longpo.simulation.request import Card, Report, Request
from megatron_longpo.simulation.start import simulate

_GIB = 2**30


@dataclass(frozen=True)
class Verified:
    """A plan beside its simulation.

    Attributes:
        layout: the plan's layout.
        stage: pipeline stage of the rank that was simulated.
        estimate_bytes, peak_bytes: peak of the tensors, as planned and as simulated.
        tflop: operations of the rank in a step, as simulated.
        seconds, planned_seconds: time of a step by what was simulated and as planned.
        fits: whether the simulated peak is within what may be used.
        violations: what kernels and collectives would not take.
    """

    layout: str
    stage: int
    estimate_bytes: int
    peak_bytes: int
    tflop: float
    seconds: float
    planned_seconds: float
    fits: bool
    violations: tuple[str, ...]

    def __str__(self) -> str:
        change = self.estimate_bytes / self.peak_bytes - 1
        broken = f"; not taken by a kernel: {'; '.join(self.violations)}" if self.violations else ""
        return (
            f"simulated: {self.layout}, stage {self.stage}: peak {self.peak_bytes / _GIB:.2f} GiB, estimate {change:+.1%}, "
            f"{self.tflop:,.4g} TFLOP per step and rank, {self.seconds:.4g} s by what was simulated (planned "
            f"{self.planned_seconds:.4g}), {'fits' if self.fits else 'does not fit'}{broken}"
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
    card = card_of(search.machine)
    found = []
    for plan, report in zip(plans, simulate(requests, card, quiet=True), strict=True):
        found.append(
            Verified(
                layout=plan.describe(),
                stage=plan.memory.stage,
                estimate_bytes=int(plan.memory.total),
                peak_bytes=report.peak_bytes,
                tflop=sum(report.flops.values()) * plan.candidate.micro_batches / report.micro_batches / 1e12,
                seconds=simulated_seconds(plan, search, report, stage=plan.memory.stage),
                planned_seconds=plan.seconds,
                fits=report.peak_bytes <= search.usable_bytes,
                violations=tuple(str(row["problem"]) for row in report.violations),
            )
        )
    return found


def card_of(machine: Machine) -> Card:
    """The simulated GPU of a machine. Nothing simulates a CPU: for one it is a GPU with its memory."""
    card = Card(memory_bytes=int(machine.memory_bytes), per_node=machine.gpus_per_node)
    if machine.compute_capability is None:
        return card
    major, minor = divmod(round(10 * machine.compute_capability), 10)
    return dataclasses.replace(card, capability=(major, minor))


def simulated_seconds(plan: Plan, search: Search, report: Report, *, stage: int) -> float:
    """Time of a step by the operations and bytes that were simulated of one stage, at the machine's rates.

    Each part that the plan has is scaled by what was simulated over what was planned. What was not planned at all goes at the
    rate of a product or of the group's link, none of it hidden. Parts that a simulation does not count (element-wise work, the
    optimizer, the fill of a pipeline) stay.

    Args:
        plan: the plan.
        search: what was planned.
        report: what was simulated.
        stage: pipeline stage of the rank that was simulated.
    """
    few = dataclasses.replace(plan.candidate, micro_batches=report.micro_batches)
    recompute, steps = plan.recompute, plan.candidate.micro_batches / report.micro_batches
    planned, operations, exchanges = (
        TimeModel(machine, search.shape, search.workload).step(
            candidate,
            up=recompute.up,
            whole_layers=recompute.whole_layers,
            offloaded=recompute.offloaded,
            host_optimizer=recompute.host_optimizer,
            stage=stage,
        )
        for machine, candidate in ((search.machine, plan.candidate), *((unit, few) for unit in units(search.machine)))
    )
    sent: collections.Counter[str] = collections.Counter()
    for row in report.exchanges:
        sent[row["group"]] += row["bytes"]
    flops = report.flops
    computed = flops.get("linear layers", 0) + flops.get("attention", 0)
    counted = sum(operations.parts[name] for name in ("linear", "attention", "recompute"))
    parts = dict(planned.parts)
    for name in ("linear", "attention", "recompute"):
        parts[name] *= computed / counted
    dtype = dtype_of(plan.config)
    rate = search.machine.logprob_flops_per_s(dtype, rows=report.tokens, width=search.shape.hidden_size)
    parts["log-probs"] = _seconds(
        parts["log-probs"],
        found=flops.get("log-probs", 0),
        planned=operations.parts["log-probs"],
        alone=steps * flops.get("log-probs", 0) / rate,
    )
    groups = Groups.of(plan.candidate, search.machine)
    for name, key, group, times in (
        ("TP exchange", "tp", groups.tensor, steps),
        ("CP exchange", "cp", groups.context, steps),
        ("DP exchange", "dp_cp", groups.shards, 1.0),
    ):
        # A gather of the whole sends (n - 1) / n of it.
        whole = sent[key] * group.size / max(1, group.size - 1)
        parts[name] = _seconds(
            parts[name], found=sent[key], planned=exchanges.parts[name], alone=times * group.gather(whole)
        )
    return sum(parts.values())


def _seconds(seconds: float, *, found: float, planned: float, alone: float) -> float:
    """Seconds of what was found.

    Args:
        seconds: those that were planned.
        found, planned: operations or bytes.
        alone: seconds of what was found if nothing was planned.
    """
    return seconds * found / planned if planned else alone


def units(machine: Machine) -> tuple[Machine, Machine]:
    """Machines on which seconds are operations, and on which they are bytes that a rank sends, none of them hidden."""
    fast = 1e30
    flat: dict[str, Curve] = dict.fromkeys(machine.linear_efficiency, ((1.0, 1.0),))
    plain = dataclasses.replace(
        machine,
        device="cpu",
        memory_gb_per_s=fast,
        elementwise_efficiency={},
        optimizer_gb_per_s=None,
        fresh_gb_per_s=None,
        logits_g_per_s={},
        linear_efficiency=flat,
        logprob_efficiency={},
        linear_width_efficiency=((1.0, 1.0),),
        attention_forward_efficiency=flat,
        attention_backward_efficiency=flat,
        node_link_latency_us=0.0,
        network_latency_us=0.0,
        operator_us=0.0,
        straggler_slowdown=0.0,
    )
    operations = dataclasses.replace(
        plain, peak_tflops=dict.fromkeys(flat, 1e-12), node_link_gb_per_s=fast, network_gb_per_s=fast
    )
    # One node, so that all bytes go over one link.
    exchanges = dataclasses.replace(
        plain,
        peak_tflops=dict.fromkeys(flat, fast),
        node_link_gb_per_s=1e-9,
        network_gb_per_s=1e-9,
        gpus_per_node=2**30,
    )
    return operations, exchanges


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
