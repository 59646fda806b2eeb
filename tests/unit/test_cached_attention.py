"""Attention after a past, in tiles, and the cache with room for more, against torch's and transformers' own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_longpo.engines import cached_attention as module
from megatron_longpo.engines.cached_attention import attention_by_tiles, cached_attention, roomy_cache


@pytest.mark.parametrize(("queries", "masked"), [(1, "none"), (1, "bool"), (5, "bool"), (1, "float"), (5, "float")])
def test_attention_of_few_queries_is_that_of_sdpa(queries: int, masked: str) -> None:
    """Grouped heads, with and without a mask, against torch's own kernel on repeated keys."""
    torch.manual_seed(0)
    q = torch.randn(2, 6, queries, 16)
    k, v = torch.randn(2, 2, 33, 16), torch.randn(2, 2, 33, 16)
    mask = torch.rand(2, 1, queries, 33) < 0.7
    mask[..., 0] = True
    given = {"none": None, "bool": mask, "float": torch.zeros(mask.shape).masked_fill_(~mask, -1e30)}[masked]
    found, _ = cached_attention(torch.nn.Module(), q, k, v, given, scaling=0.3)
    whole = F.scaled_dot_product_attention(
        q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), attn_mask=None if masked == "none" else mask, scale=0.3
    )
    assert torch.allclose(found, whole.transpose(1, 2), atol=1e-6)


def test_padding_that_sees_nothing_spreads_no_nan() -> None:
    q, k, v = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
    mask = torch.tensor([[False, False, False], [False, True, False], [False, True, True]])[None, None]
    found, _ = cached_attention(torch.nn.Module(), q, k, v, mask)
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("queries", [2, 70])
def test_attention_after_a_past_is_that_of_sdpa(queries: int) -> None:
    """Without a mask every query sees the past and itself up to its own place."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 6, queries, 16), torch.randn(1, 2, 100, 16), torch.randn(1, 2, 100, 16)
    found, _ = cached_attention(torch.nn.Module(), q, k, v, None, scaling=0.3)
    mask = torch.ones(queries, 100, dtype=torch.bool).tril(100 - queries)
    whole = F.scaled_dot_product_attention(
        q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), attn_mask=mask, scale=0.3
    )
    assert torch.allclose(found, whole.transpose(1, 2), atol=1e-6)


@pytest.mark.parametrize(("queries", "past"), [(1, 0), (5, 0), (128, 0), (129, 40), (300, 1), (2, 298)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_are_causal_attention(queries: int, past: int, dtype: torch.dtype) -> None:
    """A batch of two rows with grouped heads, whose keys are the beginning of a larger tensor."""
    torch.manual_seed(0)
    q = torch.randn(2, 6, queries, 16, dtype=dtype)
    k, v = (torch.randn(2, 2, queries + past + 9, 16, dtype=dtype)[:, :, : queries + past] for _ in "kv")
    with torch.inference_mode():
        found = attention_by_tiles(q, k, v, 0.3)
    mask = torch.ones(queries, queries + past, dtype=torch.bool).tril(past)
    whole = F.scaled_dot_product_attention(
        q.double(),
        k.double().repeat_interleave(3, 1),
        v.double().repeat_interleave(3, 1),
        attn_mask=mask,
        scale=0.3,
    )
    assert found.shape == (2, queries, 6, 16)
    # bf16 has eight bits; scores of some four are rounded to them.
    bound = 1e-5 if dtype == torch.float32 else 0.06
    assert (found.double() - whole.transpose(1, 2)).abs().max() < bound


def test_tiles_are_taken_where_the_kernel_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """And only in bf16, without a mask, for attention that is causal."""
    called: list[tuple[int, ...]] = []

    def tiles(q: Any, k: Any, v: Any, scaling: float) -> Any:
        called.append(tuple(q.shape))
        return q.transpose(1, 2)

    monkeypatch.setattr(module, "_kernel_is_slow_in_bf16", lambda: True)
    monkeypatch.setattr(module, "attention_by_tiles", tiles)
    bf16 = torch.randn(1, 2, 70, 16, dtype=torch.bfloat16)
    layer = torch.nn.Module()
    cached_attention(layer, bf16, bf16, bf16, None)
    assert called == [(1, 2, 70, 16)]
    cached_attention(layer, bf16.float(), bf16.float(), bf16.float(), None)
    cached_attention(layer, bf16[:, :, :1], bf16, bf16, None)
    cached_attention(layer, bf16, bf16, bf16, torch.ones(1, 1, 70, 70, dtype=torch.bool).tril())
    cached_attention(layer, bf16, bf16, bf16, None, is_causal=False)
    assert len(called) == 1
    monkeypatch.setattr(module, "_kernel_is_slow_in_bf16", lambda: False)
    cached_attention(layer, bf16, bf16, bf16, None)
    assert len(called) == 1


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(1, 400)),
            st.tuples(st.just("cut"), st.integers(0, 30)),
            st.tuples(st.just("repeat"), st.integers(2, 3)),
            st.tuples(st.just("copy"), st.just(0)),
        ),
        max_size=8,
    )
)
@settings(deadline=None, max_examples=60)
def test_a_roomy_cache_holds_what_transformers_own_does(steps: list[tuple[str, int]]) -> None:
    """Whatever is added, cut off, repeated or copied; a copy is none the less for what becomes of the other."""
    from transformers import DynamicCache

    ours, theirs = roomy_cache(), DynamicCache()
    torch.manual_seed(1)
    rows = 1
    left: list[tuple[Any, torch.Tensor]] = []
    for what, count in [("add", 3), *steps]:
        if what == "add":
            new = [torch.randn(rows, 2, count, 4) for _ in range(4)]
            for layer in (0, 1):
                found = ours.update(new[2 * layer], new[2 * layer + 1], layer)
                expected = theirs.update(new[2 * layer], new[2 * layer + 1], layer)
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        elif what == "cut" and count < ours.get_seq_length():
            for cache in (ours, theirs):
                cache.crop(-count)
        elif what == "repeat" and rows * count <= 12:
            rows *= count
            for cache in (ours, theirs):
                cache.batch_repeat_interleave(count)
        elif what == "copy":
            left.append((ours, theirs.layers[1].values.clone()))
            ours = copy.deepcopy(ours)
        assert ours.get_seq_length() == theirs.get_seq_length()
        for a, b in zip(ours.layers, theirs.layers, strict=True):
            assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
    for cache, values in left:
        assert torch.equal(cache.layers[1].values, values)


def test_a_roomy_cache_is_not_copied_for_every_token() -> None:
    cache = roomy_cache()
    cache.update(torch.randn(2, 3, 100, 8), torch.randn(2, 3, 100, 8), 0)
    before = cache.layers[0].keys.data_ptr()
    for _ in range(200):
        cache.update(torch.randn(2, 3, 1, 8), torch.randn(2, 3, 1, 8), 0)
    assert cache.layers[0].keys.data_ptr() == before and cache.get_seq_length() == 300
