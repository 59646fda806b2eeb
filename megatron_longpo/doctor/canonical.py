"""Whole tensors under Hugging Face's names, gathered from any layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

# isort: off
from megatron_longpo.runtime import platform as platform  # must precede megatron-core
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

# isort: on
from torch import Tensor

from megatron_longpo.model.families import entries_of
from megatron_longpo.model.gpt import PolicyModel
from megatron_longpo.model.shape import ModelShape
from megatron_longpo.runtime.process_groups import Parallel
from megatron_longpo.training.checkpointer import weights_state


def gather_gradient_shards(model: Sequence[Any]) -> None:
    """Make gradients whole: under the distributed optimizer each rank has only its shard of the reduced gradient."""
    for chunk in model:
        for buffer in chunk.buffers:
            if not buffer.ddp_config.use_distributed_optimizer:
                continue
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                shards = bucket.grad_data.view(dist.get_world_size(group), -1)
                mine = shards[dist.get_rank(group)].clone()
                dist.all_gather_into_tensor(bucket.grad_data, mine, group=group)


def _about(key: str) -> Callable[[str], str]:
    return lambda message: f"copies of {key}: {message}"


def canonical(
    chunks: Sequence[PolicyModel],
    shape: ModelShape,
    parallel: Parallel,
    value_of: Callable[[torch.nn.Parameter], Tensor],
) -> dict[str, Tensor]:
    """Gather whole tensors, on the host; collective.

    Args:
        chunks: this rank's chunks of a model.
        shape: its shape.
        parallel: its layout.
        value_of: tensor of a parameter, as large as the parameter: itself, or its gradient.

    Returns:
        Tensors by Hugging Face's names on rank 0; nothing elsewhere.

    Raises:
        AssertionError: on rank 0, if copies of a shard on several ranks differ.
    """
    kept = []
    for chunk in chunks:
        for parameter in chunk.parameters():
            kept.append((parameter, parameter.detach().clone()))
            with torch.no_grad():
                parameter.copy_(value_of(parameter))
    state = weights_state(chunks, parallel)
    apply_factories(state)
    shards = [
        (s.key, tuple(s.global_shape), tuple(s.global_offset), s.prepend_axis_num, s.data.detach().cpu().clone())
        for s in nested_values(state)
        if isinstance(s, ShardedTensor)
    ]
    for parameter, value in kept:
        with torch.no_grad():
            parameter.copy_(value)
    gathered: list[Any] = [None] * parallel.world_size
    dist.gather_object(shards, gathered if parallel.rank == 0 else None)
    if parallel.rank != 0:
        return {}
    whole: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    for key, size, offset, prepended, data in (s for rank in gathered for s in rank):
        data = data.reshape((1,) * prepended + tuple(data.shape))
        target = whole.setdefault(key, torch.zeros(size, dtype=data.dtype))
        filled = seen.setdefault(key, torch.zeros(size, dtype=torch.bool))
        here = tuple(slice(o, o + n) for o, n in zip(offset, data.shape, strict=True))
        if filled[here].any():
            torch.testing.assert_close(target[here], data, rtol=1e-5, atol=1e-7, msg=_about(key))
        target[here] = data
        filled[here] = True
    result = {}
    for entry in entries_of(shape):
        assert seen[entry.ours].all(), f"{entry.ours} is not whole"
        tensor = whole[entry.ours]
        if entry.is_vocabulary:
            tensor = tensor[: shape.vocab_size]
        for layer in range(shape.num_layers) if entry.stacked else (None,):
            ours = tensor if layer is None else tensor[layer]
            for name, value in zip(entry.names(layer), entry.split(ours, shape), strict=True):
                result[name] = value.clone()
    return result
