"""What tests do where there are GPUs: launches run on CUDA, with a GPU for each rank; the tests' own process stays on the CPU.

So oracles, and whatever a unit test computes, are in fp32 on the CPU on every machine, and what is launched is compared with them
there. Tests of CUDA's own kernels are run by a process on CUDA that one of the tests starts (``tests/unit/test_gpus.py``).

``tests/conftest.py`` imports this module before anything imports the platform, which replaces functions of ``torch.cuda``.
"""

from __future__ import annotations

import os

import torch

PLATFORM = "MEGATRON_LONGPO_PLATFORM"
# For processes that the tests start: how many GPUs there are, and the platform of their own tests.
_COUNTED, _TESTS_ON = "MEGATRON_LONGPO_TEST_GPUS", "MEGATRON_LONGPO_TESTS_ON"
# Ranks that two cores can bear.
MOST_ON_CPU = 4


def _count() -> int:
    if _COUNTED in os.environ:
        return int(os.environ[_COUNTED])
    if os.environ.get(PLATFORM, "auto").lower() == "cpu" or not torch.cuda.is_available():
        return 0
    return torch.cuda.device_count()


COUNT = _count()
# Device of launches, whose type and GPU decide the bounds of their numbers.
DEVICE = "cuda" if COUNT else "cpu"


def stay_on_the_cpu() -> None:
    """Have this process, and those of pytest-xdist that it starts, run on the CPU where launches run on CUDA."""
    if COUNT:
        os.environ[_COUNTED] = str(COUNT)
        os.environ[PLATFORM] = os.environ.get(_TESTS_ON, "cpu")


def launched() -> dict[str, str]:
    """Environment of what tests launch: on CUDA where there are GPUs, with fp32 products in fp32 (NGC's containers have TF32)."""
    return {PLATFORM: "cuda", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0"} if COUNT else {}


def tests_on_cuda() -> dict[str, str]:
    """Environment of a pytest whose own process is on CUDA."""
    return {**launched(), _TESTS_ON: "cuda"}


def too_few(processes: int) -> str | None:
    """Why a launch cannot run on this machine, for the list of skipped tests; None: it can.

    NCCL refuses two ranks on one GPU.
    """
    if not COUNT and processes > MOST_ON_CPU:
        return f"{processes} ranks need {processes} GPUs, and this machine has none"
    if COUNT and processes > COUNT:
        return f"{processes} ranks need {processes} GPUs, and this machine has {COUNT}"
    return None
