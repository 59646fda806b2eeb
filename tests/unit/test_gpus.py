"""The tests themselves on a machine with GPUs: what has too few of them is skipped with its reason."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.support import gpus, launch


def test_launches_with_more_ranks_than_gpus_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus.platform, "CURRENT", SimpleNamespace(is_cuda=True))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert launch.torchrun(2, "program.py")[3] == "--nproc-per-node=2"
    with pytest.raises(pytest.skip.Exception, match="4 ranks need 4 GPUs, and this machine has 2"):
        launch.torchrun(4, "program.py")


def test_without_gpus_every_launch_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus.platform, "CURRENT", SimpleNamespace(is_cuda=False))
    assert gpus.too_few(4) is None
