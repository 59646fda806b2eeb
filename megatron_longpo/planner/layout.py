"""The planner in training: a layout for the world that a run finds, and the next one where memory was not enough.

Every rank plans for itself, before any process group exists. So that all find the same, nothing is measured here: the card's name
and its whole memory count, and the configuration.
"""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

import torch

from megatron_longpo.checkpoint.folders import resolve
from megatron_longpo.config import Config, changed_fields, check, data_sources, from_dict, read_yaml
from megatron_longpo.data.indexed import read_manifest
from megatron_longpo.errors import ConfigError
from megatron_longpo.model.shape import ModelShape
from megatron_longpo.planner.explain import difference, limits
from megatron_longpo.planner.machine import Machine, load_machine, machine_names
from megatron_longpo.planner.search import USABLE, Plan, Search
from megatron_longpo.planner.space import CHOSEN, LAYOUT, RECOMPUTE
from megatron_longpo.planner.workload import made_up
from megatron_longpo.runtime import platform
from megatron_longpo.runtime.log import log

_GIB = 2**30
# Machines whose rates stand for a card that has no file, and for any CPU.
_UNKNOWN, _CPU = "a100-80g", "cpu"
# How much less than the layout that did not fit the next one must take.
_LESS = 0.85
# Tokens of the answers of made-up rows.
_ANSWER = 512
# What one core of the host reads and writes in an optimizer's update: torch's Adam of 2^25 weights, 72 bytes each (timing.py),
# took 0.12 s of a core of an EPYC of the fifth generation (torch 2.13); its AdamW reached 31 GB/s, with 2^22 weights both 28.
_CORE_GB_PER_S = 20.0


def auto_layout(config: Config, world_size: int, given: frozenset[str]) -> Config:
    """Choose what is left open of a run's layout.

    Args:
        config: configuration with ``auto_layout``.
        world_size: number of processes.
        given: fields that keep their value.

    Returns:
        The configuration with the fastest layout that fits. What is recomputed is left to the trainer unless it is given.

    Raises:
        LongPOError: no layout fits, or the configuration cannot be used.
    """
    check(config)
    search = _search(config, world_size, given)
    best = search.best(2)
    if not best:
        closest = search.closest()
        raise ConfigError(
            f"auto_layout: no layout of {world_size} x {search.machine.name} has room for rows of "
            f"{search.workload.longest.chosen:,} tokens; the closest, {closest.describe()}, needs "
            f"{search.needs(closest.memory)}; megatron-longpo plan says what would fit"
        )
    first = os.environ.get("RANK", "0") == "0"
    chosen = best[0]
    layout = chosen.candidate.describe()
    if chosen.recompute.host_optimizer:
        layout += "; optimizer in host memory (optimizer_cpu_offload)"
    why = f"{chosen.seconds:.3g} s per step expected, {chosen.memory.total / _GIB:.1f} GiB, limited by {limits(chosen, search)}"
    if len(best) > 1:
        why += f"; next {best[1].candidate.describe()}, slower by {difference(best[1], chosen)}"
    log(f"layout: {layout}, planned for {world_size} x {search.machine.name} ({why})", active=first)
    training = chosen.config.training
    if config.training.recompute_granularity == "auto" or not given.intersection(RECOMPUTE):
        # The trainer sees the memory that is free.
        own = {name: getattr(config.training, name) for name in (*RECOMPUTE, "cpu_offloading_num_layers")}
        training = dataclasses.replace(training, **own)
    parallel = dataclasses.replace(chosen.config.parallel, auto_layout=False)
    return dataclasses.replace(chosen.config, parallel=parallel, training=training)


def given_in(path: str) -> frozenset[str]:
    """Fields that a YAML file gives: those that it writes.

    Of a file that writes every setting of the layout, as ``--print-config`` does, they are those that differ from the defaults.

    Raises:
        ConfigError: the file cannot be read as a configuration.
    """
    content = read_yaml(path)
    changed = changed_fields(from_dict(content, f"--config {Path(path)}"))
    # "null" leaves a field open.
    sections = [section for section in (content or {}).values() if section]
    written = frozenset(name for section in sections for name, value in section.items() if value is not None)
    is_whole = {name for section in sections for name in section}.issuperset(LAYOUT)
    return changed if is_whole else changed | written


def next_layout(config: Config, world_size: int) -> str:
    """What to run where the memory was not enough: the fastest layout that takes clearly less, as flags of train.

    Raises:
        LongPOError: the configuration cannot be used.
    """
    search = _search(config, world_size, frozenset({"micro_batch_size"}))
    own = search.as_configured()
    limit = _LESS * own.memory.total
    smaller = dataclasses.replace(search.machine, memory_gib=limit / USABLE / _GIB, reserved_gib=0.0)
    search = dataclasses.replace(search, machine=smaller)
    found = search.best(1)
    if found:
        plan = found[0]
        return (
            f"the planner's next layout is {flags_of(plan, config)} ({plan.memory.total / _GIB:.1f} GiB estimated; this one: "
            f"{own.memory.total / _GIB:.1f})"
        )
    return (
        f"no layout of {world_size} processes takes clearly less than this one ({own.memory.total / _GIB:.1f} GiB estimated); "
        "megatron-longpo plan says what would fit"
    )


def flags_of(plan: Plan, config: Config) -> str:
    """Flags of train that make a configuration a plan's."""
    changed = []
    for section in ("parallel", "training", "optimizer"):
        new, old = getattr(plan.config, section), getattr(config, section)
        for name in CHOSEN:
            if hasattr(new, name) and getattr(new, name) != getattr(old, name):
                changed.append(_flag(name, getattr(new, name)))
    return " ".join(changed)


def _flag(name: str, value: object) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    if isinstance(value, tuple):
        return f"--{flag} {' '.join(map(str, value))}"
    return f"--{flag} {value}"


def _search(config: Config, world_size: int, given: frozenset[str]) -> Search:
    if config.checkpoint.load is None:
        raise ConfigError("load is not given; name a converted checkpoint with --load CKPT")
    shape = ModelShape.read(resolve(config.checkpoint.load, weights=False))
    path = config.data.data_path or config.data.valid_data_path
    if path is None:
        raise ConfigError("data_path is not given; name the prefix of preprocessed data with --data-path PREFIX")
    manifests = [read_manifest(source.prefix) for source in data_sources(path)]
    longest = max(manifest.longest for manifest in manifests)
    # Only the longest row: reading the data takes a minute where there are many samples.
    workload = made_up(
        config,
        shape,
        length=max(longest, 2 * _ANSWER),
        answer=min(_ANSWER, max(1, longest // 4)),
        turns=1,
        short=max(1, max(manifest.longest_short for manifest in manifests)),
        samples=sum(manifest.samples for manifest in manifests),
    )
    return Search(config, shape, machine_here(), world_size, workload, given)


def machine_here() -> Machine:
    """The machine that this process runs on: rates by the card's name, memory of the card and of the host as they are."""
    facts, is_cuda = platform.CURRENT.facts(), platform.CURRENT.is_cuda
    name = machine_of(facts.name) if is_cuda else _CPU
    machine = load_machine(name or _UNKNOWN)
    share = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    memory = facts.memory_bytes / (1 if is_cuda else share) / _GIB
    reserved = machine.reserved_gib if is_cuda else min(machine.reserved_gib, memory / 10)
    named = machine.name if name is not None else f"{facts.name} (rates of {_UNKNOWN})"
    return dataclasses.replace(
        machine,
        name=named,
        memory_gib=memory,
        reserved_gib=reserved,
        gpus_per_node=share,
        host_memory_gib=platform.CURRENT.host_memory_size() / share / _GIB,
        # Files are for as many threads as cores, and torchrun sets one.
        host_update_gb_per_s=min(machine.host_update_bytes_per_s / 1e9, _CORE_GB_PER_S * torch.get_num_threads()),
    )


def machine_of(device: str) -> str | None:
    """The machine that a device's name belongs to, such as "NVIDIA H100 80GB HBM3" to h100-sxm; None: there is no file."""
    words = re.split(r"[\s-]+", device.lower())
    scores: dict[str, int] = {}
    for name in machine_names():
        card, *kinds = name.split("-")
        # A maker's word such as "rtx" is on many cards: the number must be there, too.
        if {card, *(kind for kind in kinds if kind.isdigit())} <= set(words):
            # "80g" is found in "80GB", "sxm" in "SXM4"; a card that does not say is no PCIe card.
            scores[name] = sum(1 if any(w.startswith(kind) for w in words) else -(kind == "pcie") for kind in kinds)
    return max(scores, key=lambda name: scores[name], default=None)
