"""FP8 products in Transformer Engine's linear layers (``fp8_format``): what they demand, and where they are off.

A training step's linear layers multiply in FP8, forward and backward. Everything else is in bfloat16: attention, norms, the gate,
log-probs with the output weight, and every forward without gradients, so that the reference's log-probs and the figures of
held-out data do not depend on it.

Scales are those of the tensor that is multiplied (``fp8_recipe=tensorwise``), so a product that is computed again gives the same
numbers, and a checkpoint needs no state of it. Layers keep their inputs as they were given, as in bfloat16, and not an FP8 copy
of them: what ``layers.py`` recomputes is then not kept in either type.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_te_version, is_te_min_version

from megatron_longpo.config import TrainingConfig
from megatron_longpo.errors import ConfigError, one_line
from megatron_longpo.model.implementation import linear_error
from megatron_longpo.model.shape import ModelShape
from megatron_longpo.runtime import platform

# Rows and columns of an FP8 matrix come in multiples of this (megatron.core.fp8_utils.get_fp8_align_size).
_ALIGNMENT = 16
# Ada. The first with FP8 in its tensor cores.
_LEAST_CAPABILITY = (8, 9)
# The first whose layers can keep their inputs as they were given (``save_original_input``).
_LEAST_VERSION = "2.6.0"
# E4M3 rounds by up to 2^-4 and E5M2 by up to 2^-3, in the mean square 2.6% and 5.2%: products of E4M3 numbers are off by 3.7%,
# those of one of each by 5.8%.
_BOUND = 0.12


def alignment(training: TrainingConfig) -> int:
    """Places of a rank are a multiple of this; the rest is padding, which never counts."""
    return _ALIGNMENT if training.fp8_format else 1


def check_fp8(shape: ModelShape, tensor_size: int) -> None:
    """Check that this machine has FP8 products, and that they take the model.

    Args:
        shape: shape of the model.
        tensor_size: tensor-parallel size.

    Raises:
        ConfigError: they are not there, or do not.
    """
    capability = platform.CURRENT.capability()
    if capability is None or capability < _LEAST_CAPABILITY:
        found = "the CPU" if capability is None else f"a GPU of compute capability {'.'.join(map(str, capability))}"
        raise ConfigError(
            f"fp8_format=hybrid needs a GPU of compute capability {'.'.join(map(str, _LEAST_CAPABILITY))} or higher, and this is "
            f"{found}; leave fp8_format out"
        )
    if not is_te_min_version(_LEAST_VERSION):
        raise ConfigError(
            f"fp8_format=hybrid needs Transformer Engine {_LEAST_VERSION} or later, not {get_te_version()}; install it, or leave "
            "fp8_format out"
        )
    check_fp8_widths(shape, tensor_size)


def check_fp8_widths(shape: ModelShape, tensor_size: int) -> None:
    """Check that FP8 products take the model, whatever the machine.

    Args:
        shape: shape of the model.
        tensor_size: tensor-parallel size.

    Raises:
        ConfigError: the sides of a rank's matrices are not multiples of 16.
    """
    widths = {
        "hidden_size": shape.hidden_size,
        "width of the queries": shape.query_width // tensor_size,
        "width of queries, keys and values": (shape.query_width + 2 * shape.kv_width) // tensor_size,
        "ffn_hidden_size": shape.ffn_hidden_size // tensor_size,
    }
    for name, width in widths.items():
        if width % _ALIGNMENT:
            raise ConfigError(
                f"fp8_format=hybrid multiplies matrices whose sides are multiples of {_ALIGNMENT}, and a rank's {name} is "
                f"{width} with tensor_model_parallel_size={tensor_size}; lower that, or leave fp8_format out"
            )


def check_fp8_products(config: TransformerConfig) -> None:
    """Check that FP8 products are those of plain mathematics but for their rounding, in a layer that keeps its input as given.

    Raises:
        ConfigError: they are not, or Transformer Engine fails.
    """
    try:
        engine = importlib.import_module("transformer_engine.pytorch")
        error = linear_error(engine, platform.CURRENT.device, products_as_now(config), prepare=keep_inputs_as_given)
    except Exception as failure:  # a kernel that is missing or not built for this card fails in many ways
        raise ConfigError(
            f"fp8_format={config.fp8}: Transformer Engine's FP8 products fail ({one_line(failure, 160)}); leave fp8_format out"
        ) from failure
    # NaN is too large as well.
    if not error <= _BOUND:
        raise ConfigError(
            f"fp8_format={config.fp8}: Transformer Engine's FP8 products differ from plain mathematics by {error:.1e}, and "
            f"rounding is less than {_BOUND}; leave fp8_format out"
        )


def fp8_settings(training: TrainingConfig) -> dict[str, Any]:
    """megatron-core's settings; none without FP8."""
    if not training.fp8_format:
        return {}
    return {
        "fp8": training.fp8_format,
        "fp8_recipe": training.fp8_recipe,
        # FP8 copies of the weights would else be kept from a step's first micro batch to its last, also over a reference that
        # takes their place.
        "disable_parameter_transpose_cache": True,
    }


def keep_inputs_as_given(module: torch.nn.Module) -> None:
    """Let the linear layers of a chunk, or one layer, save their inputs themselves for the backward, not FP8 copies of them."""
    for layer in module.modules():
        if hasattr(layer, "save_original_input"):
            layer.save_original_input = True  # type: ignore[assignment]


def products_as_now(config: TransformerConfig) -> Callable[[], AbstractContextManager[Any]]:
    """Contexts in which products have the type that they have at this moment, for computing them again in the backward."""
    return functools.partial(get_fp8_context, config) if config.fp8 else contextlib.nullcontext


@contextlib.contextmanager
def fp8_for_gradients_only(config: TransformerConfig) -> Iterator[None]:
    """In this context, products are in FP8 only if gradients are recorded."""
    fp8 = config.fp8
    if not torch.is_grad_enabled():
        config.fp8 = None
    try:
        yield
    finally:
        config.fp8 = fp8
