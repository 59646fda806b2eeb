"""Ranks that give no sign of life are named, and end the run; a network that is lost for a while does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from megatron_longpo.errors import PlatformError
from megatron_longpo.runtime import heartbeat
from megatron_longpo.runtime.heartbeat import _DONE, _Own, _place, _Pulse
from megatron_longpo.runtime.process_groups import store_of_launch


class _Ends(list[int]):
    """Exit statuses of ends that were asked for."""


@pytest.fixture
def store() -> Any:
    made = dist.HashStore()
    made.set_timeout(timedelta(seconds=1))
    return made


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch, store: Any) -> Iterator[_Ends]:
    found = _Ends()
    monkeypatch.setattr(heartbeat, "_BEAT_SECONDS", 0.02)
    monkeypatch.setattr(heartbeat, "_END_SECONDS", 0.02)
    monkeypatch.setattr(heartbeat, "_own", _Own())
    monkeypatch.setattr(heartbeat, "own_store", lambda: store)
    monkeypatch.setattr(heartbeat.os, "_exit", found.append)
    yield found


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def pulse(patience: float) -> _Pulse:
    """Of rank 0 of two."""
    made = _Pulse(0, 2)
    made.patience = patience
    made.start()
    return made


def test_a_silent_neighbour_is_named_and_ends_the_run(
    store: Any, ends: _Ends, capfd: pytest.CaptureFixture[str]
) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    mine = pulse(0.5)
    said = {**_place(), "place": "step 5: optimizer", "pid": child.pid, "born": heartbeat._born(child.pid)}
    store.set(mine.key("place", 1), json.dumps(said))
    for _ in range(20):
        store.add(mine.key("beats", 1), 1)
        time.sleep(0.05)
    assert not ends, "as long as it counts, it lives"
    wait_for(lambda: ends)
    mine.stop()
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(
        f"error: rank 1 (host {said['host']}, process {child.pid}, last heard of in step 5: optimizer) has"
    )
    assert ends[0] == 1 and store.add(mine.key("end"), 0) > 0
    # On this machine it is killed: stopped, it would not end on the launcher's signal.
    assert child.wait(10) == -9


def test_a_neighbour_that_has_ended_is_not_missed(store: Any, ends: _Ends) -> None:
    mine = pulse(0.1)
    store.add(mine.key("beats", 1), _DONE)
    time.sleep(0.5)
    mine.stop()
    assert not ends


def test_without_patience_nobody_is_watched(ends: _Ends) -> None:
    mine = pulse(0)
    time.sleep(0.3)
    mine.stop()
    assert not ends


def test_a_store_that_is_lost_for_a_while_blames_nobody(
    monkeypatch: pytest.MonkeyPatch, store: Any, ends: _Ends
) -> None:
    def refuse() -> Any:
        raise ConnectionError("no route to host")

    mine = pulse(2.0)
    wait_for(lambda: store.add(mine.key("beats", 0), 0) > 2)
    with monkeypatch.context() as lost:
        lost.setattr(heartbeat, "own_store", refuse)
        lost.setattr(mine, "_beat", lambda _: refuse())
        time.sleep(1.5)
    before = store.add(mine.key("beats", 0), 0)
    wait_for(lambda: store.add(mine.key("beats", 0), 0) > before)
    time.sleep(1.0)
    # Its neighbour was silent for more than two seconds, in one and a half of which it could not be asked.
    assert not ends
    mine.stop()


def test_a_store_that_is_lost_for_good_is_named(
    monkeypatch: pytest.MonkeyPatch, ends: _Ends, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "node0")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(_Pulse, "_beat", lambda *_: (_ for _ in ()).throw(ConnectionError("reset")))
    heartbeat.at("step 3: forward_backward")
    mine = pulse(0.2)
    wait_for(lambda: ends)
    mine._stop_event.set()
    line = capfd.readouterr().err.splitlines()[0]
    assert (
        line.startswith("error: rank 0 (host ")
        and f"process {os.getpid()}, last heard of in step 3: forward_backward)" in line
    )
    assert "has not reached the store at node0:29500 for 0.2 s" in line


def test_when_one_has_named_the_cause_all_end_but_those_that_report_themselves(store: Any, ends: _Ends) -> None:
    mine = pulse(0)
    heartbeat.begin_failing()
    store.add(mine.key("end"), 1)
    time.sleep(0.3)
    assert not ends
    heartbeat._own.is_failing = False
    wait_for(lambda: ends)
    mine.stop()
    assert ends[0] == 1


def test_ranks_that_are_behind_and_where_they_are(monkeypatch: pytest.MonkeyPatch, store: Any, ends: _Ends) -> None:
    mine = _Pulse(0, 3)
    monkeypatch.setattr(heartbeat, "_pulse", mine)
    for rank, places in enumerate([12, 11, 12]):
        store.set(mine.key("place", rank), json.dumps({**_place(), "places": places, "place": f"place {places}"}))
    assert heartbeat.ranks_behind() == [1]
    assert heartbeat.whereabouts(1).endswith(f"process {os.getpid()}, last heard of in place 11)")
    assert heartbeat.whereabouts(9) == ""


def test_launches_on_one_store_do_not_meet(store: Any) -> None:
    """The second launch has other ranks than the first, which left its questions and its names behind."""
    for world in (3, 2, 3):
        with ThreadPoolExecutor(world) as pool:
            calls = [pool.submit(store_of_launch, store, rank=rank, world=world) for rank in range(world)]
        made = [call.result() for call in calls]
        made[0].set("key", str(world))
        assert [each.get("key") for each in made] == [str(world).encode()] * world
        assert made[0].add("count", 1) == 1


def test_a_rank_that_does_not_come_is_named(store: Any) -> None:
    with pytest.raises(PlatformError, match="rank 1 of 2 did not come within"):
        store_of_launch(store, rank=0, world=2, timeout=timedelta(seconds=0.1))


def test_a_store_that_never_answers_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, ends: _Ends, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its process is stopped: torch's questions wait without a bound."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    answer = threading.Event()
    monkeypatch.setattr(heartbeat, "own_store", answer.wait)
    monkeypatch.setattr(heartbeat, "_ANSWER_SECONDS", 0.2)
    assert heartbeat.answer_of(heartbeat.own_store, "none") == "none"
    mine = pulse(0.5)
    wait_for(lambda: ends)
    mine._stop_event.set()
    answer.set()
    assert "has not reached the store" in capfd.readouterr().err.splitlines()[0]
