"""Launches of the parity matrix: each world size runs all its cases at once; the tests read the numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_longpo.conversion.convert import import_hf
from tests.support.data import make_data
from tests.support.launch import run, torchrun
from tests.support.models import FAMILIES, VARIANTS, make_model


def make_inputs(folder: Path) -> None:
    """Models, their checkpoints and the data that all cases train on."""
    for family in FAMILIES + VARIANTS:
        make_model(family, folder / family)
        import_hf(folder / family, folder / f"{family}.ckpt")
    make_data(folder / "data", 8)
    make_data(folder / "held_out", 7, seed=5)


def run_cases(folder: Path, processes: int, families: tuple[str, ...], *names: str) -> dict[str, dict[str, Any]]:
    """Run the cases of one world size.

    Args:
        folder: what ``make_inputs`` has filled.
        processes: world size.
        families: model families to run.
        names: names of the cases (default: all of that world size).

    Returns:
        Family -> case -> numbers.
    """
    run(torchrun(processes, "-m", "tests.support.parity.worker", str(folder), ",".join(families), *names))
    return {f: torch.load(folder / f"results-{f}-{processes}.pt", weights_only=False) for f in families}


class Results(dict[str, dict[str, Any]]):
    """Family -> case -> numbers; the launches of a family run when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def __missing__(self, family: str) -> dict[str, Any]:
        # Variants have few cases each: they share their launches.
        together = VARIANTS if family in VARIANTS else (family,)
        for processes in (1, 2, 4) if family in VARIANTS else (1, 2, 3, 4):
            for each, numbers in run_cases(self._folder, processes, together).items():
                self.setdefault(each, {}).update(numbers)
        return self[family]
