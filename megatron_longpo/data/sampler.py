"""In what order samples are used: a function of seed, epoch and step alone, so that resuming is exact."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np


class BatchSampler:
    """Global batches over epochs; every sample once an epoch, whatever the parallel layout.

    Batches run on across epoch ends: with n samples, use number ``i`` is place ``i % n`` of epoch ``i // n``.

    Args:
        samples: size of the data set, at least 1.
        global_batch_size: samples a step.
        shuffle: permute each epoch by seed; off: file order.
        seed: of the permutations.
    """

    def __init__(self, samples: int, global_batch_size: int, *, shuffle: bool, seed: int) -> None:
        self.samples, self.global_batch_size = samples, global_batch_size
        self.shuffle, self.seed = shuffle, seed
        self._epoch = -1
        self._order = np.arange(0)

    def order(self, epoch: int) -> np.ndarray:
        """Sample numbers of an epoch, in order of use."""
        if not self.shuffle:
            return np.arange(self.samples)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.samples)
            self._epoch = epoch
        return self._order

    def batch(self, step: int) -> list[int]:
        """Sample numbers of step ``step`` (from 0)."""
        first = step * self.global_batch_size
        return [
            int(self.order(use // self.samples)[use % self.samples])
            for use in range(first, first + self.global_batch_size)
        ]

    def epoch_of(self, step: int) -> float:
        """Epochs done before a step."""
        return step * self.global_batch_size / self.samples


def deal_batch(costs: Sequence[float], *, data_size: int, micro_batch_size: int) -> list[list[list[int]]]:
    """Deal the places of a global batch over data-parallel ranks and their micro batches, so that ranks finish together.

    Every rank gets as many samples. Dearest first, each to the rank that has least and still has room; the samples of a
    rank are put into its micro batches the same way. The loss is a mean over the global batch and figures are kept by
    place, so who computes which sample changes no number.

    Args:
        costs: of each place of the batch; their number is a multiple of ``data_size * micro_batch_size``.
        data_size: data-parallel ranks.
        micro_batch_size: samples a micro batch.

    Returns:
        For each rank its micro batches, each a list of places.
    """
    ranks = _deal(range(len(costs)), costs, data_size)
    return [_deal(places, costs, len(places) // micro_batch_size) for places in ranks]


def _deal(places: Iterable[int], costs: Sequence[float], hands: int) -> list[list[int]]:
    places = list(places)
    room = len(places) // hands
    dealt: list[list[int]] = [[] for _ in range(hands)]
    totals = [0.0] * hands
    for place in sorted(places, key=lambda p: (-costs[p], p)):
        hand = min((h for h in range(hands) if len(dealt[h]) < room), key=lambda h: (totals[h], h))
        dealt[hand].append(place)
        totals[hand] += costs[place]
    return sorted(sorted(hand) for hand in dealt)
