"""What tests do where there are GPUs: the same launches on CUDA, with a GPU for each rank."""

from __future__ import annotations

import torch

from megatron_longpo.runtime import platform


def too_few(processes: int) -> str | None:
    """Why a launch cannot run on this machine's platform, for the list of skipped tests; None: it can.

    NCCL refuses two ranks on one GPU.
    """
    if not platform.CURRENT.is_cuda:
        return None
    count = torch.cuda.device_count()
    return None if processes <= count else f"{processes} ranks need {processes} GPUs, and this machine has {count}"
