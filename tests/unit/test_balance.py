"""Assignment of costs to bins: the outputs of the five functions that it replaced, which decide the order of samples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_longpo.data.sampler import assign_batch
from megatron_longpo.data.sequence import Row, assign_places, lay_out
from megatron_longpo.evaluation.runner import SampleBatch, assign_batches
from megatron_longpo.runtime.balance import assign, ceil_div, round_up

# Recorded from the separate functions of release 0.1.0.
COSTS = [8, 3, 13, 1, 2, 2, 8, 1, 5, 1, 2, 13]


def test_most_expensive_first_as_recorded() -> None:
    assert assign(COSTS, 3) == [[2, 8, 10], [1, 3, 4, 9, 11], [0, 5, 6, 7]]
    assert assign(COSTS, 5) == [[2], [11], [0, 3, 4], [5, 6, 7], [1, 8, 9, 10]]
    batches = [SampleBatch((str(i),), float(cost), list) for i, cost in enumerate(COSTS)]
    assert [[int(b.keys[0]) for b in mine] for mine in assign_batches(batches, 5)] == assign(COSTS, 5)


def test_equal_counts_as_recorded() -> None:
    # The sampler sorts the bins by their first sample as well.
    assert sorted(assign(COSTS, 3, equal_counts=True)) == [[0, 5, 6, 7], [1, 3, 4, 11], [2, 8, 9, 10]]
    two = [[[0, 3, 8], [2, 5, 9]], [[1, 4, 6], [7, 10, 11]]]
    assert assign_batch(COSTS, data_size=2, micro_batch_size=3) == two
    three = [[[0, 5], [6, 7]], [[1, 4], [3, 11]], [[2, 9], [8, 10]]]
    assert assign_batch(COSTS, data_size=3, micro_batch_size=2) == three


def test_given_order_as_recorded() -> None:
    assert assign(COSTS, 3, keep_order=True) == [[0, 6], [1, 3, 4, 5, 7, 8, 10], [2, 9, 11]]


@pytest.mark.parametrize(
    ("parts", "tiles", "starts"),
    [
        (2, 4, [[0, 189, 252, 441], [63, 126, 315, 378]]),
        (3, 4, [[84, 126, 210, 294], [42, 168, 252, 420], [0, 336, 378, 462]]),
        (4, 2, [[0, 252], [63, 315], [126, 378], [189, 441]]),
    ],
)
def test_places_as_recorded(parts: int, tiles: int, starts: list[list[int]]) -> None:
    rows = []
    for slot, tail in enumerate((150, 90, 60)):
        tokens = np.concatenate([np.arange(200), 1000 * slot + np.arange(tail)])
        response = np.where(np.arange(200 + tail) >= 200, slot, -1)
        rows.append(Row(tokens, response, np.zeros(200 + tail, bool), 0))
    layout = lay_out(rows, prefix_sharing=True, num_samples=1, num_responses=3)
    found = assign_places(layout, multiple=parts, parts=parts, tiles=tiles)
    assert [[r.start for r in ranges] for ranges in found] == starts


@given(costs=st.lists(st.integers(0, 100), max_size=30), bins=st.integers(1, 6), keep_order=st.booleans())
def test_every_item_once_and_bounded(costs: list[int], bins: int, keep_order: bool) -> None:
    found = assign(costs, bins, keep_order=keep_order)
    assert sorted(i for items in found for i in items) == list(range(len(costs)))
    # List scheduling: a bin exceeds the mean by less than its last item.
    assert max(sum(costs[i] for i in items) for items in found) <= sum(costs) / bins + max(costs, default=0)


def test_unequal_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="7 items cannot be shared equally by 2 bins"):
        assign([1.0] * 7, 2, equal_counts=True)


@given(value=st.integers(0, 10**9), multiple=st.integers(1, 10**6))
def test_rounding_up(value: int, multiple: int) -> None:
    assert round_up(value, multiple) % multiple == 0 and 0 <= round_up(value, multiple) - value < multiple
    assert ceil_div(value, multiple) * multiple == round_up(value, multiple)
