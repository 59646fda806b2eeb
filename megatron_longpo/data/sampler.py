"""The order in which samples are used: a function of seed, epoch and step only, so that resuming is exact."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from megatron.core.datasets.helpers_cpp import build_blending_indices

from megatron_longpo.runtime.balance import assign

# Uses in the first table of a blend.
_FIRST_USES = 4096


class BatchSampler:
    """Global batches over epochs; every sample once per epoch, whatever the parallel layout.

    Batches cross the ends of epochs: with n samples, use number ``i`` is place ``i % n`` of epoch ``i // n``.

    Args:
        num_samples: size of the data set, at least 1.
        global_batch_size: samples per step.
        shuffle: permute each epoch; otherwise keep the order of the file.
        seed: seed of the permutations.
        stream: number of the data set among several, so that each has permutations of its own.
    """

    def __init__(self, num_samples: int, global_batch_size: int, *, shuffle: bool, seed: int, stream: int = 0) -> None:
        self.num_samples, self.global_batch_size = num_samples, global_batch_size
        self.shuffle, self.seed, self.stream = shuffle, seed, stream
        self._epoch = -1
        self._order = np.arange(0)

    def order(self, epoch: int) -> np.ndarray:
        """Numbers of an epoch's samples, in order of use."""
        if not self.shuffle:
            return np.arange(self.num_samples)
        if epoch != self._epoch:
            key = [self.seed, epoch, self.stream] if self.stream else [self.seed, epoch]
            self._order = np.random.default_rng(key).permutation(self.num_samples)
            self._epoch = epoch
        return self._order

    def batch(self, step: int) -> list[int]:
        """Numbers of the samples of step ``step``, counted from 0."""
        first = step * self.global_batch_size
        return [self.sample(use) for use in range(first, first + self.global_batch_size)]

    def sample(self, use: int) -> int:
        """Number of the sample of use ``use``, counted from 0."""
        return int(self.order(use // self.num_samples)[use % self.num_samples])


class BlendSampler:
    """Global batches from several data sets in given proportions.

    Each use takes the data set that is furthest behind its share, by megatron-core's rule (``build_blending_indices``), so that
    every batch has the proportions as nearly as whole samples allow. Within a data set the order is ``BatchSampler``'s. Samples
    are numbered through all data sets, one after the other.

    Args:
        sizes: sizes of the data sets, each at least 1.
        weights: their weights, each above 0.
        global_batch_size: samples per step.
        shuffle: permute each data set's epochs; otherwise keep the order of its file.
        seed: seed of the permutations.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        global_batch_size: int,
        *,
        shuffle: bool,
        seed: int,
    ) -> None:
        self.global_batch_size = global_batch_size
        self._shares = np.array(weights, np.float64) / np.sum(weights)
        self._first = np.cumsum([0, *sizes[:-1]])
        self._sets = [
            BatchSampler(size, 1, shuffle=shuffle, seed=seed, stream=number) for number, size in enumerate(sizes)
        ]
        # Of the uses so far: the number of the data set, and how many uses of it came before.
        self._set_of_use, self._earlier_uses = np.zeros(0, np.int16), np.zeros(0, np.int64)

    def batch(self, step: int) -> list[int]:
        """Numbers of the samples of step ``step``, counted from 0."""
        first = step * self.global_batch_size
        uses = range(first, first + self.global_batch_size)
        self._blend(uses.stop)
        found = []
        for use in uses:
            number = int(self._set_of_use[use])
            found.append(int(self._first[number]) + self._sets[number].sample(int(self._earlier_uses[use])))
        return found

    def _blend(self, uses: int) -> None:
        """Make the table reach over so many uses. It is a function of the shares only, so a longer one begins like a shorter."""
        if uses <= len(self._set_of_use):
            return
        size = max(uses, 2 * len(self._set_of_use), _FIRST_USES)
        self._set_of_use, self._earlier_uses = np.zeros(size, np.int16), np.zeros(size, np.int64)
        build_blending_indices(self._set_of_use, self._earlier_uses, self._shares, len(self._shares), size, False)


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
