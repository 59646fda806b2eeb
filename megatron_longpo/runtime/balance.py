"""Balancing work of known cost over ranks, and rounding up."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def assign(
    costs: Sequence[float], bins: int, *, equal_counts: bool = False, keep_order: bool = False
) -> list[list[int]]:
    """Assign items to bins so that the most loaded bin is close to the mean.

    Items go one by one to the least loaded bin, the most expensive first (Graham's LPT rule: at most 4/3 of the best possible
    load). The result depends only on the arguments, so every rank can compute it by itself.

    Args:
        costs: cost of each item.
        bins: number of bins.
        equal_counts: give every bin the same number of items; ``bins`` must divide their number.
        keep_order: take the items in the given order instead of by cost.

    Returns:
        For each bin the indices of its items, ascending.

    Raises:
        ValueError: ``equal_counts`` and ``bins`` does not divide the number of items.
    """
    if equal_counts and len(costs) % bins:
        raise ValueError(f"{len(costs)} items cannot be shared equally by {bins} bins; their number must be a multiple")
    capacity = len(costs) // bins if equal_counts else len(costs)
    result: list[list[int]] = [[] for _ in range(bins)]
    order = range(len(costs)) if keep_order else sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    # Bins with room, the least loaded first; sums start from an integer, so that integer costs stay exact. A heap, since
    # thousands of context-parallel ranks have four tiles each.
    waiting: list[tuple[float, int]] = [(0, b) for b in range(bins)]
    for item in order:
        load, least = heapq.heappop(waiting)
        result[least].append(item)
        if len(result[least]) < capacity:
            heapq.heappush(waiting, (load + costs[item], least))
    return [sorted(items) for items in result]


def ceil_div(a: int, b: int) -> int:
    """``a / b`` rounded up, in integers."""
    return -(-a // b)


def round_up(value: int, multiple: int) -> int:
    """Smallest multiple of ``multiple`` that is at least ``value``."""
    return ceil_div(value, multiple) * multiple
