"""Whether weights and optimizer states are finite: found with one reading of them and one all-reduce, and named if not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_longpo.model.gpt import PolicyModel
from megatron_longpo.runtime import platform
from megatron_longpo.runtime.collectives import all_gather_objects


@torch.no_grad()
def first_not_finite(chunks: Sequence[PolicyModel], optimizers: Iterable[torch.optim.Optimizer] = ()) -> str | None:
    """Name of the first tensor of any rank that holds NaN or infinity, or None; collective.

    Args:
        chunks: this rank's model chunks.
        optimizers: torch's optimizers over them.
    """
    weights = [(name, p) for chunk in chunks for name, p in chunk.named_parameters()]
    tensors = [_Tensor(p, "", p) for _, p in weights] + list(_states(optimizers, {id(p) for _, p in weights}))
    found = _first_not_finite(tensors)
    # Names travel only if there is one.
    flag = torch.tensor([found is not None], dtype=torch.int32, device=platform.CURRENT.device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    if not flag.item():
        return None
    own = None if found is None else _name_of(found.parameter, weights) + found.kind
    return next(name for name in all_gather_objects(own) if name is not None)


@dataclass(frozen=True)
class _Tensor:
    """A weight, a master weight or a state.

    Attributes:
        parameter: the parameter that it belongs to.
        kind: what it is of it, as its name says; empty: the weight itself.
        value: the tensor.
    """

    parameter: Tensor
    kind: str
    value: Tensor


def _states(optimizers: Iterable[torch.optim.Optimizer], weights: set[int]) -> Iterator[_Tensor]:
    """Master weights and states of optimizers; not the parameters that are weights of the model themselves."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in weights:
                    yield _Tensor(parameter, " (master weights)", parameter)
                for key, value in optimizer.state.get(parameter, {}).items():
                    if isinstance(value, Tensor):
                        yield _Tensor(parameter, f" ({key} of the optimizer)", value)


def _first_not_finite(tensors: Sequence[_Tensor]) -> _Tensor | None:
    groups: dict[tuple[torch.device, torch.dtype], list[_Tensor]] = {}
    for tensor in tensors:
        if tensor.value.is_floating_point() and tensor.value.numel():
            groups.setdefault((tensor.value.device, tensor.value.dtype), []).append(tensor)
    for group in groups.values():
        # The largest magnitude: NaN if there is one, and without the overflow that a sum might have.
        finite = torch.stack(torch._foreach_norm([tensor.value for tensor in group], float("inf"))).isfinite()
        if not finite.all():
            return group[int(finite.logical_not().nonzero()[0])]
    return None


def _name_of(parameter: Tensor, weights: Sequence[tuple[str, Tensor]]) -> str:
    """Name of the weight that an optimizer's parameter is, or is a part or a copy of."""
    address = parameter.data_ptr()
    for name, weight in weights:
        start = weight.data_ptr()
        copy = getattr(weight, "main_param", None)
        if copy is parameter or start <= address < start + weight.numel() * weight.element_size():
            return name
    return "a weight"
