"""A plan in lines, as plan.json and as a YAML file that train takes."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from megatron_longpo.config import Config
from megatron_longpo.planner.costs import RunCost
from megatron_longpo.planner.explain import Remedy, difference, limits, scale_limits
from megatron_longpo.planner.search import Plan, Search
from megatron_longpo.planner.verify import Verified

SCHEMA_VERSION = 1
_GIB = 2**30


@dataclass(frozen=True)
class Result:
    """Everything that was found.

    Attributes:
        search: what was planned.
        plans: best plans, fastest first; none if nothing fits.
        own: the configuration's own layout, if it has one that is not among the best.
        closest: where nothing fits, the plan that takes least memory.
        remedies: where nothing fits, what would.
        cost: what a run by the best plan takes; None if the number of samples is not known.
        verified: the best plans simulated, if that was asked for.
        seconds: how long it took to plan.
    """

    search: Search
    plans: list[Plan]
    own: Plan | None = None
    closest: Plan | None = None
    remedies: list[Remedy] = field(default_factory=list)
    cost: RunCost | None = None
    verified: list[Verified] = field(default_factory=list)
    seconds: float = 0.0

    def tokens_per_second(self, plan: Plan) -> float:
        """Tokens of the chosen rows, as metrics.jsonl counts them."""
        return self.search.workload.mean.chosen * plan.config.training.global_batch_size / plan.seconds

    def as_dict(self) -> dict[str, Any]:
        """Content of plan.json (docs/formats.md)."""
        search, machine = self.search, self.search.machine
        content: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "machine": machine.name,
            "gpus": search.world_size,
            "gpus_per_node": machine.gpus_per_node,
            "memory_bytes": int(machine.memory_bytes),
            "usable_bytes": int(search.usable_bytes),
            "rows": search.workload.source,
            "places": search.workload.longest.places,
            "pairs": search.workload.longest.pairs,
            "plans": [self._plan_dict(plan) for plan in self.plans],
            "seconds_to_plan": round(self.seconds, 2),
        }
        if self.own is not None:
            content["configured"] = self._plan_dict(self.own)
        if self.closest is not None:
            content["closest"] = self._plan_dict(self.closest)
            content["would_fit"] = [{"with": r.what, **self._plan_dict(r.plan)} for r in self.remedies]
        if self.plans:
            content["limits_of_scale"] = scale_limits(self.plans[0], search)
        if self.cost is not None:
            cost = self.cost
            content["run"] = {
                "steps": cost.steps,
                "seconds": {name: round(s, 1) for name, s in cost.seconds.items()},
                "hours": round(cost.hours, 2),
                "gpu_hours": round(cost.hours * cost.gpus, 1),
                "dollars": None if cost.dollars is None else round(cost.dollars),
                "save_interval": cost.save_interval,
                "checkpoint_seconds": round(cost.saving.save, 1),
                "hours_between_failures": _finite(cost.saving.mean_time / 3600),
                "lost_to_checkpoints_and_failures": round(cost.saving.lost_share, 5),
            }
        if self.verified:
            content["simulated"] = [dataclasses.asdict(v) for v in self.verified]
        return content

    def _plan_dict(self, plan: Plan) -> dict[str, Any]:
        return {
            "layout": plan.candidate.describe(),
            "recompute": str(plan.recompute),
            "step_seconds": float(f"{plan.seconds:.6g}"),
            "tokens_per_second": round(self.tokens_per_second(plan), 1),
            "seconds": {name: float(f"{s:.6g}") for name, s in plan.time.parts.items()},
            "peak_bytes": int(plan.memory.total),
            "bytes": {name: int(size) for name, size in plan.memory.parts().items()},
            "host_bytes": int(plan.memory.host),
            "stage_of_peak": plan.memory.stage,
            "limits": limits(plan, self.search),
            "slower_by": difference(plan, self.plans[0]) if self.plans and plan is not self.plans[0] else "",
            "parallel": _changed(plan.config.as_dict()["parallel"], Config().as_dict()["parallel"]),
            "training": _changed(plan.config.as_dict()["training"], Config().as_dict()["training"]),
            "optimizer": _changed(plan.config.as_dict()["optimizer"], Config().as_dict()["optimizer"]),
        }

    def as_json(self) -> str:
        return json.dumps(self.as_dict(), indent=1)


def _finite(number: float) -> float | None:
    return round(number, 2) if math.isfinite(number) else None


def _changed(section: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in section.items() if value != default[name]}


def train_yaml(result: Result, command: str) -> str:
    """The best plan as a configuration of train: what differs from the defaults, with the plan's figures in its head."""
    plan, search = result.plans[0], result.search
    config = plan.config
    if config.checkpoint.save_interval is None and result.cost is not None and result.cost.save_interval is not None:
        saving = dataclasses.replace(config.checkpoint, save_interval=result.cost.save_interval)
        config = dataclasses.replace(config, checkpoint=saving)
    values, defaults = config.as_dict(), Config().as_dict()
    sections = {name: _changed(values[name], defaults[name]) for name in values}
    peak = plan.memory.total / _GIB
    head = [
        f"# {plan.candidate.describe()} on {search.world_size} x {search.machine.name}; recompute {plan.recompute}.",
        f"# Planned for {search.workload.source}:",
        f"# {plan.seconds:.4g} s per step, {result.tokens_per_second(plan):.0f} tokens/s, peak {peak:.1f} GiB per GPU.",
        f"# {command}",
    ]
    body = yaml.safe_dump({name: section for name, section in sections.items() if section}, sort_keys=False)
    return "\n".join(head) + "\n" + body


def lines_of(result: Result) -> Iterator[str]:
    """What was found, for people."""
    search, machine = result.search, result.search.machine
    yield (
        f"{search.world_size} x {machine.name}, {machine.gpus_per_node} per node, {machine.memory_gib:.0f} GiB each, of which "
        f"{search.usable_bytes / _GIB:.1f} may be used; {search.workload.source}; planned in {result.seconds:.1f} s"
    )
    if result.own is not None:
        yield f"as configured: {_line(result, result.own)}"
    if not result.plans:
        yield from _nothing_fits(result)
        return
    best = result.plans[0]
    yield f"the best {len(result.plans)}, fastest first:"
    for number, plan in enumerate(result.plans, 1):
        yield (
            f"{number:3} {plan.seconds:9.4g} s/step {result.tokens_per_second(plan):10,.0f} tokens/s "
            f"{plan.memory.total / _GIB:6.1f} GiB  {plan.describe()}"
        )
        slower = "" if number == 1 else f"; slower by {difference(plan, best)}"
        yield f"      limited by {limits(plan, search)}{slower}"
    yield "seconds of the best: " + _parts(best.time.parts, best.seconds, 1.0, ".4g")
    yield f"GiB of the best (stage {best.memory.stage}): " + _parts(best.memory.parts(), best.memory.total, _GIB, ".2f")
    yield from scale_limits(best, search)
    if result.cost is not None:
        yield from _cost(result.cost)
    yield from map(str, result.verified)


def _line(result: Result, plan: Plan) -> str:
    search = result.search
    fits = "which fits" if search.fits(plan.memory) else f"which does not fit: {search.needs(plan.memory)}"
    return (
        f"{plan.describe()}: {plan.seconds:.4g} s per step, {result.tokens_per_second(plan):,.0f} tokens/s, "
        f"{plan.memory.total / _GIB:.1f} GiB, {fits}"
    )


def _parts(parts: Mapping[str, float], total: float, unit: float, form: str) -> str:
    shown = [(name, size) for name, size in parts.items() if size > 0.002 * total]
    return ", ".join(f"{name} {size / unit:{form}}" for name, size in sorted(shown, key=lambda item: -item[1]))


def _nothing_fits(result: Result) -> Iterator[str]:
    assert result.closest is not None
    memory = result.closest.memory
    yield f"nothing fits. Closest: {_line(result, result.closest)}"
    yield f"GiB (stage {memory.stage}): " + _parts(memory.parts(), memory.total, _GIB, ".2f")
    if not result.remedies:
        yield "neither other settings nor 64 times the GPUs nor shorter rows would make it fit"
    for remedy in result.remedies:
        yield f"would fit with {remedy.what}: {remedy.plan.describe()}, {remedy.plan.memory.total / _GIB:.1f} GiB"


def _cost(cost: RunCost) -> Iterator[str]:
    parts = ", ".join(f"{name} {seconds / 3600:.3g} h" for name, seconds in cost.seconds.items() if seconds)
    money = "" if cost.dollars is None else f", {cost.dollars:,.0f} dollars"
    yield f"the run: {cost.steps:,} steps, {cost.hours:,.3g} hours, {cost.hours * cost.gpus:,.4g} GPU hours{money} ({parts})"
    saving = cost.saving
    if math.isfinite(saving.mean_time):
        interval = f"every {cost.save_interval} step(s)" if cost.save_interval is not None else "at the end only"
        yield (
            f"a failure every {saving.mean_time / 3600:,.4g} hours on average: save {interval} (a checkpoint takes "
            f"{saving.save:.3g} s), which with failures costs {saving.lost_share:.2%} of the time"
        )
