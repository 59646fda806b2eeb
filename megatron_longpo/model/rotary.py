"""Rotary embeddings (arXiv 2104.09864) and their scalings, for any positions: branches, shards, packs.

Every form is a vector of inverse frequencies and one factor for cosines and sines. Both are computed as transformers does, in
the same precision and order, so that the two models agree to the last bit. Supported values of ``rope_type`` and the numbers
that each needs:

- ``default``: none.
- ``linear``: ``factor`` (arXiv 2306.15595).
- ``llama3``: ``factor``, ``low_freq_factor``, ``high_freq_factor``, ``original_max_position_embeddings`` (Llama 3.1).
- ``yarn``: ``factor``, ``original_max_position_embeddings``; optional ``attention_factor``, ``beta_fast``, ``beta_slow``,
  ``mscale``, ``mscale_all_dim``, ``truncate`` (arXiv 2309.00071).

Shape legend: s = places, R = half the number of rotated channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_longpo.errors import CheckpointError, one_line
from megatron_longpo.model.shape import ModelShape
from megatron_longpo.runtime import platform

_NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
}

SCALING_KEYS = frozenset(
    {"rope_type", "type", "factor"}.union(*(set(keys) for keys in (*_NEEDED.values(), *_OPTIONAL.values())))
)


@dataclass(frozen=True)
class Rotary:
    """A rotary embedding.

    Attributes:
        inverse_frequencies_R: inverse frequencies, [R] in fp32.
        scale: factor of cosines and sines (YaRN's attention factor).
    """

    inverse_frequencies_R: Tensor
    scale: float = 1.0

    def cos_sin(self, positions_s: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Compute cosines and sines, [s, R] each, of positions [s]. Angles are computed in fp32."""
        angles = positions_s.float().unsqueeze(1) * self.inverse_frequencies_R
        return (angles.cos() * self.scale).to(dtype), (angles.sin() * self.scale).to(dtype)


def check_scaling(scaling: dict[str, Any], source: str) -> dict[str, Any] | None:
    """Extract the numbers that a ``rope_scaling`` or ``rope_parameters`` needs; None if RoPE is not scaled.

    Raises:
        CheckpointError: the ``rope_type`` is unknown, or a number is missing or not positive.
    """
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if not isinstance(kind, str) or kind not in _NEEDED:
        raise CheckpointError(
            f"{source}: rope_type={one_line(repr(kind), 40)} is not supported; supported: {', '.join(_NEEDED)}"
        )
    if kind == "default":
        return None
    found: dict[str, Any] = {"rope_type": kind}
    for key in (*_NEEDED[kind], *_OPTIONAL.get(kind, ())):
        value = scaling.get(key)
        if value is None and key not in _NEEDED[kind]:
            continue
        if key == "truncate" and isinstance(value, bool):
            found[key] = value
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise CheckpointError(f"{source}: rope_type={kind!r} needs {key} > 0, found {value!r}")
        else:
            found[key] = value
    return found


def changed_scaling(
    shape: ModelShape, rope_type: str | None, numbers: dict[str, Any], source: str
) -> dict[str, Any] | None:
    """Scaling of a model whose RoPE scaling the user changes.

    Args:
        shape: shape of the model before the change. Its longest context is the original one unless a number says otherwise.
        rope_type: new type; None keeps the model's own scaling.
        numbers: numbers by the names above; None means not given.
        source: name of where they come from, for errors.

    Raises:
        CheckpointError: numbers are given without a type, or a number is missing, not positive or unknown to the type.
    """
    given = {k: v for k, v in numbers.items() if v is not None}
    if rope_type is None:
        for name, value in given.items():
            raise CheckpointError(f"{source}: {name}={value} without rope_type; give rope_type={' or '.join(_NEEDED)}")
        return shape.rope_scaling
    known = {*_NEEDED.get(rope_type, given), *_OPTIONAL.get(rope_type, ())}
    foreign = sorted(set(given) - known)
    if foreign:
        raise CheckpointError(
            f"{source}: rope_type={rope_type} has no {foreign[0]}; it takes {', '.join(sorted(known)) or 'no numbers'}"
        )
    if "original_max_position_embeddings" in known:
        original = (shape.rope_scaling or {}).get("original_max_position_embeddings", shape.max_position_embeddings)
        given.setdefault("original_max_position_embeddings", original)
    return check_scaling({"rope_type": rope_type, **given}, source)


def rotary_of(shape: ModelShape, rotary_base: float) -> Rotary:
    """Make the rotary embedding of a model with the given RoPE theta."""
    channels = int(shape.kv_channels * shape.rotary_percent)
    exponents = torch.arange(0, channels, 2, dtype=torch.int64).float() / channels
    plain = 1.0 / (rotary_base**exponents)
    scaling = shape.rope_scaling or {"rope_type": "default"}
    kind, scale = scaling["rope_type"], 1.0
    if kind == "linear":
        plain = plain / scaling["factor"]
    elif kind == "llama3":
        plain = _llama3(plain, scaling)
    elif kind == "yarn":
        plain, scale = _yarn(rotary_base, channels, scaling)
    return Rotary(plain.to(platform.CURRENT.device), scale)


def _llama3(plain: Tensor, scaling: dict[str, Any]) -> Tensor:
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / plain
    # Long wavelengths are stretched, short ones kept, and those in between interpolated.
    stretched = torch.where(wavelength > original / low, plain / factor, plain)
    share = (original / wavelength - low) / (high - low)
    mixture = (1 - share) * stretched / factor + share * stretched
    between = ~(wavelength < original / high) & ~(wavelength > original / low)
    return torch.where(between, mixture, stretched)


def _yarn(base: float, channels: int, scaling: dict[str, Any]) -> tuple[Tensor, float]:
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    scale = scaling.get("attention_factor")
    if scale is None:
        both = scaling.get("mscale"), scaling.get("mscale_all_dim")
        scale = magnitude(both[0]) / magnitude(both[1]) if both[0] and both[1] else magnitude(1.0)

    def channel_of(rotations: float) -> float:
        """Channel that makes this many rotations within the original context."""
        return channels * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = channel_of(scaling.get("beta_fast", 32)), channel_of(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, channels - 1)
    if low == high:
        high += 0.001
    powers = base ** (torch.arange(0, channels, 2).float() / channels)
    ramp = ((torch.arange(channels // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (factor * powers) * (1 - kept) + 1.0 / powers * kept, float(scale)
