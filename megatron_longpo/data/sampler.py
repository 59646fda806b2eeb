"""In what order samples are used: a function of seed, epoch and step alone, so that resuming is exact."""

from __future__ import annotations

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


def microbatches_of_rank(batch: list[int], *, data_rank: int, data_size: int, micro_batch_size: int) -> list[list[int]]:
    """Micro batches of one data-parallel rank, in order.

    Micro batch m of rank r is the r-th slice of the m-th part of the batch, so that the first samples of a batch are the
    first micro batches of all ranks, whatever their number.
    """
    per_round = micro_batch_size * data_size
    return [
        batch[start + data_rank * micro_batch_size : start + (data_rank + 1) * micro_batch_size]
        for start in range(0, len(batch), per_round)
    ]
