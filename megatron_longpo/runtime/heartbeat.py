"""Signs of life: each rank counts up in the store that all share, says what it is doing, and watches its neighbour.

A stopped process, a dead machine, a lost network and a thread that keeps Python's lock all end the count. The neighbour of such
a rank names it, and ends the run: where ranks wait for one another on a GPU, nothing else would end before the collectives'
time-out. A rank that hangs while its threads go on (in a system call, in a kernel) is found by that time-out, and named as the
one that is behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

Answer = TypeVar("Answer")

_BEAT_SECONDS = 1.0
# The store serves all ranks: with more of them each one asks less often.
_RANKS_PER_SECOND = 512
# Several beats, so that a rank on a busy machine is not taken for one that hangs.
_LISTEN_SECONDS = 5.0
_STORE_SECONDS = 10
# For a question, with the seconds of listening that it may take.
_ANSWER_SECONDS = 2 * _STORE_SECONDS
# What a rank adds to its count when it has ended as it should.
_DONE = 2**40
# A rank that is naming the cause of a failure is not ended meanwhile.
_END_SECONDS = 2.0


@dataclass
class _Own:
    """What this rank says of itself.

    Attributes:
        place: what the main thread is doing.
        places: how many places it has been in; a rank that is behind the others has been in fewer.
        is_failing: whether it is reporting a failure of its own.
    """

    place: str = "starting"
    places: int = 0
    is_failing: bool = False


_own = _Own()
_pulse: _Pulse | None = None


def start_heartbeat() -> None:
    """Count up in the store from now on, in a thread; with one rank, do nothing."""
    import torch.distributed as dist

    global _pulse
    if _pulse is not None or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    _pulse = _Pulse(dist.get_rank(), dist.get_world_size())
    _pulse.start()


def watch_neighbour(seconds: float) -> None:
    """End this process, and with it the run, when the next rank gives no sign of life for so long; 0: never."""
    if _pulse is not None:
        _pulse.patience = seconds


def stop_heartbeat() -> None:
    """End the count; call before the store's owner leaves."""
    global _pulse
    if _pulse is not None:
        _pulse.stop()
        _pulse = None


def at(place: str) -> None:
    """Say what this rank is doing, for the line that names it if it hangs there."""
    _own.place = place
    _own.places += 1


def failed_key() -> str:
    """Key in the store under which the ranks that fail count themselves: the first one names the cause."""
    return f"megatron_longpo/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def begin_failing() -> None:
    """Say that this process is about to end with an error of its own."""
    _own.is_failing = True


def answer_of(question: Callable[[], Answer], otherwise: Answer) -> Answer:
    """What the store answers, or ``otherwise`` if it fails or does not answer in time.

    A store whose process is stopped, or whose machine is gone, leaves a question waiting for ever: torch's time-outs bound
    ``wait``, not ``add``, ``get`` or the making of a connection. So a thread asks, and is left behind.
    """
    found = [otherwise]

    def ask() -> None:
        with contextlib.suppress(Exception):
            found[0] = question()

    thread = threading.Thread(target=ask, name="question to the store", daemon=True)
    thread.start()
    thread.join(_ANSWER_SECONDS)
    return found[0]


def end_others() -> None:
    """Have all other ranks end: the cause has been named. They may wait for this one where nothing interrupts them."""
    pulse = _pulse
    if pulse is not None:
        answer_of(lambda: own_store().add(pulse.key("end"), 1), 0)


def silent_ranks() -> list[int]:
    """Ranks whose counter has stopped; takes some seconds. Empty if all counters advance, or if there is no store to ask."""
    return [] if _pulse is None else answer_of(_pulse.silent, [])


def ranks_behind() -> list[int]:
    """Ranks that have been in fewer places than others; empty if all are equally far, or if there is no store to ask."""
    return [] if _pulse is None else answer_of(_pulse.behind, [])


def whereabouts(rank: int) -> str:
    """Where a rank runs and what it did last, in brackets; empty if there is no store to ask."""
    pulse = _pulse
    if pulse is None:
        return ""
    return answer_of(lambda: f" ({pulse.describe(pulse.read_place(own_store(), rank))})", "")


def own_store() -> Any:
    """The store of the process group. A connection of its own, where torch has that: others wait on theirs for minutes."""
    import torch.distributed as dist

    store: Any = dist.distributed_c10d._get_default_store()
    with contextlib.suppress(Exception):
        store = store.clone()
        store.set_timeout(timedelta(seconds=_STORE_SECONDS))
    return store


class _Pulse(threading.Thread):
    """The thread that counts, and watches.

    Args:
        rank: this rank.
        world: number of ranks.

    Attributes:
        patience: seconds of silence after which the next rank counts as dead, and so does the store; 0: nobody is watched.
    """

    def __init__(self, rank: int, world: int) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.rank, self.world = rank, world
        self.patience = 0.0
        self._neighbour = (rank + 1) % world
        self._stop_event = threading.Event()
        self._period = max(_BEAT_SECONDS, world / _RANKS_PER_SECOND)
        self._said = -1
        self._count, self._changed = -1, time.monotonic()
        self._answered = time.monotonic()

    def key(self, name: str, rank: int | None = None) -> str:
        return f"megatron_longpo/{name}{'' if rank is None else f'/{rank}'}"

    def run(self) -> None:
        store, self._answered = None, time.monotonic()
        threading.Thread(target=self._mind_the_store, name="heartbeat of the store", daemon=True).start()
        # The first beat comes at once: a process may die in its first second.
        while not self._stop_event.is_set():
            try:
                store = store or own_store()
                self._beat(store)
                if time.monotonic() - self._answered > 2 * self._period + 1:
                    # As long as nobody could be asked, nobody can be blamed.
                    self._changed = time.monotonic()
                self._answered = time.monotonic()
                if store.add(self.key("end"), 0):
                    self._end_with_the_run()
                self._watch(store)
            except Exception:
                # An answer that comes late would be taken for that of the next question, so another connection asks it.
                store = None
                self._check_store()
            self._stop_event.wait(self._period)

    def _mind_the_store(self) -> None:
        """Notice that the other thread waits for a store that does not answer; see ``answer_of``."""
        woke = time.monotonic()
        while not self._stop_event.wait(self._period):
            now, before = time.monotonic(), woke
            woke = now
            if now - before > 2 * self._period + 1:
                # This process itself stood still: the other thread asks again first.
                self._answered = now
            self._check_store()

    def _check_store(self) -> None:
        if self.patience and time.monotonic() - self._answered > self.patience:
            self._end(
                f"rank {self.rank} ({self.describe(_place())}) has not reached the store at {_store_address()} for "
                f"{self.patience:g} s: the machine of the store, or the network to it, is down"
            )

    def stop(self) -> None:
        """End the thread, and tell the rank that watches this one that all is well."""
        self._stop_event.set()
        answer_of(lambda: own_store().add(self.key("beats", self.rank), _DONE), 0)

    def silent(self) -> list[int]:
        """Ranks whose counter does not advance."""
        store = own_store()
        ranks = [rank for rank in range(self.world) if rank != self.rank]
        before = {rank: store.add(self.key("beats", rank), 0) for rank in ranks}
        time.sleep(_LISTEN_SECONDS)
        return [rank for rank in ranks if store.add(self.key("beats", rank), 0) == before[rank] < _DONE]

    def behind(self) -> list[int]:
        """Ranks that have been in fewer places than others."""
        store = own_store()
        far = [self.read_place(store, rank)["places"] for rank in range(self.world)]
        return [rank for rank, places in enumerate(far) if places < max(far)]

    def read_place(self, store: Any, rank: int) -> dict[str, Any]:
        """What a rank last said of itself."""
        found: dict[str, Any] = json.loads(store.get(self.key("place", rank)))
        return found

    def describe(self, place: dict[str, Any]) -> str:
        return f"host {place['host']}, process {place['pid']}, last heard of in {place['place']}"

    def _beat(self, store: Any) -> None:
        if self._said != _own.places:
            said = _own.places
            store.set(self.key("place", self.rank), json.dumps(_place()))
            self._said = said
        store.add(self.key("beats", self.rank), 1)

    def _watch(self, store: Any) -> None:
        count, now = store.add(self.key("beats", self._neighbour), 0), time.monotonic()
        if count != self._count or count >= _DONE:
            self._count, self._changed = count, now
        if not self.patience or now - self._changed <= self.patience or _own.is_failing:
            return
        place = self.read_place(store, self._neighbour)
        if store.add(failed_key(), 1) == 1:
            _say(
                f"error: rank {self._neighbour} ({self.describe(place)}) has given no sign of life for {self.patience:g} s: "
                "it is stopped, or its machine or the network to it is down; rerun the command to resume"
            )
            _kill(place)
        store.add(self.key("end"), 1)

    def _end_with_the_run(self) -> None:
        # Whoever named the cause is still doing so, or this rank is failing by itself.
        time.sleep(_END_SECONDS)
        if not _own.is_failing and not self._stop_event.is_set():
            os._exit(1)

    def _end(self, line: str) -> None:
        if not _own.is_failing and not self._stop_event.is_set():
            if os.environ.get("LOCAL_RANK", "0") == "0":
                _say(f"error: {line}; rerun the command to resume")
            os._exit(1)


def _place() -> dict[str, Any]:
    """What this rank says of itself."""
    return {
        "places": _own.places,
        "place": _own.place,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "born": _born(os.getpid()),
    }


def _born(pid: int) -> str:
    """When a process of this machine began, in the kernel's ticks: its number may be another's later. Empty if unknown."""
    with contextlib.suppress(OSError, IndexError):
        # The name, in brackets, may hold anything; the start is the twentieth field after it.
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    return ""


def _kill(place: dict[str, Any]) -> None:
    """Kill a silent rank if it is on this machine: stopped, it does not end on the launcher's signal."""
    if place["host"] == socket.gethostname() and place["born"] and _born(place["pid"]) == place["born"]:
        with contextlib.suppress(OSError):
            os.kill(place["pid"], signal.SIGKILL)


def _store_address() -> str:
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def _say(line: str) -> None:
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)
