"""One launch of the parity matrix, small enough to run on every supported pair of Python and megatron-core."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_longpo.doctor.bounds import bounds_of
from tests.support import gpus
from tests.support.parity.launches import Launch

CASES = ("tp2-sp-pp2-vpp2", "tp2-pp2-first3", "dp2-cp2-distopt-online", "dp2-pp2-vpp2", "cp4-allgather-micro2")


@pytest.mark.megatron_latest
def test_four_processes_agree_with_one(parity_folder: Path) -> None:
    alone = Launch(parity_folder, 1, ["qwen2"], ["one"])
    results = Launch(parity_folder, 4, ["qwen2"], CASES).finish()["qwen2"]
    expected = alone.finish()["qwen2"]["one"]
    assert set(results) == set(CASES)
    bounds = bounds_of(torch.float32, gpus.DEVICE)
    for name, found in results.items():
        assert found["metrics"]["loss"] == pytest.approx(expected["metrics"]["loss"], rel=bounds.loss)
        for key, value in expected["gradients"].items():
            assert (found["gradients"][key] - value).norm() <= bounds.step * value.norm(), (name, key)
