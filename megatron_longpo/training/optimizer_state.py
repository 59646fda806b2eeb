"""The optimizer's states in a checkpoint: each rank saves and loads exactly its own shards of them.

megatron-core's distributed optimizer cuts the flat buffer of all parameters into equal parts, so a rank has the range
[start, end) of a parameter's elements. Its own formats either follow the buffer (``dp_reshardable``: tensor and pipeline
parallelism cannot change), or make every state whole in each rank's host memory (``fully_reshardable``: 12 bytes per parameter
of the rank's model), or give flattened ranges to a library that no longer takes them (``fully_sharded_model_space``:
``flattened_range`` raises in 0.16.1 and 0.19.2).

Here a range becomes rectangles of the parameter: in two dimensions the end of its first row, whole rows, and the beginning of
its last row. They are stored under the keys and shapes of ``fully_reshardable``, so any layout reads them, earlier releases
included. A rectangle is a view of the state, so what is loaded arrives in its place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_longpo.training.optimization import wrappers_of

# Of fully_reshardable: "param" are the fp32 weights.
_KEY = "optimizer.state.{state}.{parameter}"
# Elements of a stored rectangle: 128 MiB of fp32, which is what a save or a load needs in host memory at once.
_LARGEST = 2**25


@dataclass(frozen=True)
class Rectangle:
    """A part of a tensor that is contiguous in memory.

    Attributes:
        offsets, sizes: its position and shape.
        start: index of its first element in the flattened tensor.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int

    @property
    def end(self) -> int:
        return self.start + math.prod(self.sizes)


def rectangles(shape: tuple[int, ...], start: int, end: int, largest: int = _LARGEST) -> Iterator[Rectangle]:
    """Cut elements [start, end) of a flattened tensor into rectangles, in order.

    Args:
        shape: shape of the tensor.
        start, end: range of elements.
        largest: most elements of a rectangle of several rows.
    """
    if start >= end:
        return
    if len(shape) == 1:
        yield Rectangle((start,), (end - start,), start)
        return
    row = math.prod(shape[1:])
    # Rows that are whole.
    first, last = -(-start // row), end // row
    if start < first * row:
        yield from _within_row(shape, first - 1, start, min(end, first * row))
    rows = max(1, largest // row)
    for top in range(first, last, rows):
        yield Rectangle((top, *(0 for _ in shape[1:])), (min(rows, last - top), *shape[1:]), top * row)
    if first <= last and last * row < end:
        yield from _within_row(shape, last, last * row, end)


def _within_row(shape: tuple[int, ...], index: int, start: int, end: int) -> Iterator[Rectangle]:
    base = index * math.prod(shape[1:])
    for inner in rectangles(shape[1:], start - base, end - base):
        yield Rectangle((index, *inner.offsets), (1, *inner.sizes), base + inner.start)


def optimizer_content(optimizer: MegatronOptimizer, weights: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    """Sharded state dictionary of an optimizer, whose tensors are the optimizer's own.

    Args:
        optimizer: megatron-core's optimizer, whose states exist.
        weights: sharded state dictionary of the model chunks, with the parameters themselves.
        is_loading: whether it is going to be loaded.
    """
    (wrapper,) = wrappers_of(optimizer)
    if not isinstance(wrapper, DistributedOptimizer):
        return dict(wrapper.sharded_state_dict(weights, is_loading=is_loading))
    common = wrapper.state_dict()
    if isinstance(wrapper.optimizer, HybridDeviceOptimizer):
        # Where states are is no part of a checkpoint.
        own = wrapper.optimizer.defaults.keys() - {"lr", "weight_decay", "betas", "eps"}
        groups = common["optimizer"]["param_groups"]
        common["optimizer"]["param_groups"] = [{k: v for k, v in g.items() if k not in own} for g in groups]
    return {
        **common,
        "param_state": dict(enumerate(_shards(wrapper, weights))),
        "param_state_sharding_type": "fully_reshardable",
    }


def load_optimizer(optimizer: MegatronOptimizer, loaded: dict[str, Any]) -> None:
    """Take over what was loaded into ``optimizer_content``."""
    (wrapper,) = wrappers_of(optimizer)
    if isinstance(wrapper.optimizer, HybridDeviceOptimizer):
        # The tensors were read into their places, and what else there is follows the configuration. megatron-core would take a
        # step with random gradients, and copy the weights anew.
        return
    if isinstance(wrapper, DistributedOptimizer):
        # The tensors were read into their places.
        loaded = {k: v for k, v in loaded.items() if not k.startswith("param_state")}
    wrapper.load_state_dict(loaded)


def _shards(wrapper: DistributedOptimizer, weights: dict[str, Any]) -> Iterator[dict[str, ShardedTensor]]:
    """Rectangles of this rank's shard of each parameter, by the states' names."""
    sharded, _ = extract_sharded_tensors_and_factories(weights)
    described = {base.data: base for base in nested_values(sharded)}
    for ranges in wrapper.gbuf_ranges:
        for buckets in ranges.values():
            for bucket in buckets:
                for parameter, places in bucket["param_map"].items():
                    states = wrapper._get_main_param_and_optimizer_states(parameter)
                    # A step count is not of the parameter's shape; it is saved with the groups.
                    shards = {name: value for name, value in states.items() if value.dim() == 1}
                    own = places["param"]
                    for part in _parts(described[parameter]):
                        yield from _of_part(part, parameter, shards, own.start, own.end)


def _parts(described: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    """A parameter as checkpoints have it: whole, or a gated MLP's first weight as gate and up."""
    built = described.build() if isinstance(described, ShardedTensorFactory) else described
    return list(nested_values(built)) if isinstance(built, dict | list) else [built]


def _of_part(
    part: ShardedTensor, parameter: Tensor, shards: dict[str, Tensor], start: int, end: int
) -> Iterator[dict[str, ShardedTensor]]:
    assert part.data is not None and part.data.is_contiguous()
    before = part.data.storage_offset() - parameter.storage_offset()
    shape = tuple(part.data.shape)
    inside = max(0, start - before), min(part.data.numel(), end - before)
    # The layers of a model are one tensor, whose first dimensions are not those of a layer's parameter.
    prepended = part.prepend_axis_num
    for r in rectangles(shape, *inside):
        place = [o + extra for o, extra in zip(part.global_offset, (*(0,) * prepended, *r.offsets), strict=True)]
        here = before + r.start - start
        yield {
            name: replace(
                part,
                key=_KEY.format(state=name, parameter=part.key),
                data=shard.detach()[here : here + r.end - r.start].view((1,) * prepended + r.sizes),
                dtype=shard.dtype,
                local_shape=(1,) * prepended + r.sizes,
                global_offset=tuple(place),
                # Rectangles are no grid.
                axis_fragmentations=None,
                prepend_axis_num=0,
                # The same on all tensor-parallel ranks perhaps, but in no other data-parallel rank's shard.
                replica_id=(*part.replica_id[:2], 0),
            )
            for name, shard in shards.items()
        }
