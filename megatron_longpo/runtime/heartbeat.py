"""Which rank hangs: each rank counts up in the store that all share, and who reports a time-out listens for a moment."""

from __future__ import annotations

import contextlib
import threading
import time
from datetime import timedelta
from typing import Any

_BEAT_SECONDS = 1.0
# Several beats, so that a rank on a busy machine is not taken for one that hangs.
_LISTEN_SECONDS = 5.0
_STORE_SECONDS = 10

_stop: threading.Event | None = None


def start_heartbeat() -> None:
    """Count up in the store from now on, in a thread; with one rank, do nothing.

    A stopped process, a dead machine and a thread that keeps Python's lock all end the count.
    """
    import torch.distributed as dist

    global _stop
    if _stop is not None or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    _stop = threading.Event()
    key = _key(dist.get_rank())
    threading.Thread(target=_beat, args=(own_store(), key, _stop), name="heartbeat", daemon=True).start()


def stop_heartbeat() -> None:
    """End the count; call before the store's owner leaves."""
    global _stop
    if _stop is not None:
        _stop.set()
        _stop = None


def silent_ranks() -> list[int]:
    """Ranks whose counter has stopped; takes some seconds. Empty if all counters advance, or if there is no store to ask."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return []
    with contextlib.suppress(Exception):
        store, world = own_store(), dist.get_world_size()
        before = [store.add(_key(rank), 0) for rank in range(world)]
        time.sleep(_LISTEN_SECONDS)
        return [rank for rank in range(world) if store.add(_key(rank), 0) == before[rank] and rank != dist.get_rank()]
    return []


def _key(rank: int) -> str:
    return f"megatron_longpo/beats/{rank}"


def own_store() -> Any:
    """The store of the process group, by a connection of its own where torch has that: others wait on theirs for minutes."""
    import torch.distributed as dist

    store: Any = dist.distributed_c10d._get_default_store()
    with contextlib.suppress(Exception):
        store = store.clone()
        store.set_timeout(timedelta(seconds=_STORE_SECONDS))
    return store


def _beat(store: Any, key: str, stop: threading.Event) -> None:
    while not stop.wait(_BEAT_SECONDS):
        try:
            store.add(key, 1)
        except Exception:
            return  # the store has gone, and the run ends
