"""One launch of the parity matrix, small enough to run on every supported pair of Python and megatron-core."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.conftest import HERE
from tests.support import ROOT, environment, run, torchrun

CASES = ("tp2-sp-pp2-vpp2", "dp2-cp2-distopt-online", "dp2-pp2-vpp2", "cp4-allgather-micro2")


@pytest.mark.megatron_latest
def test_four_processes_agree_with_one(parity_folder: Path) -> None:
    environ = environment(PYTHONPATH=f"{ROOT}:{HERE}")
    worker = [str(HERE / "worker.py"), str(parity_folder), "qwen2"]
    run(torchrun(1, *worker, "one"), env=environ)
    expected = torch.load(parity_folder / "results-qwen2-1.pt", weights_only=False)["one"]
    run(torchrun(4, *worker, *CASES), env=environ)
    results = torch.load(parity_folder / "results-qwen2-4.pt", weights_only=False)
    assert set(results) == set(CASES)
    for name, found in results.items():
        assert found["metrics"]["loss"] == pytest.approx(expected["metrics"]["loss"], rel=1e-5)
        for key, value in expected["gradients"].items():
            assert (found["gradients"][key] - value).norm() <= 1e-5 * value.norm(), (name, key)
