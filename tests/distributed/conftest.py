"""One launch a process count and family runs all its cases; the tests read the numbers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import FAMILIES, ROOT, VARIANTS, environment, make_data, make_model, run, torchrun

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))


@pytest.fixture(scope="session")
def parity_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, their checkpoints and the data that all cases train on."""
    from megatron_longpo.conversion.convert import import_hf

    folder = tmp_path_factory.mktemp("parity")
    for family in FAMILIES + VARIANTS:
        make_model(family, folder / family)
        import_hf(folder / family, folder / f"{family}.ckpt")
    make_data(folder / "data", 8)
    make_data(folder / "held_out", 7, seed=5)
    return folder


class Results(dict[str, dict[str, Any]]):
    """Family -> case -> numbers; a family's launches of 1, 2, 3 and 4 processes run when it is first asked for.

    A launch a family: megatron-core's groups are never destroyed, and gloo's threads with them.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def __missing__(self, family: str) -> dict[str, Any]:
        # Variants have few cases each: they share their launches.
        together = VARIANTS if family in VARIANTS else (family,)
        for each in together:
            self[each] = {}
        for processes in (1, 2, 4) if family in VARIANTS else (1, 2, 3, 4):
            worker = [str(HERE / "worker.py"), str(self._folder), ",".join(together)]
            run(torchrun(processes, *worker), env=environment(PYTHONPATH=f"{ROOT}:{HERE}"))
            for each in together:
                path = self._folder / f"results-{each}-{processes}.pt"
                self[each].update(torch.load(path, weights_only=False))
        return self[family]


@pytest.fixture(scope="session")
def results(parity_folder: Path) -> Results:
    """Numbers of all cases."""
    return Results(parity_folder)
