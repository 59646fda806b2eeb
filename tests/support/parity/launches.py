"""Launches of the parity matrix: each runs the wanted cases of a world size at once; the tests read the numbers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_longpo.conversion.import_hf import import_hf
from tests.support.data import make_data
from tests.support.gpus import too_few
from tests.support.launch import Running, torchrun
from tests.support.models import FAMILIES, VARIANTS, make_model
from tests.support.parity.cases import CASES


def make_inputs(folder: Path) -> None:
    """Models, their checkpoints and the data that all cases train on."""
    for family in FAMILIES + VARIANTS:
        make_model(family, folder / family)
        import_hf(folder / family, folder / f"{family}.ckpt")
    make_data(folder / "data", 8)
    make_data(folder / "few", 3, seed=6, weights=[2.0, 0.5, 1.0])
    make_data(folder / "held_out", 7, seed=5)


class Launch:
    """Cases of one world size, started; ``finish`` waits for them.

    Args:
        folder: what ``make_inputs`` has filled.
        processes: world size.
        families: model families to run.
        names: names of the cases (default: all of that world size).
    """

    def __init__(self, folder: Path, processes: int, families: Sequence[str], names: Sequence[str] = ()) -> None:
        worker = ["tests.support.parity.worker", str(folder), ",".join(families), *names]
        self._running = Running(torchrun(processes, "-m", *worker))
        self._numbers = {family: folder / f"results-{family}-{processes}.pt" for family in families}

    def finish(self) -> dict[str, dict[str, Any]]:
        """Family -> case -> numbers."""
        self._running.wait()
        return {family: torch.load(path, weights_only=False) for family, path in self._numbers.items()}


class Results(dict[str, dict[str, Any]]):
    """Family -> case -> numbers; the launches of a family run when it is first asked for.

    Args:
        folder: what ``make_inputs`` has filled.
        names: names of the cases to run.
    """

    def __init__(self, folder: Path, names: Collection[str]) -> None:
        super().__init__()
        self._folder = folder
        self._cases = [case for case in CASES if case.name in names]

    def __missing__(self, family: str) -> dict[str, Any]:
        # Variants have few cases each: they share their launches.
        together = VARIANTS if family in VARIANTS else (family,)
        cases = [case for case in self._cases if not set(together).isdisjoint(case.families)]
        names = [case.name for case in cases]
        sizes = sorted({case.processes for case in cases if not too_few(case.processes)})
        # The launch of one process would leave a core idle: it runs beside the others.
        alone = Launch(self._folder, sizes[0], together, names)
        others = [Launch(self._folder, n, together, names).finish() for n in sizes[1:]]
        for found in (alone.finish(), *others):
            for each, numbers in found.items():
                self.setdefault(each, {}).update(numbers)
        return self[family]
