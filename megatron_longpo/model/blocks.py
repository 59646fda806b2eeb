"""Attention over a list of blocks, merged by log-sum-exp, forward and backward; no query x key mask is ever made.

A layout's query spans become two lists. Causal blocks: runs of places that see themselves; every real place is a query
in exactly one. Full blocks: queries that see all of a range of keys, such as all branches on their trunk, which is one
block however many branches there are. The causal blocks are computed first, the full ones merged into them: with o, l of
one block (output, log-sum-exp) and o', l' of another, both of the same queries,

    l'' = log(e^l + e^l'),    o'' = e^(l - l'') o + e^(l' - l'') o'

(as FlashAttention does between its tiles, arXiv 2205.14135, section 3.1). In the backward each block is given the merged
output and log-sum-exp, which makes its result its exact share of the gradient.

Kernels, behind one pair of functions: torch's flash kernels on the CPU; on CUDA flash-attn's variable-length kernels for
bf16 and fp16 where it is installed, else torch's memory-efficient SDPA.

Shape legend: S = places, n = queries and m = keys of a block, Q/K = query/key-value heads, G = Q/K, D = head size.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_longpo.data.sequence import QuerySpan


@dataclass(frozen=True)
class CausalBlock:
    """Queries [query, query + length) see keys from [key, key + length), each up to its own."""

    query: int
    key: int
    length: int


@dataclass(frozen=True)
class FullBlock:
    """Queries [query, query_end) all see all keys [key, key_end)."""

    query: int
    query_end: int
    key: int
    key_end: int


@dataclass(frozen=True)
class Blocks:
    """All blocks of a layout, or of one rank's queries.

    Attributes:
        causal: first of all; every query that is no padding is in one.
        full: merged into those.
        fading: merged as well: query i of the block sees its keys from i on, the edge of a sliding window. Backwards,
            queries and keys both, that is a causal block.
    """

    causal: tuple[CausalBlock, ...]
    full: tuple[FullBlock, ...]
    fading: tuple[CausalBlock, ...] = ()

    @property
    def num_queries(self) -> int:
        """Queries that see anything; the others are padding."""
        return sum(b.length for b in self.causal)


def blocks_of(
    query_spans: Iterable[QuerySpan], window: int | None = None, positions_S: np.ndarray | None = None
) -> Blocks:
    """Blocks of query spans; spans that lie side by side and see the same range share one full block.

    Args:
        query_spans: disjoint ranges of queries with the ranges of keys that they see.
        window: a query sees keys less than this many positions before its own (Mistral 7B, arXiv 2310.06825).
        positions_S: with a window, the position of each key.

    Raises:
        ValueError: a span has not exactly one causal block, of its own length.
    """
    causal: list[CausalBlock] = []
    full: list[FullBlock] = []
    fading: list[CausalBlock] = []
    for span in sorted(query_spans, key=lambda s: s.start):
        own = [b for b in span.keys if b.causal]
        if len(own) != 1 or own[0].end - own[0].start != span.end - span.start:
            raise ValueError(f"{span} must have one causal block over as many keys as it has queries")
        if window is not None:
            assert positions_S is not None
            _windowed(span, own[0].start, window, positions_S, causal, full, fading)
            continue
        causal.append(CausalBlock(span.start, own[0].start, span.end - span.start))
        for block in span.keys:
            if block.causal:
                continue
            near = next(
                (
                    i
                    for i, f in enumerate(full)
                    if f.query_end == span.start and (f.key, f.key_end) == (block.start, block.end)
                ),
                None,
            )
            if near is None:
                full.append(FullBlock(span.start, span.end, block.start, block.end))
            else:
                full[near] = FullBlock(full[near].query, span.end, block.start, block.end)
    return Blocks(tuple(causal), tuple(full), tuple(fading))


def _windowed(
    span: QuerySpan,
    own: int,
    window: int,
    positions_S: np.ndarray,
    causal: list[CausalBlock],
    full: list[FullBlock],
    fading: list[CausalBlock],
) -> None:
    """Cut a span whose own keys begin at ``own`` into runs of a window; each sees itself and the edge of what it can of
    the ranges before it."""
    before = [(b.start, b.end) for b in span.keys if not b.causal]
    for done in range(0, span.end - span.start, window):
        query, length = span.start + done, min(window, span.end - span.start - done)
        causal.append(CausalBlock(query, own + done, length))
        first = int(positions_S[own + done])
        for start, end in [*before, *([(own, own + done)] if done else [])]:
            key, past = int(positions_S[start]), int(positions_S[start]) + end - start
            # Queries up to key + window - 1 see the whole range.
            whole = min(first + length, key + window)
            if whole > first:
                full.append(FullBlock(query, query + whole - first, start, end))
            # Those after lose a key each, until none is left.
            edge = max(first, key + window)
            count = min(first + length, past + window - 1) - edge
            if count > 0:
                here, there = query + edge - first, start + edge - window + 1 - key
                fading.append(CausalBlock(here, there, count))
                if there + count < end:
                    full.append(FullBlock(here, here + count, there + count, end))


def block_attention(query_SQD: Tensor, key_SKD: Tensor, value_SKD: Tensor, blocks: Blocks, scale: float) -> Tensor:
    """Attention over blocks; places that are a query of none (padding) give zeros.

    Args:
        query_SQD: [S, Q, D]; key_SKD, value_SKD: [S, K, D], Q a multiple of K.
        blocks: who sees whom.
        scale: of the dot products.

    Returns:
        [S, Q, D].
    """
    return _BlockAttention.apply(query_SQD, key_SKD, value_SKD, blocks, scale)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float) -> Tensor:
        out, lse = blocks_forward(query, key, value, blocks, scale)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.blocks, ctx.scale = blocks, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, out, lse = ctx.saved_tensors
        gq, gk, gv = blocks_backward(grad_out, query, key, value, out, lse, ctx.blocks, ctx.scale)
        return gq, gk.to(key.dtype), gv.to(value.dtype), None, None


def blocks_forward(query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float) -> tuple[Tensor, Tensor]:
    """Output [S, Q, D] and log-sum-exps [Q, S] in fp32."""
    whole = blocks.num_queries == query.shape[0]
    out = (torch.empty_like if whole else torch.zeros_like)(query, memory_format=torch.contiguous_format)
    lse = torch.zeros(query.shape[1], query.shape[0], dtype=torch.float32, device=query.device)
    for queries, keys, lengths in _calls(blocks.causal, query):
        part, part_lse = _forward(_take(query, queries), _take(key, keys), _take(value, keys), lengths, scale)
        _put(out, queries, part)
        _put(lse.transpose(0, 1), queries, part_lse.transpose(0, 1))

    def merge(here: slice, part: Tensor, part_lse: Tensor) -> None:
        both = torch.logaddexp(lse[:, here], part_lse)
        old = (lse[:, here] - both).exp_().t().unsqueeze(-1)
        new = (part_lse - both).exp_().t().unsqueeze(-1)
        # The weights are fp32, so that 16-bit outputs are rounded once.
        out[here] = out[here] * old + part * new
        lse[:, here] = both

    for b in blocks.full:
        here, there = slice(b.query, b.query_end), slice(b.key, b.key_end)
        merge(here, *_forward(query[here], key[there], value[there], None, scale))
    for f in blocks.fading:
        here, there = slice(f.query, f.query + f.length), slice(f.key, f.key + f.length)
        q, k, v = query[here].flip(0), key[there].flip(0), value[there].flip(0)
        part, part_lse = _forward(q, k, v, (f.length,), scale)
        merge(here, part.flip(0), part_lse.flip(1))
    return out, lse


def blocks_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    blocks: Blocks,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; the latter two in fp32, since many queries' blocks add to the same keys."""
    whole = blocks.num_queries == query.shape[0]
    grad_query = (torch.empty_like if whole else torch.zeros_like)(query, memory_format=torch.contiguous_format)
    grad_key = torch.zeros(key.shape, dtype=torch.float32, device=key.device)
    grad_value = torch.zeros(value.shape, dtype=torch.float32, device=value.device)

    def add(total: Tensor, places: tuple[tuple[int, int], ...], part: Tensor) -> None:
        done = 0
        for start, end in places:
            total[start:end].add_(part[done : done + end - start])
            done += end - start

    for queries, keys, lengths in _calls(blocks.causal, query):
        gq, gk, gv = _backward(
            _take(grad_out, queries),
            _take(query, queries),
            _take(key, keys),
            _take(value, keys),
            _take(out, queries),
            _take(lse.transpose(0, 1), queries).transpose(0, 1),
            lengths,
            scale,
        )
        _put(grad_query, queries, gq)
        add(grad_key, keys, gk)
        add(grad_value, keys, gv)
    for b in blocks.full:
        here, there = slice(b.query, b.query_end), slice(b.key, b.key_end)
        gq, gk, gv = _backward(
            grad_out[here], query[here], key[there], value[there], out[here], lse[:, here], None, scale
        )
        grad_query[here].add_(gq)
        grad_key[there].add_(gk)
        grad_value[there].add_(gv)
    for f in blocks.fading:
        here, there = slice(f.query, f.query + f.length), slice(f.key, f.key + f.length)
        backwards = [grad_out[here], query[here], key[there], value[there], out[here]]
        g, q, k, v, o = (x.flip(0) for x in backwards)
        gq, gk, gv = _backward(g, q, k, v, o, lse[:, here].flip(1), (f.length,), scale)
        grad_query[here].add_(gq.flip(0))
        grad_key[there].add_(gk.flip(0))
        grad_value[there].add_(gv.flip(0))
    return grad_query, grad_key, grad_value


_Ranges = tuple[tuple[int, int], ...]


def _calls(causal: tuple[CausalBlock, ...], query: Tensor) -> list[tuple[_Ranges, _Ranges, tuple[int, ...]]]:
    """Ranges of queries and of keys, and lengths, of each call of the kernels: one for all where they take many."""
    if causal and _have_flash_attn(query):
        return [
            (
                tuple((b.query, b.query + b.length) for b in causal),
                tuple((b.key, b.key + b.length) for b in causal),
                tuple(b.length for b in causal),
            )
        ]
    return [(((b.query, b.query + b.length),), ((b.key, b.key + b.length),), (b.length,)) for b in causal]


def _take(x: Tensor, ranges: _Ranges) -> Tensor:
    """Rows of ``x`` at the ranges; a view where the ranges are one run."""
    if all(a[1] == b[0] for a, b in itertools.pairwise(ranges)):
        return x[ranges[0][0] : ranges[-1][1]]
    return torch.cat([x[start:end] for start, end in ranges])


def _put(x: Tensor, ranges: _Ranges, part: Tensor) -> None:
    done = 0
    for start, end in ranges:
        x[start:end].copy_(part[done : done + end - start])
        done += end - start


# --------------------------------------------------------------------------------------------------
# Kernels: [n, Q, D] against [m, K, D]. lengths None: full; else causal pieces of these lengths, n = m = their sum.
# --------------------------------------------------------------------------------------------------


def _forward(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...] | None, scale: float) -> tuple[Tensor, Tensor]:
    """Output [n, Q, D] and log-sum-exp [Q, n] in fp32."""
    if _have_flash_attn(q):
        return _flash_forward(q, k, v, lengths, scale)
    causal = lengths is not None
    assert lengths is None or len(lengths) == 1
    kv_heads = k.shape[1]
    q4, k4, v4 = _grouped(q, kv_heads), _shared(k, q.shape[1]), _shared(v, q.shape[1])
    if q.is_cuda:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q4, k4, v4, None, compute_log_sumexp=True, is_causal=causal, scale=scale
        )
        # Its rows are padded to 32.
        lse = lse[..., : q.shape[0]]
    else:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q4, k4, v4, 0.0, causal, scale=scale)
    return out.flatten(0, 1).transpose(0, 1), lse.flatten(0, 1)


def _backward(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    lengths: tuple[int, ...] | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients [n, Q, D] and twice [m, K, D], the latter in fp32 on the CPU."""
    if _have_flash_attn(q):
        return _flash_backward(g, q, k, v, o, lse, lengths, scale)
    causal = lengths is not None
    kv_heads, heads = k.shape[1], q.shape[1]
    g4, q4, o4 = (_grouped(x, kv_heads) for x in (g, q, o))
    k4, v4 = _shared(k, heads), _shared(v, heads)
    lse4 = lse.unflatten(0, (kv_heads, -1))
    if q.is_cuda:
        seed = torch.zeros((), dtype=torch.int64, device=q.device)
        padded = torch.nn.functional.pad(lse4, (0, -lse4.shape[-1] % 32)).contiguous()
        gq, gk, gv, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            g4, q4, k4, v4, None, o4, padded, seed, seed, 0.0, [True, True, True, False], is_causal=causal, scale=scale
        )
    else:
        gq, gk, gv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            g4, q4, k4, v4, o4, lse4, 0.0, causal, scale=scale
        )
    return (
        gq.flatten(0, 1).transpose(0, 1),
        gk.sum(1, dtype=torch.float32).transpose(0, 1),
        gv.sum(1, dtype=torch.float32).transpose(0, 1),
    )


def _grouped(x_nHD: Tensor, kv_heads: int) -> Tensor:
    """View [K, G, n, D]. The kernels want unit stride in the last dimension only."""
    return x_nHD.transpose(0, 1).unflatten(0, (kv_heads, -1))


def _shared(x_mKD: Tensor, heads: int) -> Tensor:
    """View [K, G, m, D]: a key-value head is seen by its G query heads without being copied."""
    return x_mKD.transpose(0, 1).unsqueeze(1).expand(-1, heads // x_mKD.shape[1], -1, -1)


@functools.cache
def _flash_attn() -> Any:
    """flash-attn's interface, or None where it is not installed."""
    try:
        return importlib.import_module("flash_attn.flash_attn_interface")
    except ImportError:
        return None


def _have_flash_attn(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and _flash_attn() is not None


@functools.lru_cache(maxsize=64)
def _boundaries(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Running sums of lengths; the same for all layers of a micro batch."""
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


def _flash_pieces(q: Tensor, k: Tensor, lengths: tuple[int, ...] | None, scale: float) -> dict[str, Any]:
    """What both of flash-attn's functions are told of a call, by its own names."""
    of_q, of_k = lengths or (q.shape[0],), lengths or (k.shape[0],)
    return {
        "cu_seqlens_q": _boundaries(of_q, q.device),
        "cu_seqlens_k": _boundaries(of_k, q.device),
        "max_seqlen_q": max(of_q),
        "max_seqlen_k": max(of_k),
        "dropout_p": 0.0,
        "softmax_scale": scale,
        "causal": lengths is not None,
    }


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...] | None, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _flash_attn()._flash_attn_varlen_forward(q, k, v, **_flash_pieces(q, k, lengths, scale))
    return out, lse


def _flash_backward(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    lengths: tuple[int, ...] | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    gq, gk, gv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    _flash_attn()._flash_attn_varlen_backward(
        g,
        q,
        k,
        v,
        o,
        lse.contiguous(),
        gq,
        gk,
        gv,
        **_flash_pieces(q, k, lengths, scale),
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return gq, gk, gv
