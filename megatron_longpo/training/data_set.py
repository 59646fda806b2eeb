"""The run's data sets: samples, and what each costs to compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_longpo.config import data_sources
from megatron_longpo.data.indexed import PreferenceData, read_manifest
from megatron_longpo.data.preference import Sample
from megatron_longpo.model.shape import ModelShape
from megatron_longpo.runtime.collectives import on_rank0
from megatron_longpo.training.plan import RunPlan


class DataSet:
    """Samples of one or several prefixes, numbered one after the other, and their costs. Nothing is copied.

    Args:
        prefixes: path prefixes of the indexed binaries.
        verify: whether rank 0 checks their checksums; collective.
        shape: shape of the model, for the costs.

    Attributes:
        parts: the samples of each prefix.
        costs: cost of each sample.

    Raises:
        DataError: the binaries are missing or damaged.
    """

    def __init__(self, prefixes: Sequence[str], *, verify: bool, shape: ModelShape) -> None:
        for prefix in prefixes:
            on_rank0(lambda p=prefix: PreferenceData(p, verify=verify) and None)  # type: ignore[misc]
        self.parts = tuple(PreferenceData(prefix, verify=False) for prefix in prefixes)
        self._ends = np.cumsum([len(part) for part in self.parts])
        self.costs = [shape.row_cost(int(n)) for part in self.parts for n in part.long_lengths()]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, number: int) -> Sample:
        part, inside = self._place_of(number)
        return self.parts[part][inside]

    def place_of(self, number: int) -> tuple[str, int]:
        """Prefix that a sample belongs to, and its number there."""
        part, inside = self._place_of(number)
        return self.parts[part].prefix, inside

    def _place_of(self, number: int) -> tuple[int, int]:
        part = self._part_of(number)
        return part, int(number) - (int(self._ends[part - 1]) if part else 0)

    def _part_of(self, number: int) -> int:
        return int(np.searchsorted(self._ends, number, side="right"))

    def samples(self, numbers: Sequence[int] | np.ndarray) -> list[Sample]:
        """The samples with these numbers, in their order."""
        return [self[int(n)] for n in numbers]

    def counts(self, numbers: Sequence[int]) -> dict[str, int]:
        """How many of these samples are of which part, by the part's name; empty if there is only one part."""
        if len(self.parts) == 1:
            return {}
        counts = np.bincount([self._part_of(n) for n in numbers], minlength=len(self.parts))
        return dict(zip(part_names([part.prefix for part in self.parts]), counts.tolist(), strict=True))


def part_names(prefixes: Sequence[str]) -> list[str]:
    """Short names of data sets: the last parts of their prefixes, or the whole prefixes if two of these are alike."""
    names = [Path(prefix).name for prefix in prefixes]
    return names if len(set(names)) == len(names) else list(prefixes)


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
    prefixes = [source.prefix for source in data_sources(data.data_path)]
    train = DataSet(prefixes, verify=data.verify_data, shape=plan.shape)
    held_out = None
    if data.valid_data_path is not None:
        held_out = DataSet([data.valid_data_path], verify=data.verify_data, shape=plan.shape)
    return RunData(train=train, held_out=held_out)


def mixture_lines(plan: RunPlan) -> list[str]:
    """What the log says of several data sets: their shares, and how often each is gone through; nothing of one."""
    assert plan.config.data.data_path is not None
    sources = data_sources(plan.config.data.data_path)
    if len(sources) == 1:
        return []
    sizes = [read_manifest(source.prefix).samples for source in sources]
    weights = [size if source.weight is None else source.weight for source, size in zip(sources, sizes, strict=True)]
    uses = plan.train_iters * plan.samples_per_step
    return [
        f"{weight / sum(weights):.1%} from {source.prefix}, {size} samples, each used {uses * weight / sum(weights) / size:.2g} "
        "times"
        for source, weight, size in zip(sources, weights, sizes, strict=True)
    ]
