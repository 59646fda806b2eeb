"""Attention and cache of a transformers model on a CPU: fast attention after cached tokens, and a cache with spare room.

Shape legend: B = rows, H = heads, G = key-value heads, Q = queries, K = keys, D = width of a head.
"""

from __future__ import annotations

import inspect
import itertools
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_longpo.model.blocks import Blocks, CausalBlock, FullBlock, block_attention

# For at most this many queries, plain matrix products are faster on a CPU than its attention kernel.
_FEW_QUERIES = 64

# Queries per tile: a tile's scores should fit in the cache of a core.
_TILE = 128

# Spare room of a cache in tokens: at least the first number, and in a long cache 1 / the second of what it holds.
_MINIMUM_SPARE_TOKENS = 256
_SPARE_FRACTION = 16


class KeyValueCache(Protocol):
    """What the engine needs of transformers' caches."""

    layers: list[Any]

    def get_seq_length(self) -> int: ...

    def crop(self, max_length: int, /) -> None: ...

    def batch_repeat_interleave(self, repeats: int, /) -> None: ...

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, /) -> Any: ...


@cache
def _kernel_is_slow_in_bf16() -> bool:
    """Whether plain bf16 matrix products are several times faster on this CPU than torch's attention kernel.

    The kernel uses AMX if the CPU has it. With only AVX512's bf16 instructions it is as slow as in fp32. Measured on such a
    machine with one thread, 9 heads of 64 and 4096 tokens: 79 GFLOP/s, against 450 of a product and 200 of tiled products.
    """
    # Versions of torch that cannot tell are assumed to have no slow kernel.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16")) and not capabilities.get("amx_bf16")


def attention_by_tiles(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Causal attention as matrix products over tiles of queries; not differentiable.

    Scores are rounded to the tensors' dtype before the softmax, as in transformers' eager attention.

    Args:
        query: [B, H, Q, D]; the last query is at the position of the last key.
        key, value: [B, G, K, D].
        scaling: factor of the scores.

    Returns:
        [B, Q, H, D]
    """
    batch, heads, queries, width = query.shape
    groups, length = key.shape[1], key.shape[2]
    share, past = heads // groups, length - queries
    query = query.reshape(batch, groups, share, queries, width)
    result = query.new_empty(batch, queries, groups, share, width)
    # One buffer for all tiles: allocating one per tile would make the system map and zero a large tensor each time.
    room = query.new_empty(share * min(_TILE, queries) * length)
    later = torch.ones(_TILE, _TILE, dtype=torch.bool, device=query.device).triu(1)
    for row, group in itertools.product(range(batch), range(groups)):
        for start in range(0, queries, _TILE):
            end = min(queries, start + _TILE)
            count, seen = end - start, past + end
            # One product per head, not a batched one: that would copy the keys, which are a slice of a larger tensor.
            asked = query[row, group, :, start:end].reshape(share * count, width)
            scores = room[: share * count * seen].view(share * count, seen)
            torch.addmm(scores, asked, key[row, group, :seen].t(), beta=0, alpha=scaling, out=scores)
            of_query = scores.view(share, count, seen)
            of_query[..., past + start :].masked_fill_(later[:count, :count], float("-inf"))
            torch.softmax(scores, -1, out=scores)
            found = scores @ value[row, group, :seen]
            result[row, start:end, group] = found.view(share, count, width).transpose(0, 1)
    return result.view(batch, queries, heads, width)


def cached_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **more: Any,
) -> tuple[Tensor, None]:
    """transformers' SDPA attention, except for three cases that a CPU's kernel computes slowly.

    - A few queries, as in a step of decoding: plain products, all heads of a key-value head at once.
    - Queries after cached tokens, for which the kernel needs a mask and computes the whole rectangle: two blocks merged by
      their log-sum-exps (``megatron_longpo/model/blocks.py``), the cached tokens in full and the queries causally.
    - bf16 on some CPUs (``_kernel_is_slow_in_bf16``): tiled products.

    Args:
        module: attention layer of the model.
        query: [B, H, Q, D].
        key, value: [B, G, K, D].
        attention_mask: [B or 1, 1, Q, at least K], boolean (True is visible) or added to the scores; None is causal.
        scaling: factor of the scores; None is 1 / sqrt(D).
        dropout, more: passed on to transformers' attention.

    Returns:
        [B, Q, H, D], and None for the attention weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    batch, heads, queries, width = query.shape
    known = key.shape[-1] == value.shape[-1] == width and not any(
        more.get(name) is not None for name in ("softcap", "position_bias", "cache", "s_aux")
    )
    past = key.shape[2] - queries
    scale = scaling if scaling is not None else width**-0.5
    is_causal = more.get("is_causal")
    plain = known and attention_mask is None and queries > 1 and past >= 0 and is_causal in (None, True)
    if plain and query.dtype == torch.bfloat16 and _kernel_is_slow_in_bf16() and getattr(module, "is_causal", True):
        return attention_by_tiles(query, key, value, scale), None
    if plain and past > 0 and batch == 1:
        blocks = Blocks((CausalBlock(0, past, queries),), (FullBlock(0, queries, 0, past),))
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return block_attention(q, k, v, blocks, scale)[None], None
    if attention_mask is None and queries > 1 and past > 0:
        # ``_cached_attention_mask`` made no mask here, and without one the kernel lets the first query see only the first key.
        attention_mask = torch.ones(queries, key.shape[2], dtype=torch.bool, device=query.device).tril(past)[None, None]
    if queries > _FEW_QUERIES or (queries > 1 and attention_mask is None) or not known:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **more
        )
    groups, length = key.shape[1], key.shape[2]
    rows = (query * scale).reshape(batch, groups, heads // groups * queries, width)
    pairs = list(itertools.product(range(batch), range(groups)))
    # One product per head, as in ``attention_by_tiles``.
    scores = torch.stack([rows[b, g] @ key[b, g].t() for b, g in pairs]).float().view(batch, heads, queries, length)
    if attention_mask is not None:
        mask = attention_mask[..., :length]
        # Not minus infinity: padding that sees no key would become NaN, and spread.
        least = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, least) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1).to(value.dtype).view(batch, groups, heads // groups * queries, length)
    found = torch.stack([weights[b, g] @ value[b, g] for b, g in pairs])
    return found.view(batch, heads, queries, width).transpose(1, 2).contiguous(), None


def _cached_attention_mask(batch_size: int, q_length: int, kv_length: int, **more: Any) -> Tensor | None:
    """transformers' SDPA mask, or None for one row that continues cached tokens under plain causal attention."""
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    plain = more.get("mask_function") is causal_mask_function and more.get("allow_is_causal_skip", False)
    if plain and more.get("attention_mask") is None and batch_size == 1 and 1 < q_length < kv_length:
        return None
    return sdpa_mask(batch_size=batch_size, q_length=q_length, kv_length=kv_length, **more)


def use_cached_attention(model: Any) -> None:
    """Let a model that uses SDPA attend by ``cached_attention``; other models and old versions are left alone."""
    if getattr(model.config, "_attn_implementation", None) != "sdpa" or not hasattr(model, "set_attn_implementation"):
        return
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError:
        # This version of transformers cannot register an attention and its mask.
        return
    if not {"q_length", "kv_length", "mask_function"} <= set(inspect.signature(sdpa_mask).parameters):
        # This version passes other arguments to a mask function.
        return
    AttentionInterface.register("cached_attention", cached_attention)
    AttentionMaskInterface.register("cached_attention", _cached_attention_mask)
    model.set_attn_implementation("cached_attention")


@cache
def _roomy_layer() -> Any:
    """transformers' ``DynamicLayer``, without its copy of the whole layer for every token added."""
    from transformers.cache_utils import DynamicLayer

    class RoomyLayer(DynamicLayer):  # type: ignore[misc]
        """Keys and values are slices at the beginning of larger tensors.

        ``crop`` and ``batch_repeat_interleave`` work as before: keys and values that are no longer such a slice get a new
        tensor at the next ``update``.
        """

        is_initialized: bool
        keys: Tensor | None
        values: Tensor | None

        def update(
            self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
        ) -> tuple[Tensor | None, Tensor | None]:
            if not self.is_initialized:
                self.dtype, self.device = key_states.dtype, key_states.device
                self.is_initialized = True
                self._key_room = self._value_room = None
            self._key_room, self.keys = _added(self._key_room, self.keys, key_states)
            self._value_room, self.values = _added(self._value_room, self.values, value_states)
            return self.keys, self.values

    return RoomyLayer


def _added(room: Tensor | None, held: Tensor | None, new: Tensor) -> tuple[Tensor, Tensor]:
    """The larger tensor, and the slice of it with the old tokens and the new ones.

    Args:
        room: larger tensor of the last call, or None.
        held: [B, G, K, D] tokens so far, or None.
        new: [B, G, Q, D] tokens to add.
    """
    length = 0 if held is None else held.shape[-2]
    needed = length + new.shape[-2]
    fits = room is not None and room.shape[0] == new.shape[0] and room.shape[-2] >= needed
    if room is None or not fits or (held is not None and held.data_ptr() != room.data_ptr()):
        *front, _, width = new.shape
        room = new.new_empty(*front, needed + max(_MINIMUM_SPARE_TOKENS, needed // _SPARE_FRACTION), width)
        if held is not None:
            room[..., :length, :] = held
    room[..., length:needed, :] = new
    return room, room[..., :needed, :]


def roomy_cache() -> KeyValueCache | None:
    """An empty cache with spare room, or None if this version of transformers cannot have one and makes its own."""
    from transformers import DynamicCache

    made = DynamicCache()
    if not hasattr(made, "layer_class_to_replicate"):
        return None
    made.layer_class_to_replicate = _roomy_layer()
    return made  # type: ignore[no-any-return]
