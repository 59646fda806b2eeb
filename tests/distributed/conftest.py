"""One launch a process count runs every case of every family; the tests read its numbers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import FAMILIES, ROOT, environment, make_data, make_model, run, torchrun

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))


@pytest.fixture(scope="session")
def parity_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, their checkpoints and the data that all cases train on."""
    from megatron_longpo.checkpoint.convert import import_hf

    folder = tmp_path_factory.mktemp("parity")
    for family in FAMILIES:
        make_model(family, folder / family)
        import_hf(folder / family, folder / f"{family}.ckpt")
    make_data(folder / "data", 8)
    return folder


@pytest.fixture(scope="session")
def results(parity_folder: Path) -> dict[str, dict[str, Any]]:
    """Family -> case -> numbers, of the launches of 1, 2, 3 and 4 processes."""
    collected: dict[str, dict[str, Any]] = {family: {} for family in FAMILIES}
    environ = environment(PYTHONPATH=f"{ROOT}:{HERE}")
    for processes in (1, 2, 3, 4):
        run(torchrun(processes, str(HERE / "worker.py"), str(parity_folder), ",".join(FAMILIES)), env=environ)
        for family in FAMILIES:
            path = parity_folder / f"results-{family}-{processes}.pt"
            collected[family].update(torch.load(path, weights_only=False))
    return collected
