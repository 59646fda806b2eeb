"""Layers of the local spec, and what a layer saves for its backward.

At long context activations dominate memory, so whatever one pass over a tensor can recompute is not saved: the outputs of
norms and of the gated activation are dropped after the matmul that reads them, and recomputed when that matmul's backward
needs them. What remains are the layer's inputs, rotated queries and keys, values, the attention's output and the MLP's first
product: 2 H + 2 Q D + 2 K D + 2 F numbers per token and layer instead of 4 H + 3 Q D + 3 K D + 3 F.

Shape legend: H = hidden size, F = MLP width, Q/K = query/key-value heads, D = head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from megatron.core.jit import jit_fuser
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.nn.functional import silu

from megatron_longpo.model.fp8 import products_as_now
from megatron_longpo.model.offloading import HostActivations, keep


def recompute_in_backward(tensor: Tensor, make: Callable[[], Tensor]) -> AbstractContextManager[Any]:
    """Inside this context autograd does not save ``tensor``; ``make`` recomputes it when the backward needs it.

    Args:
        tensor: tensor that is not saved. It is recognised by its storage, so its views are not saved either.
        make: function that computes equal values from tensors that are saved anyway (``keep``); called without recording
            gradients.
    """
    storage, numel = tensor.untyped_storage().data_ptr(), tensor.numel()

    def pack(saved: Tensor) -> Any:
        if saved.untyped_storage().data_ptr() == storage and saved.numel() == numel:
            return saved.shape
        return saved

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return make().view(kept)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


# --------------------------------------------------------------------------------------------------
# Norm
# --------------------------------------------------------------------------------------------------


# torch's own fused kernels make one pass over the input instead of about ten.
_FUSED_NORM = hasattr(torch.ops.aten, "_fused_rms_norm")


def _normalised(x: Tensor, weight: Tensor, scale: Tensor, eps: float) -> Tensor:
    if x.is_cuda and _FUSED_NORM:
        return torch.ops.aten._fused_rms_norm(x, [x.shape[-1]], weight, eps)[0]
    # Rounded to the working precision before the weight, as Hugging Face's Llama does.
    return (x.float() * scale).to(x.dtype).mul_(weight)


class _RMSNormFunction(torch.autograd.Function):
    """Saves the input and one number per place; the backward recomputes the normalised activations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        # Norms of heads get views of the fused projection, which would stay in memory as a whole.
        x = x.contiguous()
        if x.is_cuda and _FUSED_NORM:
            normed, scale = torch.ops.aten._fused_rms_norm(x, [x.shape[-1]], weight, eps)
        else:
            scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
            normed = _normalised(x, weight, scale, eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.mark_non_differentiable(scale)
        return normed, scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        if x.is_cuda and _FUSED_NORM:
            return *torch.ops.aten._fused_rms_norm_backward(grad, x, [x.shape[-1]], scale, weight, [True, True]), None
        normal = x.float() * scale
        grad_wide = grad.float()
        grad_weight = (grad_wide * normal).flatten(0, -2).sum(0)
        inner = grad_wide * weight.float()
        # d/dx of x * r(x) with r = (mean x^2 + eps)^(-1/2): r * (g - n * mean(g * n)), n = x * r.
        grad_x = inner.addcmul_(normal, (inner * normal).mean(-1, keepdim=True), value=-1).mul_(scale)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm (arXiv 1910.07467). megatron-core's own local norm refuses sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = norm_weight(config, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNormFunction.apply(x, self.weight, self.eps)[0]


def norm_weight(config: TransformerConfig, hidden_size: int) -> torch.nn.Parameter:
    """Make the weight of a norm, [H]."""
    weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
    # Each tensor-parallel rank sees only its own places. Megatron sums the gradients of weights with this mark over the group.
    weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return weight


class NormFirst(torch.nn.Module):
    """To be put before the class of a column-parallel linear layer: norms the layer's input and does not save the norm's output.

    The weights have the names of Transformer Engine's layer of norm and product, which saves that output: 2 H numbers more per
    token and layer, 8 GiB for 32 layers of width 4096 and 16384 tokens (2.4 ``layernorm_linear.py``, ``ln_out``). Its plain
    linear layer saves the input as autograd does, so that it can be recomputed.
    """

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)  # type: ignore[call-arg]
        self.eps = config.layernorm_epsilon
        self.layer_norm_weight = norm_weight(config, input_size)

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Norm and project ``input_``, [s, 1, H]."""
        weight = self.layer_norm_weight
        normed, scale = _RMSNormFunction.apply(input_, weight, self.eps)
        x, r, w = keep(input_), keep(scale), weight.detach()
        with recompute_in_backward(normed, lambda: _normalised(x(), w, r(), self.eps)):
            return super().forward(normed, *args, **kwargs)  # type: ignore[misc]


class NormColumnParallelLinear(NormFirst, ColumnParallelLinear):
    """Norm and megatron-core's column-parallel linear layer in one module."""


def fuse_weight_gradients(chunk: torch.nn.Module) -> None:
    """Let megatron-core's linear layers add the gradients of 16-bit weights to an fp32 ``main_grad`` inside the product.

    Otherwise the product of each micro batch is rounded to 16 bits, by up to 2^-8 of it, and takes another pass to be added.
    megatron-core's DDP is told by ``grad_added_to_main_grad``: its hooks run as ever, on a gradient that they do not add.

    Args:
        chunk: model chunk that DDP has given its ``main_grad``.
    """
    for module in chunk.modules():
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear)) and module.weight is not None:
            main_grad = getattr(module.weight, "main_grad", None)
            module.gradient_accumulation_fusion = (
                main_grad is not None and main_grad.dtype == torch.float32 and module.weight.dtype.itemsize == 2
            )


# --------------------------------------------------------------------------------------------------
# MLP
# --------------------------------------------------------------------------------------------------


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up of the concatenated [..., gate and up]. Saves its input as Megatron's does, in fewer passes on the CPU."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        return _activated(both)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (both,) = ctx.saved_tensors
        if both.is_cuda:
            return _gate_gradient_in_one_pass(grad, both)
        gate, up = both.chunk(2, dim=-1)
        result = torch.empty_like(both)
        grad_gate, grad_up = result.chunk(2, dim=-1)
        torch.mul(grad, silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return result


def gated(both: Tensor) -> Tensor:
    """silu(gate) * up of the concatenated gate and up, [..., 2 F] to [..., F]."""
    return _SwiGLU.apply(both)


def set_recompute_up(layers: Iterable[torch.nn.Module], recomputed: int, wanted: bool) -> None:
    """Choose the MLPs that recompute their up-projection: those in layers that are not recomputed as a whole.

    Args:
        layers: layers of a pipeline stage.
        recomputed: number of layers, from the first, that are recomputed as a whole.
        wanted: whether ``mlp_up`` is among the modules to recompute.
    """
    for number, layer in enumerate(layers):
        mlp = layer.mlp
        assert isinstance(mlp, GatedMLP)
        mlp.recompute_up = wanted and number >= recomputed


def _activated(both: Tensor) -> Tensor:
    if both.is_cuda:
        return _gate_in_one_pass(both)
    gate, up = both.chunk(2, dim=-1)
    return silu(gate).mul_(up)


@jit_fuser
def _gate_in_one_pass(both: Tensor) -> Tensor:
    gate, up = both.float().chunk(2, dim=-1)
    return (silu(gate) * up).to(both.dtype)


@jit_fuser
def _gate_gradient_in_one_pass(grad: Tensor, both: Tensor) -> Tensor:
    gate, up = both.float().chunk(2, dim=-1)
    sigmoid, wide = gate.sigmoid(), grad.float()
    grad_gate = wide * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([grad_gate, wide * gate * sigmoid], dim=-1).to(both.dtype)


class GatedMLP(MLP):
    """megatron-core's MLP with SwiGLU; the backward of the down-projection recomputes the activated tensor.

    Attributes:
        recompute_up: recompute the up-projection as well (``recompute_modules`` with ``mlp_up``). Then nothing of the MLP's
            width is saved, which is more than half of what a layer saves, at the cost of one more product besides the nine
            of that width in a step.
    """

    recompute_up = False

    def __init__(self, *args: Any, pg_collection: Any = None, tp_group: Any = None, **kwargs: Any) -> None:
        # megatron-core 0.19 passes only the group to an MLP class of its own, and all groups to one that it does not know.
        kwargs.pop("is_mtp_layer", None)
        group = tp_group if pg_collection is None else pg_collection.tp
        super().__init__(*args, tp_group=group, **kwargs)

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor | None]:
        """Map [s, 1, H] to [s, 1, H]; the second value, a bias, is always None."""
        both, bias = self.linear_fc1(hidden_states)
        assert bias is None
        if not self.recompute_up:
            kept = keep(both)
            activated = gated(both)
            with recompute_in_backward(activated, lambda: _activated(kept())):
                return self.linear_fc2(activated)
        x, products = keep(hidden_states), products_as_now(self.config)
        # Recomputed for the down-projection's backward and used by the activation's, which comes right after it.
        waiting: list[Tensor] = []

        def make_both() -> Tensor:
            if waiting:
                return waiting.pop()
            with products():
                return self.linear_fc1(x())[0]  # type: ignore[no-any-return]

        def make_activated() -> Tensor:
            waiting.append(make_both())
            return _activated(waiting[0])

        with recompute_in_backward(both, make_both):
            activated = gated(both)
        del both
        with recompute_in_backward(activated, make_activated):
            return self.linear_fc2(activated)


# --------------------------------------------------------------------------------------------------
# The layer
# --------------------------------------------------------------------------------------------------


class PolicyLayer(TransformerLayer):
    """megatron-core's layer, whose saved tensors may wait in host memory.

    Attributes:
        number: its number in the model chunk.
        host_activations: who offloads the chunk's layers; None: nobody.
    """

    number: int
    host_activations: HostActivations | None = None

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """Map hidden states, [s, 1, H], to hidden states and a context, which is None."""
        if self.host_activations is None:
            return super().forward(*args, **kwargs)  # type: ignore[no-any-return]
        plan = kwargs["packed_seq_params"]
        return self.host_activations.run(
            self.number,
            lambda: super(PolicyLayer, self).forward(*args, **kwargs),
            [*self.parameters(), plan.cos_sR, plan.sin_sR],
        )


def offload_layers(layers: Iterable[torch.nn.Module], first: int, count: int) -> None:
    """Have what some layers of a model chunk save wait in host memory, of all but the chunk's last layer.

    Args:
        layers: layers of the chunk.
        first, count: number of the first layer, and how many.
    """
    layers = list(layers)
    count = min(count, len(layers) - 1 - first)
    if count <= 0:
        return
    host_activations = HostActivations(first, count)
    for number, layer in enumerate(layers):
        assert isinstance(layer, PolicyLayer)
        layer.number, layer.host_activations = number, host_activations
