"""Who is slow, from numbers that can be checked by hand."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_longpo.config import LoggingConfig
from megatron_longpo.runtime import platform
from megatron_longpo.runtime.waiting import Waits
from megatron_longpo.training import phases
from megatron_longpo.training.phases import Phases
from megatron_longpo.training.reference_scoring import ScoringWork
from megatron_longpo.training.stragglers import RankTimes, StragglerDetector, by_slowness, named


def ranks(seconds: list[float], work: list[float] | None = None, stages: list[int] | None = None) -> list[RankTimes]:
    count = len(seconds)
    rows = zip(seconds, work or [0.0] * count, stages or [0] * count, strict=True)
    return [RankTimes(seconds=s, work=w, stage=at) for s, w, at in rows]


def test_of_two_ranks_the_slow_one_is_compared_with_the_fast_one() -> None:
    (slowest, other) = by_slowness(ranks([1.0, 1.8]))
    assert (slowest.rank, slowest.seconds, slowest.median, slowest.slowness) == (1, 1.8, 1.0, 1.8)
    assert (other.rank, other.slowness) == (0, 1.0)


def test_a_rank_with_longer_samples_is_not_slow() -> None:
    """Rank 2 takes twice as long for twice the work; rank 3 takes twice as long for 1.25 times the work, so 1.6 times.

    Median of the seconds 1, 1, 2, 2: 1. Seconds per unit of work 1, 1, 1, 1.6: median 1.
    """
    found = by_slowness(ranks([1.0, 1.0, 2.0, 2.0], work=[1.0, 1.0, 2.0, 1.25]))
    assert [(one.rank, one.slowness) for one in found[:2]] == [(3, 1.6), (0, 1.0)]
    assert [one.rank for one in named(found, threshold=1.5, step_seconds=3.0)] == [3]
    assert not named(found, threshold=1.7, step_seconds=3.0)


def test_a_rank_with_little_to_do_is_not_slow() -> None:
    """As on tiny models, where each micro batch takes the same: ten times as long per unit of work, but no longer per step."""
    assert by_slowness(ranks([1.0, 1.0, 1.0], work=[10.0, 10.0, 1.0]))[0].slowness == 1.0


def test_a_rank_without_work_leaves_the_others_comparable() -> None:
    """As where fewer rows are scored than there are ranks: rank 3 takes four times as long for a row of four times the cost."""
    assert by_slowness(ranks([1.0, 1.0, 0.1, 4.0], work=[1.0, 1.0, 0.0, 4.0]))[0].slowness == 1.0
    # Rank 3 takes eight times as long, so twice per unit of work.
    found = by_slowness(ranks([1.0, 1.0, 0.1, 8.0], work=[1.0, 1.0, 0.0, 4.0]))
    assert (found[0].rank, found[0].slowness) == (3, 2.0)


def test_the_work_of_a_step_is_counted() -> None:
    """Two layers, samples of cost 8, 2 and 4, an output layer of 4 x 10.

    Place 3 fills the batch up with the cheapest sample: 2 * (8 + 2) + 40 * 3 places with a loss = 140. Of the reference this
    rank has rows of cost 5 and one token: 2 * 5 + 40 = 50.
    """
    parallel: Any = SimpleNamespace(is_last_stage=True, context_size=1)
    shape: Any = SimpleNamespace(hidden_size=4, vocab_size=10)
    micro_batch = SimpleNamespace(
        inputs=SimpleNamespace(tokens_1s=torch.zeros(1, 7)), shard=SimpleNamespace(loss_places_N=[1, 2, 5])
    )
    batch: Any = SimpleNamespace(places=[0, 3], micro_batch=micro_batch)
    detector = StragglerDetector(LoggingConfig(), parallel, shape, layers=2, parameters=9)
    detector.count_work([batch], [8.0, 2.0, 4.0], reference=ScoringWork(cost=5.0, loss_tokens=1))
    assert detector._work == {"reference": 50.0, "data": 7, "forward_backward": 140.0, "optimizer": 9}


def test_ranks_are_compared_within_their_stage_or_with_other_stages_by_their_work() -> None:
    """Stage 1 has twice the layers; of four ranks the last takes 5 where its peer takes 2."""
    found = by_slowness(ranks([1.0, 1.0, 2.0, 5.0], work=[1.0, 1.0, 2.0, 2.0], stages=[0, 0, 1, 1]))
    assert (found[0].rank, found[0].median, found[0].slowness) == (3, 2.0, 2.5) and found[1].slowness == 1.0
    alone = by_slowness(ranks([1.0, 2.0], work=[1.0, 2.0], stages=[0, 1]))
    assert alone[0].slowness == 1.0
    alone = by_slowness(ranks([3.0, 2.0], work=[1.0, 2.0], stages=[0, 1]))
    assert (alone[0].rank, alone[0].slowness) == (0, 1.5)


def test_what_takes_little_of_a_step_names_nobody() -> None:
    found = by_slowness(ranks([0.01, 0.05]))
    assert found[0].slowness == 5.0
    # 0.04 s more are 4% of a second, and 8% of half of one.
    assert not named(found, threshold=1.5, step_seconds=1.0)
    assert [one.rank for one in named(found, threshold=1.5, step_seconds=0.5)] == [1]


def test_nothing_to_compare() -> None:
    assert all(one.slowness == 1.0 for one in by_slowness(ranks([0.0, 0.0, 0.0])))
    assert by_slowness(ranks([0.0, 1.0]))[0].slowness == 1.0


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_waiting_is_told_from_work(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two collectives that take a second each by a clock that is moved by hand, in a phase of five."""
    now = [100.0]
    monkeypatch.setattr(phases.time, "monotonic", lambda: now[0])
    original = dist.Work.wait

    def wait(self: dist.Work, *args: object) -> object:
        now[0] += 1.0
        return original(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(dist.Work, "wait", wait)
    waits = Waits()
    clock = Phases(waits)
    waits.open()
    clock.begin()
    now[0] += 3.0
    clock.end("data")
    dist.all_reduce(torch.ones(2))
    now[0] += 3.0
    work = dist.all_reduce(torch.ones(2), async_op=True)
    assert work is not None
    work.wait()
    clock.end("forward_backward")
    assert clock.own_seconds() == {"data": 3.0, "forward_backward": 3.0}
    assert clock.as_metrics()["seconds/forward_backward"] == 5.0
    # An evaluation has many collectives, and nobody asks for their times.
    clock.end_step()
    for _ in range(5):
        dist.all_reduce(torch.ones(2))
    assert waits.take() == []
    clock.begin()
    dist.all_reduce(torch.ones(2))
    assert waits.take()
    waits.close()
    assert dist.Work.wait is wait
    clock.begin()
    dist.barrier()
    clock.end("data")
    assert clock.own_seconds() == {"data": 1.0}


def test_marks_on_the_cpu_are_seconds() -> None:
    began = platform.CURRENT.mark()
    time.sleep(0.01)
    assert 0.01 <= platform.CURRENT.seconds_between([(began, platform.CURRENT.mark())]) < 1.0
