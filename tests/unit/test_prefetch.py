"""Values prefetched in a thread: order, memory, errors, and an early end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_longpo.checkpoint.prefetch import Prefetcher


class Maker:
    """Makes numbered values and counts them."""

    def __init__(self) -> None:
        self.made = 0

    def item(self, number: int, size: int = 10) -> tuple[int, Callable[[], Tensor]]:
        def make() -> Tensor:
            self.made += 1
            return torch.tensor(number)

        return size, make

    def wait_for(self, count: int) -> None:
        """Wait until so many values are made, and a moment longer."""
        deadline = time.monotonic() + 10
        while self.made < count and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.05)


def test_values_come_in_order_and_memory_is_bounded() -> None:
    maker = Maker()
    with Prefetcher([maker.item(n) for n in range(6)], ahead=15) as values:
        maker.wait_for(2)
        assert maker.made == 2, "two of 10 bytes fit the limit of 10 + 15"
        assert int(next(values)) == 0
        maker.wait_for(2)
        assert maker.made == 2, "the value in use counts"
        assert int(next(values)) == 1
        maker.wait_for(3)
        assert maker.made == 3
        assert [int(value) for value in values] == [2, 3, 4, 5]
        with pytest.raises(StopIteration):
            next(values)


def test_an_error_reaches_the_consumer_in_its_place() -> None:
    def fail() -> Tensor:
        raise OSError("unreadable")

    maker = Maker()
    with Prefetcher([maker.item(0), (10, fail), maker.item(2)], ahead=100) as values:
        assert int(next(values)) == 0
        for _ in range(2):
            with pytest.raises(OSError, match="unreadable"):
                next(values)
    assert maker.made == 1


def test_an_early_end_stops_the_thread() -> None:
    maker = Maker()
    before = threading.active_count()
    with Prefetcher([maker.item(n) for n in range(100)], ahead=0) as values:
        next(values)
    assert threading.active_count() == before and maker.made <= 2
    with Prefetcher([]) as values:
        assert list(values) == []
