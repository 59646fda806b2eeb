"""The tests themselves on a machine with GPUs: where launches run, their bounds, and what is skipped with which reason."""

from __future__ import annotations

import os

import pytest
import torch

from megatron_longpo.doctor.bounds import bounds_of
from tests.support import gpus, launch
from tests.support.launch import PYTHON, environment, run
from tests.support.parity.cases import CASES


def _with(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    for name in ("MEGATRON_LONGPO_TEST_GPUS", "MEGATRON_LONGPO_TESTS_ON", gpus.PLATFORM):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(gpus, "COUNT", gpus._count())


def test_launches_with_more_ranks_than_gpus_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    _with(monkeypatch, 2)
    assert launch.torchrun(2, "program.py")[3] == "--nproc-per-node=2"
    with pytest.raises(pytest.skip.Exception, match="4 ranks need 4 GPUs, and this machine has 2"):
        launch.torchrun(4, "program.py")


def test_without_gpus_every_launch_of_at_most_four_ranks_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    _with(monkeypatch, 0)
    assert gpus.too_few(4) is None
    assert gpus.too_few(8) == "8 ranks need 8 GPUs, and this machine has none"
    assert gpus.launched() == {} and gpus.PLATFORM not in environment()


def test_with_eight_gpus_no_case_of_the_parity_matrix_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    _with(monkeypatch, 8)
    assert {case.processes for case in CASES} == {1, 2, 3, 4, 8}
    assert [case.name for case in CASES if gpus.too_few(case.processes)] == []


def test_launches_are_on_cuda_and_the_tests_own_processes_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    _with(monkeypatch, 2)
    gpus.stay_on_the_cpu()
    assert os.environ[gpus.PLATFORM] == "cpu" and environment()[gpus.PLATFORM] == "cuda"
    # A process of pytest-xdist inherits the variables, and must not take the CPU for all there is.
    assert gpus._count() == 2
    # Unless it is there for the kernels of CUDA.
    for name, value in environment(**gpus.tests_on_cuda()).items():
        monkeypatch.setenv(name, value)
    gpus.stay_on_the_cpu()
    assert os.environ[gpus.PLATFORM] == "cuda"


def test_whoever_asks_for_the_cpu_gets_it_where_there_are_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    _with(monkeypatch, 2)
    monkeypatch.setenv(gpus.PLATFORM, "cpu")
    assert gpus._count() == 0


def test_bounds_depend_on_type_and_device() -> None:
    assert bounds_of(torch.float32, "cpu").step == 1e-5
    order = [bounds_of(t, "cuda") for t in (torch.float64, torch.float32, torch.float16, torch.bfloat16)]
    for name in ("kernel", "step", "loss"):
        values = [getattr(bounds, name) for bounds in order]
        assert values == sorted(values) and len(set(values)) == 4
    assert bounds_of(torch.bfloat16, "cpu") == bounds_of(torch.bfloat16, "cuda")


@pytest.mark.skipif(not gpus.COUNT, reason="the real kernels need a GPU")
def test_the_tests_of_real_kernels_pass_in_a_process_on_cuda() -> None:
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/unit/test_kernels.py", "-k", "real_kernels"]
    done = run([PYTHON, *arguments], env=environment(**gpus.tests_on_cuda()), fresh=True)
    assert " passed" in done.stdout and "skipped" not in done.stdout
