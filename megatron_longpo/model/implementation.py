"""Whose linear layers a model has: Transformer Engine's where they compute right, else megatron-core's own.

Weights, checkpoint keys and mathematics are the same, so ranks may choose differently.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from megatron_longpo.errors import ConfigError, one_line
from megatron_longpo.runtime import platform

# A bf16 number is rounded by up to 2^-8 of it; a product of 64 terms has a relative error of about as much.
_BOUND = 2e-2


@dataclass(frozen=True)
class LayerChoice:
    """Linear layers, and why they were chosen.

    Attributes:
        is_transformer_engine: whether they are Transformer Engine's.
        reason: why, for the log.
    """

    is_transformer_engine: bool
    reason: str

    @property
    def name(self) -> str:
        return "transformer_engine" if self.is_transformer_engine else "local"


def choose_layers(transformer_impl: str) -> LayerChoice:
    """Choose the linear layers.

    Args:
        transformer_impl: ``auto``, ``local`` or ``transformer_engine``.

    Raises:
        ConfigError: Transformer Engine is asked for and cannot be used.
    """
    if transformer_impl == "local":
        return LayerChoice(False, "transformer_impl=local")
    trouble = _trouble()
    if trouble is None:
        return LayerChoice(True, "it agrees with torch on this machine")
    if transformer_impl == "transformer_engine":
        raise ConfigError(f"transformer_impl=transformer_engine cannot be used: {trouble}; use local or auto")
    return LayerChoice(False, trouble)


@functools.lru_cache(maxsize=1)
def _trouble() -> str | None:
    """Why Transformer Engine cannot be used here; None: it can."""
    if not platform.CURRENT.is_cuda:
        return f"Transformer Engine needs CUDA, and the platform is {platform.CURRENT.name}"
    try:
        engine = importlib.import_module("transformer_engine.pytorch")
    except ImportError:
        return "Transformer Engine is not installed"
    except Exception as error:  # built for another torch or CUDA, it fails in many ways
        return f"Transformer Engine cannot be imported ({one_line(error, 160)})"
    try:
        error_found = linear_error(engine, platform.CURRENT.device)
    except Exception as error:
        return f"Transformer Engine's linear layer fails ({one_line(error, 160)})"
    # NaN is too large as well.
    if not error_found <= _BOUND:
        return f"Transformer Engine's linear layer differs from torch's by {error_found:.1e}"
    return None


def linear_error(
    engine: Any,
    device: torch.device,
    products: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    *,
    prepare: Callable[[torch.nn.Module], None] | None = None,
) -> float:
    """Largest relative error of the linear layer of ``transformer_engine.pytorch`` in bf16, of its output and its gradients.

    Args:
        engine: the module.
        device: device of the layer.
        products: context of its forward.
        prepare: function that sets the layer up.
    """
    generator = torch.Generator().manual_seed(1)
    x, weight, grad = (torch.randn(*shape, generator=generator).to(device) for shape in ((32, 64), (96, 64), (32, 96)))
    layer = engine.Linear(64, 96, bias=False, params_dtype=torch.bfloat16, device=device)
    if prepare is not None:
        prepare(layer)
    with torch.no_grad():
        layer.weight.copy_(weight)
    given = x.bfloat16().requires_grad_()
    with torch.enable_grad():
        with products():
            out = layer(given)
        out.backward(grad.bfloat16())
    found = (out.detach(), given.grad, layer.weight.grad)
    x, weight, grad = (t.bfloat16().double() for t in (x, weight, grad))
    expected = (x @ weight.t(), grad @ weight, grad.t() @ x)
    return max(float((f.double() - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True))
