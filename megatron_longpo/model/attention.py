"""Attention over a list of blocks, merged by log-sum-exp; no query x key mask is ever made.

``AttentionPlan`` says which queries see which keys (``sequence.QueryGroup``); ``BlockAttention`` is the
``core_attention`` of the layer spec. Context parallelism has two forms (Megatron-LM's ``cp_comm_type``):

- ``a2a`` (DeepSpeed-Ulysses, arXiv 2309.14509): each rank gives up the places of its heads and receives all places of its
  share of the heads. Heads must divide over the ranks.
- ``allgather`` (as in Llama 3's training, arXiv 2407.21783, section 3.3.2): each rank keeps its queries and sees all keys
  and values. Any number of ranks and heads; the places are dealt so that the causal work is balanced.

Shape legend: S = places of the sequence, s = places on this rank, Q/K = query/key-value heads on this rank,
G = query heads a key-value head (Q/K), D = head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_longpo.errors import ConfigError
from megatron_longpo.sequence import QueryGroup

CP_COMM_TYPES = ("a2a", "allgather")


@dataclass
class AttentionPlan(PackedSeqParams):
    """Travels through megatron-core's layers as their ``packed_seq_params``.

    ``qkv_format`` is ``sbhd`` (a batch of one), so that the layers apply the rotary angles they are given as they are.

    Attributes:
        groups: query groups. Queries are numbered as the attention sees them: over the whole sequence, or, under
            ``allgather``, over the places of this rank; keys always over the whole sequence.
        context_group: ranks that share this sequence, or None where each rank has whole rows (the short pass).
        comm_type: ``a2a`` or ``allgather``.
        gathered_of_S: under ``allgather``, where each place of the sequence is in the ranks' shards put end to end.
    """

    groups: tuple[QueryGroup, ...] = ()
    context_group: dist.ProcessGroup | None = None
    comm_type: str = "a2a"
    gathered_of_S: Tensor | None = None

    @classmethod
    def make(
        cls,
        groups: tuple[QueryGroup, ...],
        context_group: dist.ProcessGroup | None,
        comm_type: str = "a2a",
        gathered_of_S: Tensor | None = None,
    ) -> AttentionPlan:
        if context_group is not None and dist.get_world_size(context_group) == 1:
            context_group = None
        return cls(
            qkv_format="sbhd",
            groups=groups,
            context_group=context_group,
            comm_type=comm_type,
            gathered_of_S=gathered_of_S,
        )


class BlockAttention(torch.nn.Module):
    """``core_attention`` for megatron-core's SelfAttention: block attention under an ``AttentionPlan``."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__()
        if config.attention_dropout:
            raise ConfigError(
                f"attention_dropout={config.attention_dropout} is not offered: block attention has none; set it to 0"
            )
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query [s, 1, Q, D], key and value [s, 1, K, D] -> [s, 1, Q * D]."""
        assert isinstance(packed_seq_params, AttentionPlan), "the model is always called with an AttentionPlan"
        plan = packed_seq_params
        query_SQD, key_SKD, value_SKD = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if plan.context_group is None:
            out_SQD = block_attention(query_SQD, key_SKD, value_SKD, plan.groups, self.scale)
        elif plan.comm_type == "allgather":
            assert plan.gathered_of_S is not None
            out_SQD = _GatheredAttention.apply(query_SQD, key_SKD, value_SKD, plan, self.scale)
        else:
            out_SQD = _ulysses(query_SQD, key_SKD, value_SKD, plan, self.scale)
        return out_SQD.reshape(out_SQD.shape[0], 1, -1)


# --------------------------------------------------------------------------------------------------
# Blocks
# --------------------------------------------------------------------------------------------------


def block_attention(
    query_SQD: Tensor, key_SKD: Tensor, value_SKD: Tensor, groups: tuple[QueryGroup, ...], scale: float
) -> Tensor:
    """Attention of every query group over its key blocks; places in no group (padding) give zeros.

    Args:
        query_SQD: [S, Q, D]; key_SKD, value_SKD: [S, K, D], Q a multiple of K.
        groups: disjoint query ranges with their keys.
        scale: of the dot products.

    Returns:
        [S, Q, D].
    """
    return _BlockAttention.apply(query_SQD, key_SKD, value_SKD, groups, scale)


def _heads_first(x_SHD: Tensor, start: int, end: int, kv_heads: int, repeat: int) -> Tensor:
    """View of places [start, end) as [K, G, places, D]; a key-value head is seen G times without being copied."""
    x_HSD = x_SHD[start:end].transpose(0, 1)
    if x_SHD.shape[1] == kv_heads and repeat > 1:
        return x_HSD.unsqueeze(1).expand(-1, repeat, -1, -1)
    return x_HSD.unflatten(0, (kv_heads, -1))


def _blocks_forward(
    query: Tensor, key: Tensor, value: Tensor, groups: tuple[QueryGroup, ...], scale: float
) -> tuple[Tensor, list[Tensor]]:
    """Output [S, Q, D] and, a query group, its log-sum-exp [K, G, places]."""
    # The kernels want unit stride in the last dimension only, so transposed views go in as they are.
    kv_heads = key.shape[1]
    repeat = query.shape[1] // kv_heads
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    lses: list[Tensor] = []
    for group in groups:
        q = _heads_first(query, group.start, group.end, kv_heads, 1)
        merged: Tensor | None = None
        merged_lse: Tensor | None = None
        for block in group.keys:
            k = _heads_first(key, block.start, block.end, kv_heads, repeat)
            v = _heads_first(value, block.start, block.end, kv_heads, repeat)
            part, lse = _block_forward(q, k, v, block.causal, scale)
            if merged is None or merged_lse is None:
                merged, merged_lse = part, lse
            else:
                both = torch.logaddexp(merged_lse, lse)
                merged = merged * torch.exp(merged_lse - both).unsqueeze(-1) + part * torch.exp(lse - both).unsqueeze(
                    -1
                )
                merged_lse = both
        assert merged is not None and merged_lse is not None
        _heads_first(out, group.start, group.end, kv_heads, 1).copy_(merged)
        lses.append(merged_lse)
    return out, lses


def _blocks_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lses: list[Tensor],
    groups: tuple[QueryGroup, ...],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; the latter two in fp32, since several groups add to the same keys."""
    kv_heads = key.shape[1]
    repeat = query.shape[1] // kv_heads
    grad_query = torch.zeros_like(query, memory_format=torch.contiguous_format)
    grad_key = torch.zeros(key.shape, dtype=torch.float32, device=key.device)
    grad_value = torch.zeros(value.shape, dtype=torch.float32, device=value.device)
    grad_out = grad_out.contiguous()
    for group, lse in zip(groups, lses, strict=True):
        q = _heads_first(query, group.start, group.end, kv_heads, 1)
        o = _heads_first(out, group.start, group.end, kv_heads, 1)
        g = _heads_first(grad_out, group.start, group.end, kv_heads, 1)
        for block in group.keys:
            k = _heads_first(key, block.start, block.end, kv_heads, repeat)
            v = _heads_first(value, block.start, block.end, kv_heads, repeat)
            # With the merged output and log-sum-exp each block's backward is its exact share of the gradient.
            gq, gk, gv = _block_backward(g, q, k, v, o, lse, block.causal, scale)
            _heads_first(grad_query, group.start, group.end, kv_heads, 1).add_(gq)
            grad_key[block.start : block.end].add_(gk.sum(1, dtype=torch.float32).transpose(0, 1))
            grad_value[block.start : block.end].add_(gv.sum(1, dtype=torch.float32).transpose(0, 1))
    return grad_query, grad_key, grad_value


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, groups: tuple[QueryGroup, ...], scale: float
    ) -> Tensor:
        out, lses = _blocks_forward(query, key, value, groups, scale)
        ctx.save_for_backward(query, key, value, out, *lses)
        ctx.groups, ctx.scale = groups, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, out, *lses = ctx.saved_tensors
        gq, gk, gv = _blocks_backward(grad_out, query, key, value, out, lses, ctx.groups, ctx.scale)
        return gq, gk.to(key.dtype), gv.to(value.dtype), None, None


def _block_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """q, k, v [K, G, places, D] -> output [K, G, places, D], log-sum-exp [K, G, places] in fp32."""
    if q.is_cuda:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, None, compute_log_sumexp=True, is_causal=causal, scale=scale
        )
        return out, lse[..., : q.shape[2]]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def _block_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    if q.is_cuda:
        seed = torch.zeros((), dtype=torch.int64, device=q.device)
        # The kernel reads log-sum-exps in rows padded to 32.
        padded = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32)).contiguous()
        gq, gk, gv, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            g, q, k, v, None, o, padded, seed, seed, 0.0, [True, True, True, False], is_causal=causal, scale=scale
        )
        return gq, gk, gv
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        g, q, k, v, o, lse, 0.0, causal, scale=scale
    )


# --------------------------------------------------------------------------------------------------
# Context parallelism by all-gather
# --------------------------------------------------------------------------------------------------


class _GatheredAttention(torch.autograd.Function):
    """This rank's queries over all ranks' keys and values.

    Only this rank's keys and values are kept for the backward, which gathers again: with them kept whole, the memory of
    a layer would not shrink with the number of ranks.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
        all_keys, all_values = _gather_keys(key, value, plan)
        out, lses = _blocks_forward(query, all_keys, all_values, plan.groups, scale)
        ctx.save_for_backward(query, key, value, out, *lses)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, out, *lses = ctx.saved_tensors
        plan: AttentionPlan = ctx.plan
        all_keys, all_values = _gather_keys(key, value, plan)
        gq, gk, gv = _blocks_backward(grad_out, query, all_keys, all_values, out, lses, plan.groups, ctx.scale)
        # Back into the order of the shards; each rank gets the sum of what all queries say of its keys.
        total = torch.empty_like(torch.cat([gk, gv], dim=1))
        total[plan.gathered_of_S] = torch.cat([gk, gv], dim=1)
        mine = torch.empty(query.shape[0], 2 * key.shape[1], key.shape[2], dtype=torch.float32, device=key.device)
        dist.reduce_scatter_tensor(mine, total, group=plan.context_group)
        grad_key, grad_value = mine.chunk(2, dim=1)
        return gq, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None


def _gather_keys(key_sKD: Tensor, value_sKD: Tensor, plan: AttentionPlan) -> tuple[Tensor, Tensor]:
    """All ranks' keys and values in the order of the sequence, [S, K, D] each."""
    group = plan.context_group
    assert group is not None and plan.gathered_of_S is not None
    mine = torch.cat([key_sKD, value_sKD], dim=1)
    gathered = mine.new_empty(mine.shape[0] * dist.get_world_size(group), *mine.shape[1:])
    dist.all_gather_into_tensor(gathered, mine, group=group)
    keys, values = gathered.index_select(0, plan.gathered_of_S).chunk(2, dim=1)
    return keys, values


# --------------------------------------------------------------------------------------------------
# Context parallelism by all-to-all
# --------------------------------------------------------------------------------------------------


def resolve_comm_type(
    wanted: str, query_heads: int, kv_heads: int, context_parallel_size: int, tensor_parallel_size: int
) -> tuple[str, str]:
    """``a2a`` or ``allgather`` for ``auto``, and why.

    Raises:
        ConfigError: ``a2a`` is asked for and the heads do not divide.
    """
    if wanted != "auto":
        if wanted == "a2a":
            check_ulysses(query_heads, kv_heads, context_parallel_size, tensor_parallel_size)
        return wanted, "as asked for"
    try:
        check_ulysses(query_heads, kv_heads, context_parallel_size, tensor_parallel_size)
    except ConfigError:
        return (
            "allgather",
            f"{query_heads // tensor_parallel_size} heads do not divide over {context_parallel_size} ranks",
        )
    return "a2a", "the heads divide over the ranks"


def check_ulysses(query_heads: int, kv_heads: int, context_parallel_size: int, tensor_parallel_size: int) -> None:
    """Whether the heads of one tensor-parallel rank can be dealt over the context-parallel ranks.

    Raises:
        ConfigError: query heads do not divide, or key-value heads neither divide nor can be replicated evenly.
    """
    if context_parallel_size == 1:
        return
    heads = query_heads // tensor_parallel_size
    groups = max(1, kv_heads // tensor_parallel_size)
    possible = [
        n
        for n in range(1, heads + 1)
        if heads % n == 0 and (groups % n == 0 or (n % groups == 0 and (heads // groups) % (n // groups) == 0))
    ]
    if context_parallel_size not in possible:
        raise ConfigError(
            f"context_parallel_size={context_parallel_size} cannot deal {heads} query heads and {groups} key-value "
            f"heads a tensor-parallel rank evenly with cp_comm_type=a2a; use one of {', '.join(map(str, possible))}, or "
            "cp_comm_type=allgather"
        )


def _ulysses(query_sQD: Tensor, key_sKD: Tensor, value_sKD: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    group = plan.context_group
    assert group is not None
    ranks = dist.get_world_size(group)
    kv_heads = key_sKD.shape[1]
    if kv_heads < ranks:
        # Each rank needs the one key-value head of its query heads; the backward of the repeat sums the copies.
        key_sKD = key_sKD.repeat_interleave(ranks // kv_heads, dim=1)
        value_sKD = value_sKD.repeat_interleave(ranks // kv_heads, dim=1)
    # One exchange for all three: heads are dealt in order, so each rank's share is contiguous in each of them.
    shares = [x.unflatten(1, (ranks, -1)) for x in (query_sQD, key_sKD, value_sKD)]
    sizes = [share.shape[2] for share in shares]
    mixed_SHD = _PlacesToHeads.apply(torch.cat(shares, dim=2), group)
    query, key, value = mixed_SHD.split(sizes, dim=1)
    out_SqD = block_attention(query, key, value, plan.groups, scale)
    return _HeadsToPlaces.apply(out_SqD, group)


def _places_to_heads(x_srhD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[s, ranks, h, D] (this rank's places, all heads) -> [S, h, D] (all places, this rank's heads)."""
    send = x_srhD.transpose(0, 1).contiguous()
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=group)
    return received.flatten(0, 1)


def _heads_to_places(x_ShD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[S, h, D] (all places, this rank's heads) -> [s, ranks, h, D] (this rank's places, all heads)."""
    ranks = dist.get_world_size(group)
    send = x_ShD.contiguous().unflatten(0, (ranks, -1))
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=group)
    return received.transpose(0, 1)


class _PlacesToHeads(torch.autograd.Function):
    """All-to-all; its backward is the reverse exchange."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _places_to_heads(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _heads_to_places(grad, ctx.group), None


class _HeadsToPlaces(torch.autograd.Function):
    """All-to-all; its backward is the reverse exchange."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _heads_to_places(x, group).flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ranks = dist.get_world_size(ctx.group)
        return _places_to_heads(grad.unflatten(1, (ranks, -1)), ctx.group), None
