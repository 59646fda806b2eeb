"""Errors that are rounding, by type: for kernels, and for whole steps, here and in the tests that run on either platform."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Bounds:
    """Largest relative errors.

    Attributes:
        kernel: of a kernel's output or gradient against plain mathematics in fp32 on the same inputs.
        step: of the gradients of a whole step in another layout, all together, against one process in fp32.
        loss: of the loss of that step.
    """

    kernel: float
    step: float
    loss: float


# Kernels: three to ten times what was seen (docs/gpu.md: 3.4e-3 in bf16, 4.3e-4 in fp16, 8.7e-7 in fp32).
_BOUNDS = {
    torch.float64: Bounds(kernel=1e-10, step=1e-9, loss=1e-9),
    torch.float32: Bounds(kernel=1e-5, step=1e-5, loss=1e-5),
    torch.float16: Bounds(kernel=2e-3, step=1e-2, loss=1e-3),
    torch.bfloat16: Bounds(kernel=1e-2, step=5e-2, loss=5e-3),
}
# Kernels of a GPU sum in an order of their own, and the oracle is on the CPU.
_CUDA_FP32 = Bounds(kernel=2e-5, step=1e-4, loss=1e-5)


def bounds_of(dtype: torch.dtype, device_type: str) -> Bounds:
    """Bounds for a type on a device.

    Args:
        dtype: type that is computed in.
        device_type: ``cpu`` or ``cuda``.
    """
    return _CUDA_FP32 if dtype == torch.float32 and device_type == "cuda" else _BOUNDS[dtype]
