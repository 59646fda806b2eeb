"""The order in which samples are used: a function of seed, epoch and step only, so that resuming is exact."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_longpo.runtime.balance import assign


class BatchSampler:
    """Global batches over epochs; every sample once per epoch, whatever the parallel layout.

    Batches cross the ends of epochs: with n samples, use number ``i`` is place ``i % n`` of epoch ``i // n``.

    Args:
        num_samples: size of the data set, at least 1.
        global_batch_size: samples per step.
        shuffle: permute each epoch; otherwise keep the order of the file.
        seed: seed of the permutations.
    """

    def __init__(self, num_samples: int, global_batch_size: int, *, shuffle: bool, seed: int) -> None:
        self.num_samples, self.global_batch_size = num_samples, global_batch_size
        self.shuffle, self.seed = shuffle, seed
        self._epoch = -1
        self._order = np.arange(0)

    def order(self, epoch: int) -> np.ndarray:
        """Numbers of an epoch's samples, in order of use."""
        if not self.shuffle:
            return np.arange(self.num_samples)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)
            self._epoch = epoch
        return self._order

    def batch(self, step: int) -> list[int]:
        """Numbers of the samples of step ``step``, counted from 0."""
        first = step * self.global_batch_size
        return [
            int(self.order(use // self.num_samples)[use % self.num_samples])
            for use in range(first, first + self.global_batch_size)
        ]


def assign_batch(costs: Sequence[float], *, data_size: int, micro_batch_size: int) -> list[list[list[int]]]:
    """Assign the places of a global batch to data-parallel ranks and their micro batches, so that ranks finish together.

    Every rank gets the same number of samples: the most expensive first, each to the least loaded rank that still has room.
    The samples of a rank are assigned to its micro batches in the same way. The loss is a mean over the global batch, and
    metrics are kept by place, so it does not matter which rank computes which sample.

    Args:
        costs: cost of each place of the batch; their number is a multiple of ``data_size * micro_batch_size``.
        data_size: number of data-parallel ranks.
        micro_batch_size: samples per micro batch.

    Returns:
        For each rank its micro batches, each a list of places.
    """
    result = []
    for places in _assign_equally(range(len(costs)), costs, data_size):
        result.append(_assign_equally(places, costs, len(places) // micro_batch_size))
    return result


def _assign_equally(places: Sequence[int], costs: Sequence[float], bins: int) -> list[list[int]]:
    found = assign([costs[p] for p in places], bins, equal_counts=True)
    return sorted([places[i] for i in items] for items in found)
