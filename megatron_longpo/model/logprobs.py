"""Log-probs of given tokens from hidden states and the output weight, without the logits.

The logits of 128K tokens and a vocabulary of 152K take 80 GB in fp32. Here no tensor of vocabulary width is larger than
``chunk`` x local vocabulary, in the forward or the backward.

There are two cases. In general the upstream gradient is unknown during the forward, so we save one log-sum-exp per token and
recompute each chunk's logits in the backward: four N x V x H matmuls instead of three. A token that contributes only to the
mean NLL, however, has a gradient that is known in advance, and in a long document nearly every token is like that. For those
the forward computes the gradient immediately and nothing is recomputed. The backward compares the gradient that arrives with
the one that was known in advance, and ``check_known`` reads the result when the step is over: the host does not wait for it.

The weight may be a vocabulary shard (Megatron's vocabulary parallelism); the log-sum-exp is then taken over the group.
Columns from ``vocab_size`` on are vocabulary padding and never take part.

With sequence parallelism each rank of the group holds the hidden states of its own places, and every rank needs those of all
tokens. They are gathered chunk by chunk, and their gradient is reduce-scattered chunk by chunk, as many tokens of every rank at
once, so that no rank ever holds the whole sequence. (Whole, they and their gradient took 4 GiB of a 7B model at 128K with TP 8.)

Shape legend: N = tokens, C = tokens of a chunk, R = rows of the hidden states on this rank, H = hidden size, V = local
vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_longpo.runtime import platform, products

# Elements of a block that stays in a core's cache from one pass over it to the next.
_CACHED = 2**20
# Numbers of a chunk's gradient of the weight that are rounded at a time, where no product adds to fp32 sums.
ROUNDED = 8 * _CACHED
# Largest relative difference between a gradient and what was known of it. fp32 sums of a step differ by far less.
_TOLERANCE = 1e-4


def default_chunk_bytes(*, on_cuda: bool | None = None) -> int:
    """Default memory for the logits of one chunk, in bytes: enough for 220 tokens of the largest vocabularies.

    More on CUDA, because a matmul that accumulates into [V, H] needs about 1000 tokens to be worth its memory traffic.

    Args:
        on_cuda: whether it is for a GPU. Default: whether this process has one.
    """
    return (1024 if (platform.CURRENT.is_cuda if on_cuda is None else on_cuda) else 128) * 2**20


def chunk_tokens(
    local_vocabulary: int, budget_bytes: int, dtype: torch.dtype = torch.float32, gathered_hidden: int = 0
) -> int:
    """Number of tokens whose fp32 logits, plus a copy of them in a 16-bit ``dtype``, fit the budget.

    At least 16: with fewer the matmul is inefficient, and 16 x 152064 x 6 bytes are only 15 MB.

    Args:
        local_vocabulary: V.
        budget_bytes: memory of a chunk.
        dtype: type of hidden states and weight.
        gathered_hidden: H if a chunk's hidden states are gathered, and their gradient reduced, over ranks; else 0.
    """
    each = (4 if dtype == torch.float32 else 4 + dtype.itemsize) * max(1, local_vocabulary)
    return max(16, budget_bytes // (each + 2 * dtype.itemsize * gathered_hidden))


@dataclass(frozen=True)
class KnownGradients:
    """Gradients of log-probs that are known before the forward.

    Attributes:
        grad_N: [N] in fp32, NaN where unknown.
        order: which are known.
        agrees: [1] whether the gradients that arrived were these, but for rounding; set by the backward.
    """

    grad_N: Tensor
    order: TokenOrder
    # Not a part of the others' memory: autograd would take its change for one of theirs.
    agrees: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "agrees", torch.ones(1, dtype=torch.bool, device=self.grad_N.device))

    @classmethod
    def of(cls, grad_N: Tensor) -> KnownGradients:
        """From the gradients only, for which the host waits."""
        return cls(grad_N, TokenOrder.make(~np.isnan(grad_N.cpu().numpy()), (len(grad_N),)))


def check_known(known: Sequence[KnownGradients]) -> None:
    """Check, after a backward, that the gradients were the known ones. On CUDA the host waits, once for all of them.

    Raises:
        RuntimeError: they were not.
    """
    if known and not torch.cat([k.agrees for k in known]).all():
        raise RuntimeError(
            "a gradient of the log-probs differs from the one known in advance, from which the output weight's gradient was "
            "computed; report this as a bug"
        )


@dataclass(frozen=True)
class TokenOrder:
    """Which tokens have a gradient that is known in advance, and which ranks hold their hidden states.

    Attributes:
        now_N, later_N: indices of the tokens whose gradient is known, and of the others; ascending.
        now_counts, later_counts: how many of each the ranks of the group hold, by rank: a rank holds consecutive tokens. One
            number if every rank holds all of them.
    """

    now_N: Tensor
    later_N: Tensor
    now_counts: tuple[int, ...]
    later_counts: tuple[int, ...]

    @classmethod
    def make(cls, known_N: np.ndarray, counts: Sequence[int]) -> TokenOrder:
        """Order tokens, of which each rank holds ``counts``, by whether their gradient is known, [N]."""
        ends = np.cumsum(counts)
        now, later = np.flatnonzero(known_N), np.flatnonzero(~known_N)

        def of_ranks(index: np.ndarray) -> tuple[int, ...]:
            return tuple(np.diff(np.searchsorted(index, ends), prepend=0).tolist())

        there = platform.CURRENT.to_device({"now": now, "later": later})
        return cls(there["now"], there["later"], of_ranks(now), of_ranks(later))


def token_logprobs(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    *,
    vocab_size: int,
    vocab_start: int = 0,
    group: dist.ProcessGroup | None = None,
    chunk: int | None = None,
    known: KnownGradients | None = None,
    dummy_gradient: bool = False,
    rows_N: Tensor | None = None,
    counts: tuple[int, ...] | None = None,
) -> Tensor:
    """log softmax(hidden @ weight.T)[target], one value per token.

    Args:
        hidden_RH: hidden states, [R, H], the same on every rank of ``group``; or, if there are ``counts`` of several ranks, those
            of this rank's places.
        weight_VH: this rank's rows of the output weight, [V, H].
        target_N: token ids in [0, vocab_size), [N].
        vocab_size: true vocabulary size; rows of the weight past it are padding.
        vocab_start: token id of this rank's first row.
        group: ranks that hold the other rows, or None.
        chunk: tokens per chunk. Default: ``chunk_tokens``.
        known: gradients that the result will receive, where they are known. They need a ``main_grad`` on the weight, into which
            the forward accumulates. Ignored without one, and if no gradient is recorded.
        dummy_gradient: return zeros instead of None as the gradient of a weight that has a ``main_grad``. Megatron's DDP wants
            one when it overlaps reductions. It is as large as the weight.
        rows_N: row of each token among the rows of all ranks, ascending; by default token i is row i.
        counts: how many of the tokens each rank of ``group`` holds, if each has rows of its own, as many as the others.

    Returns:
        Log-probs, [N] in fp32. The gradient of ``hidden_RH`` is only this rank's part, to be summed over the group by the
        backward of Megatron's copy to the tensor-parallel region; with ``counts`` it is complete. The gradient of ``weight_VH``
        is complete. If the weight has a ``main_grad`` (Megatron's DDP), its gradient is added there.
    """
    if group is not None and dist.get_world_size(group) == 1:
        group = None
    valid = max(0, min(weight_VH.shape[0], vocab_size - vocab_start))
    chunk = chunk or chunk_tokens(valid, default_chunk_bytes(), weight_VH.dtype)
    if not torch.is_grad_enabled() or getattr(weight_VH, "main_grad", None) is None or not weight_VH.requires_grad:
        known = None
    counts = counts or (target_N.shape[0],)
    if known is None:
        every = torch.arange(target_N.shape[0], device=target_N.device)
        order = TokenOrder(every[:0], every, (0,) * len(counts), counts)
    else:
        order = known.order
    rows = _Rows(rows_N, group if len(counts) > 1 else None, hidden_RH.shape[0])
    return _TokenLogprobs.apply(
        hidden_RH, weight_VH, target_N, valid, vocab_start, group, chunk, known, dummy_gradient, rows, order
    )


@dataclass(frozen=True)
class _Piece:
    """A chunk of tokens.

    Attributes:
        index_C: the tokens, rank by rank.
        lengths: how many each rank holds.
        own: this rank's, as a slice of its tokens of the same set (now or later).
    """

    index_C: Tensor
    lengths: tuple[int, ...]
    own: slice


class _Rows:
    """Hidden states of tokens, and their gradients, wherever they are.

    Args:
        rows_N: row of each token among the rows of all ranks, or None: token i is row i.
        group: ranks that hold rows of their own, or None: this rank holds all of them.
        count: R.
    """

    def __init__(self, rows_N: Tensor | None, group: dist.ProcessGroup | None, count: int) -> None:
        self.rows_N, self.group, self.count = rows_N, group, count
        self.rank = 0 if group is None else dist.get_rank(group)
        self.first = self.rank * count

    def largest(self, chunk: int, order: TokenOrder, tokens: int, *, later_only: bool = False) -> int:
        """Tokens of the largest chunk."""
        ranks = len(order.later_counts)
        tokens = sum(order.later_counts) if later_only else tokens
        return min(max(chunk, ranks), max(1, tokens))

    def pieces(self, index_N: Tensor, counts: tuple[int, ...], chunk: int) -> Iterator[_Piece]:
        """Cut tokens into chunks that take as many of each rank as there are."""
        each = max(1, chunk // len(counts))
        begins = [sum(counts[:r]) for r in range(len(counts))]
        for start in range(0, max(counts), each):
            lengths = tuple(max(0, min(each, n - start)) for n in counts)
            parts = [index_N[b + start : b + start + n] for b, n in zip(begins, lengths, strict=True) if n]
            own = slice(start, start + lengths[self.rank])
            yield _Piece(parts[0] if len(parts) == 1 else torch.cat(parts), lengths, own)

    def own(self, index_N: Tensor, counts: tuple[int, ...]) -> Tensor:
        """Rows, on this rank, of its tokens of a set, in their order."""
        begin = sum(counts[: self.rank])
        mine = index_N[begin : begin + counts[self.rank]]
        if self.rows_N is None:
            return mine
        return self.rows_N.index_select(0, mine) - self.first

    def gather(self, mine_cH: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Hidden states of a chunk, [C, H], from those of this rank's tokens."""
        if self.group is None:
            return mine_cH
        longest = max(lengths)
        if mine_cH.shape[0] < longest:
            mine_cH = torch.nn.functional.pad(mine_cH, (0, 0, 0, longest - mine_cH.shape[0]))
        gathered = mine_cH.new_empty(longest * len(lengths), mine_cH.shape[1])
        dist.all_gather_into_tensor(gathered, mine_cH.contiguous(), group=self.group)
        if min(lengths) == longest:
            return gathered
        return torch.cat([gathered[r * longest : r * longest + n] for r, n in enumerate(lengths)])

    def reduce(self, grad_CH: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Gradient of this rank's tokens of a chunk, summed over the ranks' parts of the vocabulary."""
        if self.group is None:
            return grad_CH
        longest = max(lengths)
        if min(lengths) < longest:
            parts = grad_CH.split(lengths)
            grad_CH = torch.cat([torch.nn.functional.pad(x, (0, 0, 0, longest - x.shape[0])) for x in parts])
        mine = grad_CH.new_empty(longest, grad_CH.shape[1])
        dist.reduce_scatter_tensor(mine, grad_CH.contiguous(), group=self.group)
        return mine[: lengths[self.rank]]


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_RH: Tensor,
        weight_VH: Tensor,
        target_N: Tensor,
        valid: int,
        vocab_start: int,
        group: dist.ProcessGroup | None,
        chunk: int,
        known: KnownGradients | None,
        dummy_gradient: bool,
        rows: _Rows,
        order: TokenOrder,
    ) -> Tensor:
        n = target_N.shape[0]
        logits = _Logits(weight_VH, valid, target_N - vocab_start, rows.largest(chunk, order, n))
        lse_N = torch.empty(n, dtype=torch.float32, device=hidden_RH.device)
        target_logit_N = torch.zeros(n, dtype=torch.float32, device=hidden_RH.device)
        # For all rows: the backward fills in the missing ones and returns this very tensor. Zeros, because a rank whose
        # rows are all padding fills in nothing.
        grad_hidden_RH = torch.zeros_like(hidden_RH) if any(order.now_counts) else None
        main_grad: Tensor | None = getattr(weight_VH, "main_grad", None) if any(order.now_counts) else None
        total_VH = _wide(main_grad)
        for index_N, counts, take_gradient in (
            (order.now_N, order.now_counts, True),
            (order.later_N, order.later_counts, False),
        ):
            own = rows.own(index_N, counts)
            for piece in rows.pieces(index_N, counts, chunk):
                index_C = piece.index_C
                hidden_CH = rows.gather(hidden_RH.index_select(0, own[piece.own]), piece.lengths)
                logits_CV = logits.make(hidden_CH)
                target_logit_N[index_C] = logits.at_target(logits_CV, index_C)
                top_C, sum_C = _exponentials_(logits_CV)
                lse_C = top_C + sum_C.log()
                if group is not None and take_gradient:
                    lse_C = _over_group(lse_C, group)
                lse_N[index_C] = lse_C
                if take_gradient:
                    assert known is not None and grad_hidden_RH is not None
                    grad_C = known.grad_N[index_C]
                    # The buffer now holds exp(logit - top); softmax is that times exp(top - lse).
                    logits_CV.mul_((-grad_C * (top_C - lse_C).exp()).unsqueeze(1))
                    grad_hidden_CH = logits.gradient(
                        logits_CV,
                        grad_C,
                        index_C,
                        hidden_CH,
                        total_VH,
                        True,
                    )
                    assert grad_hidden_CH is not None
                    grad_hidden_RH[own[piece.own]] = rows.reduce(grad_hidden_CH, piece.lengths)
        _add_wide(main_grad, total_VH)
        if group is not None:
            # One exchange for all chunks whose gradient was not taken.
            lse_N[order.later_N] = _over_group(lse_N[order.later_N], group)
            dist.all_reduce(target_logit_N, group=group)
        # Of the later tokens only; without rows_N they are all there are, if none is known.
        plain = rows.rows_N is None and not any(order.now_counts)
        kept_LH = hidden_RH if plain else hidden_RH.index_select(0, rows.own(order.later_N, order.later_counts))
        ctx.save_for_backward(kept_LH, weight_VH, target_N, lse_N, grad_hidden_RH)
        ctx.valid, ctx.chunk, ctx.vocab_start, ctx.dummy_gradient = valid, chunk, vocab_start, dummy_gradient
        ctx.rows, ctx.order, ctx.known = rows, order, known
        return target_logit_N - lse_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        kept_LH, weight_VH, target_N, lse_N, grad_hidden_RH = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        rows: _Rows = ctx.rows
        order: TokenOrder = ctx.order
        n = target_N.shape[0]
        if ctx.known is not None and any(order.now_counts):
            came, told = grad_N[order.now_N], ctx.known.grad_N[order.now_N]
            # NaN is no agreement.
            ctx.known.agrees.copy_(((came - told).abs() <= _TOLERANCE * told.abs()).all())
        if grad_hidden_RH is None:
            grad_hidden_RH = kept_LH.new_zeros(rows.count, kept_LH.shape[1])
        main_grad = getattr(weight_VH, "main_grad", None) if need_weight else None
        grad_weight = _wide(main_grad)
        if need_weight and main_grad is None:
            # Always fp32, because thousands of chunks are accumulated.
            grad_weight = torch.zeros(weight_VH.shape, dtype=torch.float32, device=weight_VH.device)
        logits = _Logits(
            weight_VH, ctx.valid, target_N - ctx.vocab_start, rows.largest(ctx.chunk, order, n, later_only=True)
        )
        own = rows.own(order.later_N, order.later_counts)
        # A rank without any part of the vocabulary has nothing to add, but others may need its rows.
        has_part = ctx.valid or rows.group is not None
        for piece in rows.pieces(order.later_N, order.later_counts, ctx.chunk) if has_part else ():
            index_C = piece.index_C
            hidden_CH, grad_C = rows.gather(kept_LH[piece.own], piece.lengths), grad_N[index_C]
            # d logp / d logits = onehot - softmax, with the softmax from the saved global log-sum-exp.
            logits_CV = logits.make(hidden_CH)
            for block_rows in _cached(logits_CV):
                block = logits_CV[block_rows]
                block.sub_(lse_N[index_C[block_rows]].unsqueeze(1)).exp_().mul_(-grad_C[block_rows].unsqueeze(1))
            grad_hidden_CH = logits.gradient(logits_CV, grad_C, index_C, hidden_CH, grad_weight, need_hidden)
            if grad_hidden_CH is not None:
                grad_hidden_RH[own[piece.own]] = rows.reduce(grad_hidden_CH, piece.lengths)
        _add_wide(main_grad, grad_weight)
        if main_grad is not None:
            # Like Megatron's fused weight gradient, so that DDP does not add .grad a second time.
            weight_VH.grad_added_to_main_grad = True
            grad_weight = torch.zeros_like(weight_VH) if ctx.dummy_gradient else None
        elif grad_weight is not None:
            grad_weight = grad_weight.to(weight_VH.dtype)
        return grad_hidden_RH if need_hidden else None, grad_weight, *[None] * 9


def _wide(main_grad: Tensor | None) -> Tensor | None:
    """Where chunks are accumulated: in ``main_grad`` itself, or in fp32 if it has 16 bits, of which thousands of sums would leave
    little. ``_add_wide`` brings them back."""
    if main_grad is None or main_grad.dtype.itemsize > 2:
        return main_grad
    return torch.zeros(main_grad.shape, dtype=torch.float32, device=main_grad.device)


def _add_wide(main_grad: Tensor | None, total: Tensor | None) -> None:
    if main_grad is not None and total is not None and total is not main_grad:
        main_grad.add_(total)


class _Logits:
    """Computes the logits of one chunk after another in a single buffer, and the gradients from them.

    Args:
        weight_VH: this rank's rows of the output weight.
        valid: number of rows that are not padding.
        local_N: targets as rows of this rank; below 0, or ``valid`` and above, if another rank has them.
        chunk: maximum tokens of a chunk.
    """

    def __init__(self, weight_VH: Tensor, valid: int, local_N: Tensor, chunk: int) -> None:
        self.weight = weight_VH.detach()[:valid]
        self.local_N = local_N
        self.mine_N = (local_N >= 0) & (local_N < valid)
        self.buffer = torch.empty(chunk, valid, dtype=torch.float32, device=weight_VH.device)

    def make(self, hidden_CH: Tensor) -> Tensor:
        """Logits of a chunk in the buffer, [C, V] in fp32."""
        logits_CV = self.buffer[: hidden_CH.shape[0]]
        if hidden_CH.dtype == torch.float32:
            torch.mm(hidden_CH, self.weight.t(), out=logits_CV)
        elif products.are_fused(hidden_CH.device):
            # The matmul's fp32 sums are kept. Rounding them to bf16 would lose two digits of each logit and cost another pass.
            torch.ops.aten.mm.dtype_out(hidden_CH, self.weight.t(), torch.float32, out=logits_CV)
        else:
            logits_CV.copy_(hidden_CH @ self.weight.t())
        return logits_CV

    def at_target(self, logits_CV: Tensor, index_C: Tensor) -> Tensor:
        """Logits of the targets, [C]; 0 where the target is not in this rank's rows."""
        if not logits_CV.shape[1]:
            return logits_CV.new_zeros(len(index_C))
        found = logits_CV.gather(1, self._column(index_C)).squeeze(1)
        return found.masked_fill_(~self.mine_N[index_C], 0.0)

    def gradient(
        self,
        minus_softmax_CV: Tensor,
        grad_C: Tensor,
        index_C: Tensor,
        hidden_CH: Tensor,
        grad_weight: Tensor | None,
        need_hidden: bool,
    ) -> Tensor | None:
        """Accumulate a chunk's gradient into ``grad_weight`` and return that of the hidden states, [C, H].

        Args:
            minus_softmax_CV: softmax times the negative gradient; overwritten.
            grad_C: gradient of the chunk's log-probs.
        """
        if not minus_softmax_CV.shape[1]:
            return torch.zeros_like(hidden_CH) if need_hidden else None
        minus_softmax_CV.scatter_add_(1, self._column(index_C), (grad_C * self.mine_N[index_C]).unsqueeze(1))
        grad_logits_CV = minus_softmax_CV.to(self.weight.dtype)
        if grad_weight is not None:
            _add_product(grad_weight[: self.weight.shape[0]], grad_logits_CV, hidden_CH)
        return grad_logits_CV @ self.weight if need_hidden else None

    def _column(self, index_C: Tensor) -> Tensor:
        return self.local_N[index_C].clamp(0, self.weight.shape[0] - 1).unsqueeze(1)


def _cached(x_CV: Tensor) -> list[slice]:
    """Split rows into blocks that fit a core's cache; on CUDA all rows are one block."""
    c = x_CV.shape[0]
    rows = c if x_CV.is_cuda else max(1, _CACHED // max(1, x_CV.shape[1]))
    return [slice(i, min(c, i + rows)) for i in range(0, c, rows)]


def _exponentials_(logits_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Replace logits by exp(logit - top) in place; return top and the sums, [C] each (-inf and 1 if V = 0)."""
    c, v = logits_CV.shape
    if not v:
        return logits_CV.new_full((c,), -torch.inf), logits_CV.new_ones(c)
    top, total = logits_CV.new_empty(c), logits_CV.new_empty(c)
    for rows in _cached(logits_CV):
        block = logits_CV[rows]
        torch.amax(block, dim=1, out=top[rows])
        block.sub_(top[rows].unsqueeze(1)).exp_()
        torch.sum(block, dim=1, out=total[rows])
    return top, total


def _over_group(lse_C: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Log-sum-exp over the ranks' log-sum-exps: exact, and it exchanges C floats per rank instead of logits."""
    top_C = lse_C.clone()
    dist.all_reduce(top_C, op=dist.ReduceOp.MAX, group=group)
    sum_C = torch.exp(lse_C - top_C)
    dist.all_reduce(sum_C, group=group)
    return top_C + sum_C.log()


def _add_product(total_VH: Tensor, grad_CV: Tensor, hidden_CH: Tensor) -> None:
    """total += grad.T @ hidden, accumulated in the precision of ``total``."""
    if total_VH.dtype == grad_CV.dtype:
        total_VH.addmm_(grad_CV.t(), hidden_CH)
        return
    if total_VH.dtype == torch.float32 and products.are_fused(total_VH.device):
        products.add_product(total_VH, grad_CV, hidden_CH)
        return
    # By blocks of rows; otherwise the product would be as large as the weight before it is added.
    rows = max(1, ROUNDED // hidden_CH.shape[1])
    for start in range(0, total_VH.shape[0], rows):
        total_VH[start : start + rows].add_(grad_CV[:, start : start + rows].t() @ hidden_CH)
