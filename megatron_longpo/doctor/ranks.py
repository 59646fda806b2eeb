"""How the doctor's ranks talk: by the store of their process group, so that a collective that hangs can be reported."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from megatron_longpo.runtime.heartbeat import own_store

_POLL_SECONDS = 0.02
_PREFIX = "megatron_longpo/doctor/"


class Ranks:
    """This rank among the others. Make one per thread.

    Args:
        rank, world_size: number of this rank, and of all.
        connect_store: gives a connection to their store.
    """

    def __init__(self, rank: int, world_size: int, connect_store: Callable[[], Any]) -> None:
        self.rank, self.world_size = rank, world_size
        self._connect_store = connect_store
        self._store = connect_store()

    @classmethod
    def of_process_group(cls) -> Ranks:
        """The ranks of the default process group."""
        return cls(dist.get_rank(), dist.get_world_size(), own_store)

    @classmethod
    def alone(cls) -> Ranks:
        """A world of one, which needs no process group."""
        store = dist.HashStore()
        return cls(0, 1, lambda: store)

    def connect(self) -> Ranks:
        """The same over a connection of its own, for another thread."""
        return Ranks(self.rank, self.world_size, self._connect_store)

    def post(self, key: str, value: Any) -> None:
        """Give a value to whoever asks for it."""
        self._store.set(_PREFIX + key, json.dumps(value))

    def peek(self, key: str) -> Any:
        """A value that somebody has posted, or None."""
        name = _PREFIX + key
        return json.loads(self._store.get(name)) if self._store.check([name]) else None

    def wait_for(self, key: str) -> Any:
        """A value, as soon as somebody has posted it. Waits without end: the watch ends the process."""
        while (value := self.peek(key)) is None:
            time.sleep(_POLL_SECONDS)
        return value

    def at(self, place: str) -> None:
        """Say where this rank is, for the report of a hang."""
        self.post(f"at/{self.rank}", place)

    def places(self) -> dict[int, str]:
        """Where each rank said it was."""
        return {rank: self.peek(f"at/{rank}") or "no check" for rank in range(self.world_size)}
