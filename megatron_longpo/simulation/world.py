"""Process groups of a world in which only one rank is there; its peers answer at once.

torch's ``fake`` back end completes every collective without touching the data. What is missing is put here: groups of other
back ends, object collectives, and the shapes that neighbouring pipeline stages send ahead of their tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore


def install() -> None:
    """Replace what the ``fake`` back end lacks; to be called once, before megatron-core is imported."""
    new_group: Any = dist.new_group

    def fake_group(*args: Any, **kwargs: Any) -> Any:
        return new_group(*args, **{**kwargs, "backend": "fake"})

    distributed: Any = dist
    distributed.new_group = fake_group
    # Whoever sends an object sends what this rank has.
    distributed.broadcast_object_list = lambda *_, **__: None
    distributed.barrier = lambda *_, **__: None
    distributed.all_gather_object = _all_gather_object
    # Coalesced collectives have no meta kernels: one by one, which sends as many bytes.
    distributed._coalescing_manager = distributed.distributed_c10d._coalescing_manager = _one_by_one


def join(rank: int, world_size: int) -> None:
    """Become one rank of a world."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())


def _all_gather_object(found: list[Any], mine: Any, group: Any = None) -> None:  # noqa: ARG001
    found[:] = [mine] * len(found)


class _Works:
    """What a coalesced call returns: something to wait for."""

    def wait(self) -> None:
        pass


@contextlib.contextmanager
def _one_by_one(*_: Any, **__: Any) -> Iterator[_Works]:
    yield _Works()


class Peers:
    """The neighbouring stages of a pipeline.

    Args:
        hidden_shape: shape of the hidden states that stages pass on, the same for all micro batches of a simulated step.
    """

    def __init__(self, hidden_shape: tuple[int, ...]) -> None:
        self._shape = hidden_shape

    def __call__(self, received: Tensor) -> Tensor | None:
        """Numbers that a peer sends, where the receiver acts on them: the shape of a tensor."""
        is_shape = received.dtype == torch.int64 and received.numel() == len(self._shape)
        return torch.tensor(self._shape) if is_shape else None
