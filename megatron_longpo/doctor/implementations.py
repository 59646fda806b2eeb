"""Local layers against Transformer Engine's: the same model, the same weights, one step with each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from megatron_longpo.doctor.examination import Check
from megatron_longpo.doctor.findings import Line
from megatron_longpo.doctor.ranks import Ranks
from megatron_longpo.doctor.steps import NOT_READY, Layout, Workshop, compared, layouts, numbers_of, quietly
from megatron_longpo.model.implementation import choose_layers
from megatron_longpo.runtime.machine_record import LAYERS
from megatron_longpo.runtime.process_groups import destroy_groups

NAME = "Transformer Engine's layers against local ones, bfloat16"
_REMEDY = "--transformer-impl local"


def implementation_check(workshop: Workshop) -> Check:
    """A step with Transformer Engine's layers, in the first layout that the ranks allow."""
    return Check(NAME, lambda ranks: _check(ranks, workshop), _REMEDY, LAYERS)


def _check(ranks: Ranks, workshop: Workshop) -> Iterator[Line]:
    choice = choose_layers("auto")
    if not choice.is_transformer_engine:
        yield Line(NAME, "skipped", choice.reason)
        return
    if not workshop.is_ready:
        yield Line(NAME, "skipped", NOT_READY)
        return
    yield from compare(ranks, workshop, layouts(ranks.world_size)[-1], "transformer_engine", torch.bfloat16)


def compare(
    ranks: Ranks, workshop: Workshop, layout: Layout, transformer_impl: str, dtype: torch.dtype
) -> Iterator[Line]:
    """A line on an implementation's step beside that of the local layers; collective."""
    found = {}
    for name in ("local", transformer_impl):
        ranks.at(f"a step with {name} layers")
        with quietly():
            trainer = workshop.trainer(layout, dtype, transformer_impl=name)
            found[name] = numbers_of(trainer)
            destroy_groups()
    if ranks.rank == 0:
        line = compared(NAME, found[transformer_impl], found["local"], dtype)
        yield dataclasses.replace(line, remedy=_REMEDY, kernel=LAYERS)
