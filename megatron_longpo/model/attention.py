"""``core_attention`` of the layers: rotary embedding, block attention and context parallelism.

An ``AttentionPlan`` describes which queries attend to which keys, and ``BlockAttention`` computes it (``model/blocks.py``).
There are two forms of context parallelism (Megatron-LM's ``cp_comm_type``):

- ``a2a`` (DeepSpeed-Ulysses, arXiv 2309.14509): an all-to-all trades places for heads, so that each rank has all places of
  its share of the heads. The heads must divide over the ranks.
- ``allgather`` (as in Llama 3's training, arXiv 2407.21783, section 3.3.2): each rank keeps its queries and gathers all keys
  and values. This works for any number of ranks and heads; places are assigned so that the causal work is balanced.

Both split the heads into groups that follow the key-value heads (``AttentionPlan.head_groups``). All exchanges start at
once, and each group is computed while the next one is still in flight. Where a rank has fewer key-value heads than groups,
``a2a`` splits the query heads of one key-value head as well. ``allgather`` does not: all of its groups would wait for the same
keys.

Shape legend: S = places of the sequence, s = places on this rank, Q/K = query/key-value heads on this rank,
G = query heads per key-value head (Q/K), D = head size.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_longpo.data.sequence import QuerySpan
from megatron_longpo.errors import ConfigError
from megatron_longpo.model.blocks import Blocks, block_attention, blocks_backward, blocks_forward, blocks_of
from megatron_longpo.model.kernels import AttentionKernels, for_groups


@dataclass
class AttentionPlan(PackedSeqParams):
    """What the attention needs to know of a micro batch; passed through megatron-core's layers as ``packed_seq_params``.

    Attributes:
        blocks: which queries attend to which keys. Keys are numbered over the whole sequence. So are queries, except with
            ``allgather``, where they are numbered over this rank's places.
        context_group: ranks that share this sequence, or None if each rank has whole rows (the short pass).
        comm_type: ``a2a`` or ``allgather``.
        gathered_of_S: with ``allgather``, index of each place of the sequence in the concatenated shards of all ranks.
        head_groups: maximum number of exchanges in flight at once.
        cos_sR, sin_sR: rotary embedding of this rank's places, [s, half the rotated channels].
        kernels: kernels that compute the blocks.
    """

    blocks: Blocks = Blocks((), ())  # noqa: RUF009
    context_group: dist.ProcessGroup | None = None
    comm_type: str = "a2a"
    gathered_of_S: Tensor | None = None
    head_groups: int = 1
    cos_sR: Tensor | None = None
    sin_sR: Tensor | None = None
    kernels: AttentionKernels | None = None

    @classmethod
    def make(
        cls,
        query_spans: tuple[QuerySpan, ...],
        context_group: dist.ProcessGroup | None,
        comm_type: str = "a2a",
        gathered_of_S: Tensor | None = None,
        head_groups: int = 1,
        window: int | None = None,
        positions_S: np.ndarray | None = None,
    ) -> AttentionPlan:
        """Make a plan from query spans; ``window`` and ``positions_S`` are those of ``blocks_of``."""
        if context_group is not None and dist.get_world_size(context_group) == 1:
            context_group = None
        return cls(
            # The batch size is one.
            qkv_format="sbhd",
            blocks=blocks_of(query_spans, window, positions_S),
            context_group=context_group,
            comm_type=comm_type,
            gathered_of_S=gathered_of_S,
            head_groups=head_groups,
        )

    def for_model(self, cos_sR: Tensor, sin_sR: Tensor, kernels: AttentionKernels) -> AttentionPlan:
        """Return a copy with a model's kernels and rotary embedding, which differs between policy and reference."""
        plan = copy.copy(self)
        plan.cos_sR, plan.sin_sR, plan.kernels = cos_sR, sin_sR, kernels
        return plan


class BlockAttention(torch.nn.Module):
    """``core_attention`` for megatron-core's SelfAttention: block attention as an ``AttentionPlan`` describes it."""

    def __init__(
        self,
        config: Any,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        if config.attention_dropout:
            raise ConfigError(
                f"attention_dropout={config.attention_dropout} is not supported by block attention; set it to 0"
            )
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *_: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **__: Any,
    ) -> Tensor:
        """Map query [s, 1, Q, D], key and value [s, 1, K, D], not yet rotated, to [s, 1, Q * D]."""
        assert isinstance(packed_seq_params, AttentionPlan), "the model must be called with an AttentionPlan"
        plan = packed_seq_params
        assert plan.cos_sR is not None and plan.sin_sR is not None and plan.kernels is not None
        query_SQD = rotate(query.squeeze(1), plan.cos_sR, plan.sin_sR)
        key_SKD = rotate(key.squeeze(1), plan.cos_sR, plan.sin_sR)
        # A copy, because a view would keep the whole fused projection alive until the backward.
        value_SKD = value.squeeze(1).contiguous()
        if plan.context_group is None:
            out_SQD = block_attention(query_SQD, key_SKD, value_SKD, plan.blocks, self.scale, plan.kernels)
        elif plan.comm_type == "allgather":
            out_SQD = _GatheredAttention.apply(query_SQD, key_SKD, value_SKD, plan, self.scale)
        else:
            out_SQD = _UlyssesAttention.apply(query_SQD, key_SKD, value_SKD, plan, self.scale)
        return out_SQD.reshape(out_SQD.shape[0], 1, -1)


# --------------------------------------------------------------------------------------------------
# Rotary embedding
# --------------------------------------------------------------------------------------------------


def rotate(x_sHD: Tensor, cos_sR: Tensor, sin_sR: Tensor) -> Tensor:
    """Apply a rotary embedding (arXiv 2104.09864) to the first 2R channels; channel i is paired with channel i + R."""
    return _Rotate.apply(x_sHD, cos_sR, sin_sR)


class _Rotate(torch.autograd.Function):
    """Saves only cosines and sines, which all layers share; its backward rotates by the negative angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def _rotated(x_sHD: Tensor, cos_sR: Tensor, sin_sR: Tensor) -> Tensor:
    half = cos_sR.shape[1]
    cos, sin = cos_sR.unsqueeze(1), sin_sR.unsqueeze(1)
    first, second = x_sHD[..., :half], x_sHD[..., half : 2 * half]
    out = torch.empty_like(x_sHD, memory_format=torch.contiguous_format)
    torch.mul(first, cos, out=out[..., :half]).sub_(second * sin)
    torch.mul(second, cos, out=out[..., half : 2 * half]).add_(first * sin)
    if 2 * half < x_sHD.shape[-1]:
        out[..., 2 * half :] = x_sHD[..., 2 * half :]
    return out


# --------------------------------------------------------------------------------------------------
# Context parallelism by all-gather
# --------------------------------------------------------------------------------------------------


class _GatheredAttention(torch.autograd.Function):
    """This rank's queries attend to all ranks' keys and values.

    Only this rank's keys and values are saved, and the backward gathers them again. If the gathered ones were saved, the
    memory of a layer would not shrink as ranks are added.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
        assert plan.kernels is not None
        kv_heads = key.shape[1]
        of_query = _cut(query.shape[1], kv_heads, plan.head_groups)
        out = torch.empty_like(query)
        lse = query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)
        gathering = [_Gathering(key[:, h], value[:, h], plan) for h in _cut(kv_heads, kv_heads, plan.head_groups)]
        for heads, coming in zip(of_query, gathering, strict=True):
            keys, values = coming.wait()
            out[:, heads], lse[heads] = blocks_forward(query[:, heads], keys, values, plan.blocks, scale, plan.kernels)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, out, lse = ctx.saved_tensors
        plan: AttentionPlan = ctx.plan
        assert plan.kernels is not None
        kv_heads = key.shape[1]
        of_key = _cut(kv_heads, kv_heads, plan.head_groups)
        gathering = [_Gathering(key[:, h], value[:, h], plan) for h in of_key]
        grad_query, grad_key, grad_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        going = []
        for heads, coming in zip(_cut(query.shape[1], kv_heads, plan.head_groups), gathering, strict=True):
            keys, values = coming.wait()
            grad_query[:, heads], gk, gv = blocks_backward(
                grad_out[:, heads],
                query[:, heads],
                keys,
                values,
                out[:, heads],
                lse[heads],
                plan.blocks,
                ctx.scale,
                plan.kernels,
            )
            # Reorder to the order of the shards. The reduce-scatter sums over the queries of all ranks and returns this
            # rank's keys to it.
            total = torch.empty(gk.shape[0], 2 * gk.shape[1], gk.shape[2], dtype=torch.float32, device=key.device)
            total[plan.gathered_of_S] = torch.cat([gk, gv], dim=1).float()
            # Not kept while the next heads are computed.
            del gk, gv
            mine = total.new_empty(query.shape[0], *total.shape[1:])
            work = dist.reduce_scatter_tensor(mine, total, group=plan.context_group, async_op=True)
            going.append((work, mine, total))
        for heads, (work, mine, _) in zip(of_key, going, strict=True):
            assert work is not None
            work.wait()
            grad_key[:, heads], grad_value[:, heads] = mine.chunk(2, dim=1)
        return grad_query, grad_key, grad_value, None, None


class _Gathering:
    """An all-gather of keys and values of some heads, in flight."""

    def __init__(self, key_sKD: Tensor, value_sKD: Tensor, plan: AttentionPlan) -> None:
        assert plan.context_group is not None and plan.gathered_of_S is not None
        self.order = plan.gathered_of_S
        self.mine = torch.cat([key_sKD, value_sKD], dim=1)
        ranks = dist.get_world_size(plan.context_group)
        self.all = self.mine.new_empty(self.mine.shape[0] * ranks, *self.mine.shape[1:])
        self.work = dist.all_gather_into_tensor(self.all, self.mine, group=plan.context_group, async_op=True)

    def wait(self) -> tuple[Tensor, Tensor]:
        """Wait, and return keys and values in the order of the sequence, [S, K, D] each."""
        assert self.work is not None
        self.work.wait()
        keys, values = self.all.index_select(0, self.order).chunk(2, dim=1)
        del self.all, self.mine
        return keys, values


def _cut(heads: int, kv_heads: int, head_groups: int) -> list[slice]:
    """Split heads into at most ``head_groups`` contiguous groups along the boundaries of key-value heads."""
    head_groups = min(head_groups, kv_heads)
    edges = [kv_heads * i // head_groups * (heads // kv_heads) for i in range(head_groups + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


@dataclass(frozen=True)
class HeadGroup:
    """Heads that are exchanged and computed together.

    Attributes:
        queries, keys: the query heads, and the key-value heads that they attend to.
        is_first, is_last: whether it is the first and the last group with these key-value heads. Keys and values travel with the
            first, their gradients with the last.
    """

    queries: slice
    keys: slice
    is_first: bool
    is_last: bool


def head_groups_of(heads: int, kv_heads: int, head_groups: int) -> list[HeadGroup]:
    """Split a rank's heads into at most ``head_groups`` groups; with fewer key-value heads than groups, those of one as well."""
    by_keys = list(zip(_cut(heads, kv_heads, head_groups), _cut(kv_heads, kv_heads, head_groups), strict=True))
    found = []
    for q, k in by_keys:
        inner = _cut(q.stop - q.start, q.stop - q.start, head_groups // len(by_keys))
        found += [
            HeadGroup(
                slice(q.start + part.start, q.start + part.stop),
                k,
                is_first=part.start == 0,
                is_last=part is inner[-1],
            )
            for part in inner
        ]
    return found


# --------------------------------------------------------------------------------------------------
# Context parallelism by all-to-all
# --------------------------------------------------------------------------------------------------


def resolve_comm_type(
    wanted: str, query_heads: int, kv_heads: int, context_parallel_size: int, tensor_parallel_size: int
) -> tuple[str, str]:
    """Resolve ``auto`` to ``a2a`` or ``allgather``, and return the choice with its reason.

    Raises:
        ConfigError: ``a2a`` is requested and the heads do not divide.
    """
    if wanted != "auto":
        if wanted == "a2a":
            check_ulysses(query_heads, kv_heads, context_parallel_size, tensor_parallel_size)
        return wanted, "as requested"
    try:
        check_ulysses(query_heads, kv_heads, context_parallel_size, tensor_parallel_size)
    except ConfigError:
        return (
            "allgather",
            f"{query_heads // tensor_parallel_size} heads do not divide over {context_parallel_size} ranks",
        )
    return "a2a", "the heads divide over the ranks"


def check_ulysses(query_heads: int, kv_heads: int, context_parallel_size: int, tensor_parallel_size: int) -> None:
    """Check that the heads of one tensor-parallel rank can be split over the context-parallel ranks.

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
            f"context_parallel_size={context_parallel_size} cannot split {heads} query heads and {groups} key-value "
            f"heads per tensor-parallel rank evenly with cp_comm_type=a2a; use one of {', '.join(map(str, possible))}, or "
            "cp_comm_type=allgather"
        )


class _UlyssesAttention(torch.autograd.Function):
    """All places of this rank's share of the heads.

    Saves the queries, keys and values that it received, so that the backward does not exchange them again. The output is saved
    once, by places, as the output projection saves it anyway; the backward receives it by heads together with its gradient. Saved
    by heads as well it would be 4 of 22 GiB of a 7B model's activations at 128K over 8 ranks.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
        assert plan.kernels is not None
        ctx.kv_heads = key.shape[1]
        ranks = _ranks(plan)
        # Each rank needs the key-value heads of its query heads. The backward sums over the copies.
        key, value = _copies(key, ranks), _copies(value, ranks)
        # Heads are split in order, so each rank's share is contiguous: [s, ranks, heads, D].
        query, key, value = (x.unflatten(1, (ranks, -1)) for x in (query, key, value))
        groups = head_groups_of(query.shape[2], key.shape[2], plan.head_groups)
        kernels = for_groups(plan.kernels, len(groups))
        going = []
        for group in groups:
            # One exchange for all three.
            keys = [key[:, :, group.keys], value[:, :, group.keys]] if group.is_first else []
            going.append(_to_heads([query[:, :, group.queries], *keys], plan))
        saved, back = [], []
        for group, exchange in zip(groups, going, strict=True):
            q_SqD, *keys = exchange.wait()
            if group.is_first:
                k_SkD, v_SkD = keys
                saved += keys
            out, lse = blocks_forward(q_SqD, k_SkD, v_SkD, plan.blocks, scale, kernels)
            saved += [q_SqD, lse]
            back.append(_to_places([out], plan))
            del out
        whole = torch.empty_like(query, memory_format=torch.contiguous_format)
        for group, exchange in zip(groups, back, strict=True):
            (whole[:, :, group.queries],) = exchange.wait()
        out_sQD = whole.flatten(1, 2)
        ctx.save_for_backward(out_sQD, *saved)
        ctx.plan, ctx.scale = plan, scale
        return out_sQD

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        plan: AttentionPlan = ctx.plan
        assert plan.kernels is not None
        ranks, (out_sQD, *saved) = _ranks(plan), ctx.saved_tensors
        grad, whole = (x.unflatten(1, (ranks, -1)) for x in (grad_out, out_sQD))
        kv_share = max(1, ctx.kv_heads // ranks)
        groups = head_groups_of(grad.shape[2], kv_share, plan.head_groups)
        kernels = for_groups(plan.kernels, len(groups))
        going = [_to_heads([grad[:, :, group.queries], whole[:, :, group.queries]], plan) for group in groups]
        kept, back = iter(saved), []
        for group, exchange in zip(groups, going, strict=True):
            g_SqD, out = exchange.wait()
            if group.is_first:
                k_SkD, v_SkD = next(kept), next(kept)
            q_SqD, lse = next(kept), next(kept)
            gq, gk, gv = blocks_backward(g_SqD, q_SqD, k_SkD, v_SkD, out, lse, plan.blocks, ctx.scale, kernels)
            # The groups with the same keys add up, at least in fp32.
            if group.is_first:
                total_k, total_v = gk, gv
            else:
                total_k, total_v = total_k.add_(gk), total_v.add_(gv)
            of_keys = [total_k.to(k_SkD.dtype), total_v.to(v_SkD.dtype)] if group.is_last else []
            back.append(_to_places([gq, *of_keys], plan))
            # Not kept while the next heads are computed.
            del g_SqD, out, gq, gk, gv, of_keys
        grad_query = torch.empty_like(grad, memory_format=torch.contiguous_format)
        grad_key = grad.new_empty(grad.shape[0], ranks, kv_share, grad.shape[3])
        grad_value = torch.empty_like(grad_key)
        for group, exchange in zip(groups, back, strict=True):
            grad_query[:, :, group.queries], *of_keys = exchange.wait()
            if group.is_last:
                grad_key[:, :, group.keys], grad_value[:, :, group.keys] = of_keys
        return (
            grad_query.flatten(1, 2),
            _summed(grad_key.flatten(1, 2), ctx.kv_heads),
            _summed(grad_value.flatten(1, 2), ctx.kv_heads),
            None,
            None,
        )


def _ranks(plan: AttentionPlan) -> int:
    assert plan.context_group is not None
    return dist.get_world_size(plan.context_group)


def _copies(x_sKD: Tensor, ranks: int) -> Tensor:
    return x_sKD.repeat_interleave(ranks // x_sKD.shape[1], dim=1) if x_sKD.shape[1] < ranks else x_sKD


def _summed(x_srD: Tensor, kv_heads: int) -> Tensor:
    return x_srD if x_srD.shape[1] == kv_heads else x_srD.unflatten(1, (kv_heads, -1)).sum(2, dtype=x_srD.dtype)


@dataclass
class _Exchange:
    """An all-to-all in flight."""

    work: dist.Work
    sent: Tensor
    received: Tensor
    sizes: list[int]
    to_heads: bool

    def wait(self) -> list[Tensor]:
        """Wait, and return the parts: [S, heads, D] each if places were traded for heads, else [s, ranks, heads, D]."""
        self.work.wait()
        x = self.received
        # What was sent and received is not kept while the next heads are computed.
        del self.sent, self.received
        parts = (x.flatten(0, 1) if self.to_heads else x.transpose(0, 1)).split(self.sizes, dim=-2)
        # Separate tensors, because the backward frees them one by one.
        return [part.contiguous() for part in parts] if self.to_heads else list(parts)


def _to_heads(parts_srhD: list[Tensor], plan: AttentionPlan) -> _Exchange:
    """Send this rank's places of all heads, [s, ranks, heads, D]; receive all places of this rank's heads."""
    send = torch.cat([x.transpose(0, 1) for x in parts_srhD], dim=2)
    return _exchange(send, [x.shape[2] for x in parts_srhD], plan, to_heads=True)


def _to_places(parts_ShD: list[Tensor], plan: AttentionPlan) -> _Exchange:
    """The inverse: send all places of this rank's heads, [S, heads, D]; receive this rank's places of all heads."""
    send = torch.cat(parts_ShD, dim=1).unflatten(0, (_ranks(plan), -1))
    return _exchange(send, [x.shape[1] for x in parts_ShD], plan, to_heads=False)


def _exchange(send: Tensor, sizes: list[int], plan: AttentionPlan, *, to_heads: bool) -> _Exchange:
    received = torch.empty_like(send)
    work = dist.all_to_all_single(received, send, group=plan.context_group, async_op=True)
    assert work is not None
    return _Exchange(work, send, received, sizes, to_heads)
