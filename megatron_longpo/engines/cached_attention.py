"""How a transformers model reads and decodes on a CPU: attention for what has a past, and a cache with room for more.

Shapes: B rows, H heads, G key-value heads, Q queries, K keys, D width of a head.
"""

from __future__ import annotations

import inspect
import itertools
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Queries for which plain matrix products do better on a CPU than the blocks of its attention kernel.
_FEW_QUERIES = 64

# Queries of a tile: its scores should stay in the cache of a core.
_TILE = 128

# Tokens that a cache has room for beyond those it holds; a long one has room for a sixteenth of its own.
_LEAST_ROOM = 256


@cache
def _kernel_is_slow_in_bf16() -> bool:
    """Whether this CPU multiplies matrices in bf16 several times as fast as torch's attention kernel does.

    The kernel uses AMX where there is such. With AVX512's bf16 instructions alone it is as slow as in fp32: seen on such a
    machine, one thread, 9 heads of 64, 4096 tokens: 79 GFLOP/s where a product reaches 450, and tiles of products 200.
    """
    # A version of torch without the question is taken to have no slow kernel.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16")) and not capabilities.get("amx_bf16")


def attention_by_tiles(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Causal attention as matrix products, some queries at a time; not differentiable.

    Scores are rounded to the tensors' type before the softmax, as transformers' own eager attention does.

    Args:
        query: [B, H, Q, D]; the last of them stands at the last key.
        key, value: [B, G, K, D].
        scaling: of the scores.

    Returns:
        [B, Q, H, D]
    """
    batch, heads, queries, width = query.shape
    groups, length = key.shape[1], key.shape[2]
    share, past = heads // groups, length - queries
    query = query.reshape(batch, groups, share, queries, width)
    result = query.new_empty(batch, queries, groups, share, width)
    # One for all tiles: so large a tensor would be mapped, and filled with zeros, anew for each.
    room = query.new_empty(share * min(_TILE, queries) * length)
    later = torch.ones(_TILE, _TILE, dtype=torch.bool, device=query.device).triu(1)
    for row, group in itertools.product(range(batch), range(groups)):
        for start in range(0, queries, _TILE):
            end = min(queries, start + _TILE)
            count, seen = end - start, past + end
            # A matrix each, not a batch of them: a part of a cache is none that the kernel takes without a copy.
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
    """transformers' SDPA attention, but for what a CPU's kernel does slowly: a step of decoding; queries after a past, which
    it takes under a mask, the whole rectangle of it; and bf16, on some CPUs.

    A few queries are plain products, all heads of a key at once. Many without a mask are tiles of products where the
    kernel is slow in bf16, and else, after a past, two blocks merged by their log-sum-exps
    (``megatron_longpo/model/blocks.py``): all of the past, and themselves, causal.
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
        from megatron_longpo.model.blocks import Blocks, CausalBlock, FullBlock, blocks_forward

        blocks = Blocks((CausalBlock(0, past, queries),), (FullBlock(0, queries, 0, past),))
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return blocks_forward(q, k, v, blocks, scale)[0][None], None
    if attention_mask is None and queries > 1 and past > 0:
        # The mask that ``_cached_attention_mask`` left unmade; without one the kernel would let the first query see one key.
        attention_mask = torch.ones(queries, key.shape[2], dtype=torch.bool, device=query.device).tril(past)[None, None]
    if queries > _FEW_QUERIES or (queries > 1 and attention_mask is None) or not known:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **more
        )
    groups, length = key.shape[1], key.shape[2]
    rows = (query * scale).reshape(batch, groups, heads // groups * queries, width)
    pairs = list(itertools.product(range(batch), range(groups)))
    # A matrix each: see ``attention_by_tiles``.
    scores = torch.stack([rows[b, g] @ key[b, g].t() for b, g in pairs]).float().view(batch, heads, queries, length)
    if attention_mask is not None:
        mask = attention_mask[..., :length]
        # Not minus infinity: padding that sees nothing would become NaN, and spread.
        least = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, least) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1).to(value.dtype).view(batch, groups, heads // groups * queries, length)
    found = torch.stack([weights[b, g] @ value[b, g] for b, g in pairs])
    return found.view(batch, heads, queries, width).transpose(1, 2).contiguous(), None


def _cached_attention_mask(batch_size: int, q_length: int, kv_length: int, **more: Any) -> Tensor | None:
    """transformers' mask for SDPA, but none where one row goes on after its past and every place sees what is before it."""
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    plain = more.get("mask_function") is causal_mask_function and more.get("allow_is_causal_skip", False)
    if plain and more.get("attention_mask") is None and batch_size == 1 and 1 < q_length < kv_length:
        return None
    return sdpa_mask(batch_size=batch_size, q_length=q_length, kv_length=kv_length, **more)


def use_cached_attention(model: Any) -> None:
    """Let a model that would use SDPA read and decode by ``cached_attention``."""
    if getattr(model.config, "_attn_implementation", None) != "sdpa" or not hasattr(model, "set_attn_implementation"):
        return
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError:
        # Before transformers let one register an attention and its mask.
        return
    if not {"q_length", "kv_length", "mask_function"} <= set(inspect.signature(sdpa_mask).parameters):
        # Earlier ways to ask for a mask.
        return
    AttentionInterface.register("cached_attention", cached_attention)
    AttentionMaskInterface.register("cached_attention", _cached_attention_mask)
    model.set_attn_implementation("cached_attention")


@cache
def _roomy_layer() -> Any:
    """transformers' growing layer of a cache, but one that does not copy all it holds for every token that is added."""
    from transformers.cache_utils import DynamicLayer

    class RoomyLayer(DynamicLayer):  # type: ignore[misc]
        """Keys and values are the beginning of tensors that have room for more.

        What cuts or repeats them (``crop``, ``batch_repeat_interleave``) may do so as before: where they no longer begin
        such a tensor, they get a new one.
        """

        is_initialized: bool
        keys: Tensor | None
        values: Tensor | None

        def update(
            self, key_states: Tensor, value_states: Tensor, *arguments: Any, **more: Any
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
    """The room, and the part of it that holds what was held and the new: [B, G, K, D]."""
    length = 0 if held is None else held.shape[-2]
    needed = length + new.shape[-2]
    fits = room is not None and room.shape[0] == new.shape[0] and room.shape[-2] >= needed
    if room is None or not fits or (held is not None and held.data_ptr() != room.data_ptr()):
        *front, _, width = new.shape
        room = new.new_empty(*front, needed + max(_LEAST_ROOM, needed // 16), width)
        if held is not None:
            room[..., :length, :] = held
    room[..., length:needed, :] = new
    return room, room[..., :needed, :]


def roomy_cache() -> Any:
    """An empty cache that has room for more, or None where this transformers has no such caches: it then makes its own."""
    from transformers import DynamicCache

    made = DynamicCache()
    if not hasattr(made, "layer_class_to_replicate"):
        return None
    made.layer_class_to_replicate = _roomy_layer()
    return made
