"""What limits a plan, why another is worse, and what would help where nothing fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from megatron_longpo.config import Config
from megatron_longpo.errors import ConfigError
from megatron_longpo.planner.machine import load_machine, machine_names
from megatron_longpo.planner.search import Plan, Search
from megatron_longpo.planner.timing import Groups

_GIB = 2**30
# Parts that are told of when they differ.
_MOST = 3
_COMPUTING = ("linear", "attention", "log-probs", "element-wise", "recompute")


def limits(plan: Plan, search: Search) -> str:
    """What a plan is limited by: the largest part of its time, what that comes from, and its memory if it is short."""
    parts, total = plan.time.parts, plan.seconds
    computing = sum(parts[name] for name in _COMPUTING)
    name, seconds = max(parts.items(), key=lambda item: item[1])
    words = f"{name} {seconds / total:.0%}"
    if computing < 0.5 * total and name in _COMPUTING:
        name, seconds = max(((n, s) for n, s in parts.items() if n not in _COMPUTING), key=lambda item: item[1])
        words = f"{name} {seconds / total:.0%}"
    groups, parallel = Groups.of(plan.candidate, search.machine), plan.candidate.parallel
    where = {
        "TP exchange": groups.tensor,
        "CP exchange": groups.context,
        "PP exchange": groups.pipeline,
        "DP exchange": groups.shards,
    }
    if name in where:
        words += f" over {where[name].link}"
    elif name == "bubble":
        words += f": {plan.candidate.micro_batches} micro batch(es) for {parallel.pipeline_size} stages"
    elif name == "launches":
        words += ": work too small for the GPU"
    elif name == "host copies" or (name == "optimizer" and plan.recompute.host_optimizer):
        words += f": {_waits_for(plan)} in host memory"
    share = plan.memory.total / search.usable_bytes
    if plan.recompute.whole_layers or share > 0.9:
        words += f"; memory {share:.0%} of what may be used"
    return words


def _waits_for(plan: Plan) -> str:
    waiting = [f"activations of {plan.recompute.offloaded} layer(s) per stage"] * (plan.recompute.offloaded > 0)
    return " and ".join([*waiting, *["the optimizer"] * plan.recompute.host_optimizer])


def difference(plan: Plan, other: Plan) -> str:
    """Why a plan is slower than another: the parts that grow most, in seconds per step, and what shrinks instead."""
    changes = {name: seconds - other.time.parts[name] for name, seconds in plan.time.parts.items()}
    total = plan.seconds - other.seconds
    told = sorted(changes.items(), key=lambda item: -abs(item[1]))
    told = [(name, change) for name, change in told if abs(change) > max(0.05 * abs(total), 1e-3 * other.seconds)][
        :_MOST
    ]
    if not told:
        return "small differences in all parts"
    return ", ".join(f"{name} {change:+.{_digits(change)}f} s" for name, change in told)


def _digits(seconds: float) -> int:
    return 1 if abs(seconds) >= 10 else 2 if abs(seconds) >= 0.1 else 4


def scale_limits(plan: Plan, search: Search) -> list[str]:
    """What keeps a larger world from being faster, as far as it can be seen from the best plan; a line each."""
    lines = []
    config, parallel = plan.config, plan.candidate.parallel
    total, parts = plan.seconds, plan.time.parts
    computing = sum(parts[name] for name in _COMPUTING)
    if search.world_size > 1 and computing < 0.6 * total:
        lines.append(f"only {computing / total:.0%} of the step is computing: more GPUs would hardly make it faster")
    if (
        parallel.data_size * config.training.micro_batch_size == config.training.global_batch_size
        and computing < 0.8 * total
    ):
        lines.append(
            f"data parallelism is at its limit, global_batch_size={config.training.global_batch_size}; a larger batch would "
            "leave less to the other kinds of parallelism"
        )
    if parts["bubble"] > 0.1 * total:
        lines.append(
            f"the pipeline waits {parts['bubble'] / total:.0%} of the step: {plan.candidate.micro_batches} micro batch(es) for "
            f"{parallel.pipeline_size} stages; a larger global_batch_size would fill it"
        )
    heads = search.shape.num_query_groups
    if parallel.tensor_size == heads and parts["CP exchange"] > 0.1 * total:
        lines.append(f"tensor parallelism is at its limit, {heads} key-value heads")
    return lines


@dataclasses.dataclass(frozen=True)
class Remedy:
    """Something that would make the run fit.

    Attributes:
        what: in words.
        plan: the fastest plan with it.
    """

    what: str
    plan: Plan


def remedies(search: Search) -> Iterator[Remedy]:
    """What would make a run fit that does not."""
    for what, config in _settings(search.config):
        yield from _try(what, dataclasses.replace(search, config=config))
    for factor in (2, 4, 8, 16, 32, 64):
        world = search.world_size * factor
        found = list(_try(f"{world} GPUs", dataclasses.replace(search, world_size=world)))
        if found:
            yield from found
            break
    larger = [load_machine(name) for name in machine_names()]
    larger = [m for m in larger if m.device == "cuda" and m.memory_gib > search.machine.memory_gib]
    for machine in sorted(larger, key=lambda m: m.memory_gib):
        found = list(
            _try(f"{machine.name} ({machine.memory_gib:.0f} GiB)", dataclasses.replace(search, machine=machine))
        )
        if found:
            yield from found
            break
    if search.given:
        yield from _try(
            "leaving the settings that were fixed to the planner", dataclasses.replace(search, given=frozenset())
        )


def _settings(config: Config) -> Iterator[tuple[str, Config]]:
    """Settings that take less memory."""
    training, parallel, optimizer = config.training, config.parallel, config.optimizer
    if not training.bf16:
        yield "bf16", dataclasses.replace(config, training=dataclasses.replace(training, bf16=True))
    if optimizer.optimizer == "adam":
        lighter = dataclasses.replace(config, optimizer=dataclasses.replace(optimizer, optimizer="rmsprop"))
        yield "optimizer=rmsprop", lighter
    if training.bf16 and not parallel.grad_reduce_in_bf16:
        changed = dataclasses.replace(parallel, grad_reduce_in_bf16=True)
        yield "grad_reduce_in_bf16", dataclasses.replace(config, parallel=changed)
    if config.reference.reference == "online":
        cached = dataclasses.replace(config.reference, reference="cached", reference_model="swapped")
        yield "reference=cached", dataclasses.replace(config, reference=cached)
    if not config.data.prefix_sharing:
        yield "prefix_sharing", dataclasses.replace(config, data=dataclasses.replace(config.data, prefix_sharing=True))


def _try(what: str, search: Search) -> Iterator[Remedy]:
    try:
        best = search.best(1)
    except ConfigError:
        return
    if best:
        yield Remedy(what, best[0])
