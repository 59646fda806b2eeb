"""A range of a tensor's elements as rectangles: what a rank saves of a parameter's optimizer states."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_longpo.training.optimizer_state import Rectangle, rectangles


def test_a_range_is_the_end_of_a_row_whole_rows_and_the_beginning_of_a_row() -> None:
    """Elements 3 to 13 of four rows of four: 3 | 4 to 11 | 12."""
    assert list(rectangles((4, 4), 3, 13)) == [
        Rectangle((0, 3), (1, 1), 3),
        Rectangle((1, 0), (2, 4), 4),
        Rectangle((3, 0), (1, 1), 12),
    ]
    assert list(rectangles((4, 4), 0, 16)) == [Rectangle((0, 0), (4, 4), 0)]
    assert list(rectangles((4, 4), 5, 7)) == [Rectangle((1, 1), (1, 2), 5)]
    assert list(rectangles((9,), 2, 5)) == [Rectangle((2,), (3,), 2)]
    assert list(rectangles((4, 4), 5, 5)) == []
    # Two rows at a time.
    assert [(r.offsets, r.sizes) for r in rectangles((5, 3), 0, 15, largest=7)] == [
        ((0, 0), (2, 3)),
        ((2, 0), (2, 3)),
        ((4, 0), (1, 3)),
    ]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.data())
def test_rectangles_are_the_range(shape: list[int], data: st.DataObject) -> None:
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    end = data.draw(st.integers(start, numel))
    whole = torch.arange(numel).view(shape)
    found = []
    for r in rectangles(tuple(shape), start, end):
        part = whole[tuple(slice(o, o + n) for o, n in zip(r.offsets, r.sizes, strict=True))]
        assert part.reshape(-1).tolist() == list(range(r.start, r.end))
        found += part.reshape(-1).tolist()
    assert found == list(range(start, end))
