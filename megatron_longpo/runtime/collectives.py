"""Work of several processes together: who does what, and one error for all. Without a process group there is one process."""

from __future__ import annotations

import threading
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

# Seconds between looks whether the other processes are done, or one has failed.
_POLL_SECONDS = 1.0


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def all_gather_objects(value: Item) -> list[Item]:
    """Give every process the values of all of them, by rank; collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def my_share(items: Sequence[Item], costs: Sequence[int], *, ranks: Sequence[int] | None = None) -> list[Item]:
    """Items that this process works on. In order, each item goes to the least loaded process.

    Args:
        items: all items, the same on every process that works on them.
        costs: cost of each item.
        ranks: processes that work on them, this one among them. Default: all.
    """
    if ranks is None:
        ranks = range(dist.get_world_size() if dist.is_initialized() else 1)
    return [items[i] for i in assign(costs, len(ranks), keep_order=True)[ranks.index(rank())]]


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


def work_on_all_ranks(action: Callable[[Callable[[], bool]], object], output: Path) -> None:
    """Do long work on all processes at the same time. If it fails on one, all raise its error within seconds; collective.

    The work is done in a thread, while this one asks the others now and then: a single collective at the end would time out
    where one process takes longer than the others, or has failed while they go on.

    Args:
        action: the work. It is given a function that says whether another process has failed, in which case nobody waits for it.
        output: path that the message names where the error names none.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        with raise_on_all_ranks(output):
            action(lambda: False)
        return
    has_failed = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            action(has_failed.is_set)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work, name="work", daemon=True)
    thread.start()
    while True:
        thread.join(_POLL_SECONDS)
        # In this order: a thread that has ended has told by then whether it failed.
        is_done = not thread.is_alive()
        failure = failures[0] if failures else None
        found = all_gather_objects((is_done, failure is not None))
        if any(failed for _, failed in found):
            has_failed.set()
            break
        if all(done for done, _ in found):
            return
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
