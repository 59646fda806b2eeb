"""Attention over a list of blocks that are merged by log-sum-exp. No query x key mask is ever materialised.

The query spans of a layout are turned into two lists. A causal block is a run of places that attend to themselves; every
place that is not padding is a query of exactly one. In a full block all queries attend to all keys, such as all branches to
their trunk: that is one block, however many branches there are. The causal blocks are computed first and the full ones
merged into them. With the output o and log-sum-exp l of one block, and o' and l' of another over the same queries,

    l'' = log(e^l + e^l'),    o'' = e^(l - l'') o + e^(l' - l'') o'

as FlashAttention merges its tiles (arXiv 2205.14135, section 3.1). The backward of each block is given the merged output and
log-sum-exp, and so computes exactly that block's share of the gradient.

The kernels that compute single blocks are in ``kernels.py``.

Shape legend: S = places, n = queries and m = keys of a block, Q/K = query/key-value heads, G = Q/K, D = head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_longpo.data.sequence import QuerySpan
from megatron_longpo.model.kernels import AttentionKernels, BlockInputs, kernels_for


@dataclass(frozen=True)
class CausalBlock:
    """Query number ``query + i`` attends to keys [key, key + i], for i < length."""

    query: int
    key: int
    length: int


@dataclass(frozen=True)
class FullBlock:
    """Queries [query, query_end) attend to all keys [key, key_end)."""

    query: int
    query_end: int
    key: int
    key_end: int


@dataclass(frozen=True)
class Blocks:
    """All blocks of a layout, or of one rank's queries.

    Attributes:
        causal: computed first; every query that is not padding is in exactly one.
        full: merged into the causal ones.
        fading: also merged. Query i of such a block attends to its keys from i on: the trailing edge of a sliding window.
            With queries and keys both reversed this is a causal block.
    """

    causal: tuple[CausalBlock, ...]
    full: tuple[FullBlock, ...]
    fading: tuple[CausalBlock, ...] = ()

    @property
    def num_queries(self) -> int:
        """Number of queries that attend to anything; the others are padding."""
        return sum(b.length for b in self.causal)


def blocks_of(
    query_spans: Iterable[QuerySpan], window: int | None = None, positions_S: np.ndarray | None = None
) -> Blocks:
    """Make blocks from query spans. Adjacent spans that attend to the same range of keys share one full block.

    Args:
        query_spans: disjoint ranges of queries with the ranges of keys that they attend to.
        window: sliding window: a query attends to keys fewer than this many positions before its own (Mistral 7B,
            arXiv 2310.06825).
        positions_S: position of each key; only needed with a window.

    Raises:
        ValueError: a span does not have exactly one causal range, as long as itself.
    """
    causal: list[CausalBlock] = []
    full: list[FullBlock] = []
    fading: list[CausalBlock] = []
    for span in sorted(query_spans, key=lambda s: s.start):
        own = [b for b in span.keys if b.causal]
        if len(own) != 1 or own[0].end - own[0].start != span.end - span.start:
            raise ValueError(f"{span} must have exactly one causal block, over as many keys as it has queries")
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
    """Split a span, whose own keys begin at ``own``, into runs as long as the window.

    Each run attends causally to itself and to what the window leaves of the key ranges before it.
    """
    before = [(b.start, b.end) for b in span.keys if not b.causal]
    for done in range(0, span.end - span.start, window):
        query, length = span.start + done, min(window, span.end - span.start - done)
        causal.append(CausalBlock(query, own + done, length))
        first = int(positions_S[own + done])
        for start, end in [*before, *([(own, own + done)] if done else [])]:
            key, past = int(positions_S[start]), int(positions_S[start]) + end - start
            # Queries at positions up to key + window - 1 see the whole range.
            whole = min(first + length, key + window)
            if whole > first:
                full.append(FullBlock(query, query + whole - first, start, end))
            # Each later query loses one more key, until none is left.
            edge = max(first, key + window)
            count = min(first + length, past + window - 1) - edge
            if count > 0:
                here, there = query + edge - first, start + edge - window + 1 - key
                fading.append(CausalBlock(here, there, count))
                if there + count < end:
                    full.append(FullBlock(here, here + count, there + count, end))


def block_attention(
    query_SQD: Tensor,
    key_SKD: Tensor,
    value_SKD: Tensor,
    blocks: Blocks,
    scale: float,
    kernels: AttentionKernels | None = None,
) -> Tensor:
    """Attention over blocks. Places that are not a query of any block (padding) give zeros.

    Args:
        query_SQD: queries, [S, Q, D]; key_SKD, value_SKD: keys and values, [S, K, D], Q a multiple of K.
        blocks: which queries attend to which keys.
        scale: factor of the dot products.
        kernels: kernels that compute a block. Default: what ``kernels_for`` chooses for these tensors.

    Returns:
        Output, [S, Q, D].
    """
    if kernels is None:
        kernels = kernels_for(query_SQD.device.type, query_SQD.dtype, query_SQD.shape[-1]).kernels
    return _BlockAttention.apply(query_SQD, key_SKD, value_SKD, blocks, scale, kernels)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float, kernels: AttentionKernels
    ) -> Tensor:
        out, lse = blocks_forward(query, key, value, blocks, scale, kernels)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.blocks, ctx.scale, ctx.kernels = blocks, scale, kernels
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, out, lse = ctx.saved_tensors
        gq, gk, gv = blocks_backward(grad_out, query, key, value, out, lse, ctx.blocks, ctx.scale, ctx.kernels)
        return gq, gk.to(key.dtype), gv.to(value.dtype), None, None, None


def blocks_forward(
    query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float, kernels: AttentionKernels
) -> tuple[Tensor, Tensor]:
    """Output [S, Q, D] and log-sum-exps [Q, S], at least in fp32."""
    whole = blocks.num_queries == query.shape[0]
    out = (torch.empty_like if whole else torch.zeros_like)(query, memory_format=torch.contiguous_format)
    wide = torch.promote_types(query.dtype, torch.float32)
    lse = torch.zeros(query.shape[1], query.shape[0], dtype=wide, device=query.device)
    for queries, keys, lengths in _calls(blocks.causal, kernels, query.shape[1]):
        part, part_lse = kernels.forward(
            BlockInputs(_take(query, queries), _take(key, keys), _take(value, keys), lengths, scale)
        )
        _put(out, queries, part)
        _put(lse.transpose(0, 1), queries, part_lse.transpose(0, 1))

    def merge(here: slice, part: Tensor, part_lse: Tensor) -> None:
        both = torch.logaddexp(lse[:, here], part_lse)
        old = (lse[:, here] - both).exp_().t().unsqueeze(-1)
        new = (part_lse - both).exp_().t().unsqueeze(-1)
        # The weights are fp32, so 16-bit outputs are rounded only once.
        out[here] = out[here] * old + part * new
        lse[:, here] = both

    for b in blocks.full:
        here, there = slice(b.query, b.query_end), slice(b.key, b.key_end)
        merge(here, *kernels.forward(BlockInputs(query[here], key[there], value[there], None, scale)))
    for f in blocks.fading:
        here, there = slice(f.query, f.query + f.length), slice(f.key, f.key + f.length)
        q, k, v = query[here].flip(0), key[there].flip(0), value[there].flip(0)
        part, part_lse = kernels.forward(BlockInputs(q, k, v, (f.length,), scale))
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
    kernels: AttentionKernels,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; the latter two at least in fp32, since many queries' blocks add to the same keys."""
    whole = blocks.num_queries == query.shape[0]
    grad_query = (torch.empty_like if whole else torch.zeros_like)(query, memory_format=torch.contiguous_format)
    wide = torch.promote_types(query.dtype, torch.float32)
    grad_key = torch.zeros(key.shape, dtype=wide, device=key.device)
    grad_value = torch.zeros(value.shape, dtype=wide, device=value.device)

    def add(total: Tensor, places: tuple[tuple[int, int], ...], part: Tensor) -> None:
        done = 0
        for start, end in places:
            total[start:end].add_(part[done : done + end - start])
            done += end - start

    for queries, keys, lengths in _calls(blocks.causal, kernels, query.shape[1]):
        gq, gk, gv = kernels.backward(
            BlockInputs(_take(query, queries), _take(key, keys), _take(value, keys), lengths, scale),
            grad_out=_take(grad_out, queries),
            out=_take(out, queries),
            lse=_take(lse.transpose(0, 1), queries).transpose(0, 1),
        )
        _put(grad_query, queries, gq)
        add(grad_key, keys, gk)
        add(grad_value, keys, gv)
    for b in blocks.full:
        here, there = slice(b.query, b.query_end), slice(b.key, b.key_end)
        gq, gk, gv = kernels.backward(
            BlockInputs(query[here], key[there], value[there], None, scale),
            grad_out=grad_out[here],
            out=out[here],
            lse=lse[:, here],
        )
        grad_query[here].add_(gq)
        grad_key[there].add_(gk)
        grad_value[there].add_(gv)
    for f in blocks.fading:
        here, there = slice(f.query, f.query + f.length), slice(f.key, f.key + f.length)
        backwards = [grad_out[here], query[here], key[there], value[there], out[here]]
        g, q, k, v, o = (x.flip(0) for x in backwards)
        gq, gk, gv = kernels.backward(
            BlockInputs(q, k, v, (f.length,), scale), grad_out=g, out=o, lse=lse[:, here].flip(1)
        )
        grad_query[here].add_(gq.flip(0))
        grad_key[there].add_(gk.flip(0))
        grad_value[there].add_(gv.flip(0))
    return grad_query, grad_key, grad_value


_Ranges = tuple[tuple[int, int], ...]


def _calls(
    causal: tuple[CausalBlock, ...], kernels: AttentionKernels, heads: int
) -> list[tuple[_Ranges, _Ranges, tuple[int, ...]]]:
    """Ranges of queries and of keys, and lengths, of each call of the kernels."""
    return [
        (
            tuple((causal[i].query, causal[i].query + causal[i].length) for i in numbers),
            tuple((causal[i].key, causal[i].key + causal[i].length) for i in numbers),
            tuple(causal[i].length for i in numbers),
        )
        for numbers in kernels.calls(tuple(b.length for b in causal), heads)
    ]


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
