"""Products that are added to an fp32 sum without being rounded to 16 bits on the way: gradients of weights.

Shape legend: N = rows that are summed over, I/O = width of a linear layer's input and output.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Whether torch has matmuls of 16-bit matrices with fp32 output (CUDA only; seen in torch 2.11, 2.13 and 2.14).
HAVE_WIDE = "dtype_out" in torch.ops.aten.mm.overloads() and "dtype_out" in torch.ops.aten.addmm.overloads()
# Numbers that are widened at a time where the product itself cannot add in fp32.
_WIDENED = 2**22


def are_fused(device: torch.device) -> bool:
    """Whether one kernel multiplies 16-bit matrices and adds the result to an fp32 sum."""
    return device.type == "cuda" and HAVE_WIDE


def add_product(total_OI: Tensor, grad_NO: Tensor, input_NI: Tensor) -> None:
    """total += grad.T @ input, in fp32.

    Where no kernel does so the matrices are widened, which on a CPU with bfloat16 arithmetic takes four times as long as a
    rounded product (one core of an EPYC with AVX512-BF16, matrices of 512 x 512 and 512 x 768: 4.4 ms instead of 1.2).

    Args:
        total_OI: fp32 sum.
        grad_NO: gradient of a linear layer's output, 16 bits or fp32.
        input_NI: the layer's input, of the same type.
    """
    if grad_NO.dtype == torch.float32:
        total_OI.addmm_(grad_NO.t(), input_NI)
    elif are_fused(total_OI.device):
        torch.ops.aten.addmm.dtype_out(total_OI, grad_NO.t(), input_NI, torch.float32, out=total_OI)
    else:
        rows = max(1, _WIDENED // (grad_NO.shape[1] + input_NI.shape[1]))
        for grad, given in zip(grad_NO.split(rows), input_NI.split(rows), strict=True):
            total_OI.addmm_(grad.t().float(), given.float())


class FusedWeightGradient:
    """The functions of Apex's extension ``fused_weight_gradient_mlp_cuda`` that megatron-core's linear layers call."""

    @staticmethod
    def wgrad_gemm_accum_fp32(total_input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
        """Add the gradient of a weight to its ``main_grad``; arguments as the extension has them."""
        add_product(main_grad, grad_output, total_input)
