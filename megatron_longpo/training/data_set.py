"""The run's data sets: samples, and what each costs to compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_longpo.data.indexed import Manifest, PreferenceData
from megatron_longpo.data.preference import Sample
from megatron_longpo.model.shape import ModelShape
from megatron_longpo.runtime.collectives import on_rank0
from megatron_longpo.training.plan import RunPlan


class DataSet:
    """Samples and their costs.

    Args:
        prefix: path prefix of the indexed binaries.
        verify: whether rank 0 checks their checksums; collective.
        shape: shape of the model, for the costs.

    Raises:
        DataError: the binaries are missing or damaged.
    """

    def __init__(self, prefix: str, *, verify: bool, shape: ModelShape) -> None:
        on_rank0(lambda: PreferenceData(prefix, verify=verify) and None)
        self._samples = PreferenceData(prefix, verify=False)
        self.costs = [shape.row_cost(int(n)) for n in self._samples.long_lengths()]

    @property
    def prefix(self) -> str:
        return str(self._samples.prefix)

    @property
    def manifest(self) -> Manifest:
        return self._samples.manifest

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, number: int) -> Sample:
        return self._samples[number]

    def samples(self, numbers: Sequence[int] | np.ndarray) -> list[Sample]:
        """The samples with these numbers, in their order."""
        return [self._samples[int(n)] for n in numbers]


@dataclass(frozen=True)
class RunData:
    """Data of a run.

    Attributes:
        train: data that is trained on; with ``skip_train`` only its sizes matter.
        held_out: data that is only evaluated, or None.
    """

    train: DataSet
    held_out: DataSet | None


def open_data(plan: RunPlan) -> RunData:
    """Open the data sets of a run; collective.

    Raises:
        DataError: binaries are missing or damaged.
    """
    data = plan.config.data
    assert data.data_path is not None
    train = DataSet(data.data_path, verify=data.verify_data, shape=plan.shape)
    held_out = None
    if data.valid_data_path is not None:
        held_out = DataSet(data.valid_data_path, verify=data.verify_data, shape=plan.shape)
    return RunData(train=train, held_out=held_out)
