"""The plain oracle of the attention kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from megatron_longpo.data.sequence import Row, lay_out


def dense_attention(
    groups: Sequence[Any], query: Any, key: Any, value: Any, scale: float, mask: Any | None = None
) -> Any:
    """Attention of query groups by softmax under a dense mask, [S, Q, D]; zeros for places in no group.

    Args:
        groups: ``sequence.QuerySpan``s.
        mask: [S, S], a further mask on what may be seen.
    """
    n, repeat = query.shape[0], query.shape[1] // key.shape[1]
    seen = torch.zeros(n, n, dtype=torch.bool)
    for group in groups:
        for block in group.keys:
            visible = torch.ones(group.end - group.start, block.end - block.start, dtype=torch.bool)
            seen[group.start : group.end, block.start : block.end] = visible.tril() if block.causal else visible
    if mask is not None:
        seen &= mask
    scores = torch.einsum("shd,thd->hst", query, key.repeat_interleave(repeat, 1)) * scale
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0)
    return torch.einsum("hst,thd->shd", weights, value.repeat_interleave(repeat, 1))


def tree(seed: int, head_size: int = 8, kv_heads: int = 2) -> tuple[Any, list[Any]]:
    """Layout of four rows that share 40 tokens, and queries, keys and values for it with two places of padding."""
    rng = np.random.default_rng(seed)
    document = rng.integers(3, 100, 40)
    rows = []
    for i in range(4):
        tokens = np.concatenate([document, rng.integers(3, 100, 5 + 3 * i)])
        rows.append(Row(tokens, np.full(len(tokens), -1), np.ones(len(tokens), bool), 0))
    layout = lay_out(rows, prefix_sharing=True, num_samples=1, num_responses=8)
    torch.manual_seed(seed)
    heads = (4, kv_heads, kv_heads)
    return layout, [torch.randn(layout.length + 2, h, head_size, requires_grad=True) for h in heads]
