"""Work of several processes together: who does what, and one error for all. Without a process group there is one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_longpo.errors import CheckpointError, DamagedError, LongPOError
from megatron_longpo.runtime import platform
from megatron_longpo.runtime.balance import assign
from megatron_longpo.runtime.failure import causes_of, explain

Item = TypeVar("Item")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def all_gather_objects(value: Item) -> list[Item]:
    """Give every process the values of all of them, by rank; collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def my_share(items: Sequence[Item], costs: Sequence[int]) -> list[Item]:
    """Items that this process works on. In order, each item goes to the least loaded process.

    Args:
        items: all items, the same on every process.
        costs: cost of each item.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    return [items[i] for i in assign(costs, world, keep_order=True)[rank()]]


@contextmanager
def raise_on_all_ranks(output: Path) -> Iterator[None]:
    """Run the body on all processes, and wait for all of them; if it fails on one, all raise its error.

    Args:
        output: path that the message names where the error names none.
    """
    failure: BaseException | None = None
    try:
        yield
    except BaseException as error:
        failure = error
    _raise_first(failure, output)


def _raise_first(failure: BaseException | None, output: Path) -> None:
    """Raise the first failure of any process on all of them, as an error that names its fix if there is one."""
    message: tuple[bool, str, bool] | None = None
    if failure is not None:
        known = next((c for c in causes_of(failure) if isinstance(c, CheckpointError)), None)
        explained = explain(failure, output)
        if known is not None:
            message = (True, str(known), isinstance(known, DamagedError))
        elif explained is not None:
            message = (True, explained, False)
        else:
            message = (False, f"{type(failure).__name__}: {failure}", False)
    found = [m for m in all_gather_objects(message) if m is not None]
    if not found:
        return
    if failure is not None and not any(is_known for is_known, _, _ in found):
        raise failure
    # A cause that can be fixed goes before the errors that it caused on other processes.
    _, text, is_damage = next((m for m in found if m[0]), found[0])
    raise (DamagedError if is_damage else CheckpointError)(text) from failure


def on_rank0(action: Callable[[], Item]) -> Item:
    """Run an action on rank 0 and give every rank what it returned; collective.

    Raises:
        LongPOError, OSError: what the action raised; raised on every rank, which would otherwise wait for rank 0.
    """
    if not dist.is_initialized():
        return action()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except (LongPOError, OSError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0, device=platform.CURRENT.device)
    value, failure = outcome
    if failure is not None:
        raise failure
    return value
