"""Log-probs of given tokens from hidden states and the output weight, without the logits.

The logits of 128K tokens and a vocabulary of 152K take 80 GB in fp32. Here no tensor of vocabulary width is larger than
``chunk`` x local vocabulary, in the forward or the backward.

There are two cases. In general the upstream gradient is unknown during the forward, so we save one log-sum-exp per token and
recompute each chunk's logits in the backward: four N x V x H matmuls instead of three. A token that contributes only to the
mean NLL, however, has a gradient that is known in advance, and in a long document nearly every token is like that. For those
the forward computes the gradient immediately and nothing is recomputed. The backward checks that the gradient that arrives
is the one that was known in advance.

The weight may be a vocabulary shard (Megatron's vocabulary parallelism); the log-sum-exp is then taken over the group.
Columns from ``vocab_size`` on are vocabulary padding and never take part.

Shape legend: N = tokens, C = tokens of a chunk, H = hidden size, V = local vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_longpo.runtime import platform

# Elements of a block that stays in a core's cache from one pass over it to the next.
_CACHED = 2**20
# Whether torch has matmuls of 16-bit matrices with fp32 output (CUDA only; seen in torch 2.11 and 2.13).
_WIDE_PRODUCTS = "dtype_out" in torch.ops.aten.mm.overloads() and "dtype_out" in torch.ops.aten.addmm.overloads()


def default_chunk_bytes() -> int:
    """Default memory for the logits of one chunk, in bytes: enough for 220 tokens of the largest vocabularies.

    More on CUDA, because a matmul that accumulates into [V, H] needs about 1000 tokens to be worth its memory traffic.
    """
    return (1024 if platform.CURRENT.is_cuda else 128) * 2**20


def chunk_tokens(local_vocabulary: int, budget_bytes: int, dtype: torch.dtype = torch.float32) -> int:
    """Number of tokens whose fp32 logits, plus a copy of them in a 16-bit ``dtype``, fit the budget.

    At least 16: with fewer the matmul is inefficient, and 16 x 152064 x 6 bytes are only 15 MB.
    """
    each = 4 if dtype == torch.float32 else 4 + dtype.itemsize
    return max(16, budget_bytes // (each * max(1, local_vocabulary)))


def token_logprobs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    *,
    vocab_size: int,
    vocab_start: int = 0,
    group: dist.ProcessGroup | None = None,
    chunk: int | None = None,
    known_grad_N: Tensor | None = None,
    dummy_gradient: bool = False,
) -> Tensor:
    """log softmax(hidden @ weight.T)[target], one value per token.

    Args:
        hidden_NH: hidden states, [N, H], the same on every rank of ``group``.
        weight_VH: this rank's rows of the output weight, [V, H].
        target_N: token ids in [0, vocab_size), [N].
        vocab_size: true vocabulary size; rows of the weight past it are padding.
        vocab_start: token id of this rank's first row.
        group: ranks that hold the other rows, or None.
        chunk: tokens per chunk. Default: ``chunk_tokens``.
        known_grad_N: gradient that the result will receive, [N] in fp32, NaN where it is unknown. It needs a ``main_grad`` on
            the weight, into which the forward accumulates. Ignored without one, and if no gradient is recorded.
        dummy_gradient: return zeros instead of None as the gradient of a weight that has a ``main_grad``. Megatron's DDP wants
            one when it overlaps reductions. It is as large as the weight.

    Returns:
        Log-probs, [N] in fp32. The gradient of ``hidden_NH`` is only this rank's part, to be summed over the group by the
        backward of Megatron's copy to, or gather from, the tensor-parallel region; the gradient of ``weight_VH`` is complete.
        If the weight has a ``main_grad`` (Megatron's DDP), its gradient is accumulated there, in that buffer's precision.

    Raises:
        RuntimeError: in the backward, the gradient is not the one that was known in advance.
    """
    if group is not None and dist.get_world_size(group) == 1:
        group = None
    valid = max(0, min(weight_VH.shape[0], vocab_size - vocab_start))
    chunk = chunk or chunk_tokens(valid, default_chunk_bytes(), weight_VH.dtype)
    if not torch.is_grad_enabled() or getattr(weight_VH, "main_grad", None) is None or not weight_VH.requires_grad:
        known_grad_N = None
    return _TokenLogprobs.apply(
        hidden_NH, weight_VH, target_N, valid, vocab_start, group, chunk, known_grad_N, dummy_gradient
    )


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        target_N: Tensor,
        valid: int,
        vocab_start: int,
        group: dist.ProcessGroup | None,
        chunk: int,
        known_grad_N: Tensor | None,
        dummy_gradient: bool,
    ) -> Tensor:
        n = hidden_NH.shape[0]
        logits = _Logits(weight_VH, valid, target_N - vocab_start, min(chunk, max(1, n)))
        lse_N = torch.empty(n, dtype=torch.float32, device=hidden_NH.device)
        target_logit_N = torch.zeros(n, dtype=torch.float32, device=hidden_NH.device)
        now_N = torch.zeros(0, dtype=torch.int64, device=hidden_NH.device)
        later_N = torch.arange(n, device=hidden_NH.device)
        if known_grad_N is not None:
            known = ~torch.isnan(known_grad_N)
            now_N, later_N = known.nonzero()[:, 0], (~known).nonzero()[:, 0]
        # For all tokens: the backward fills in the missing rows and returns this very tensor. Zeros, because a rank whose
        # rows are all padding fills in nothing.
        grad_hidden_NH = torch.zeros_like(hidden_NH) if len(now_N) else None
        for index_N, take_gradient in ((now_N, True), (later_N, False)):
            for start in range(0, len(index_N), chunk):
                index_C = index_N[start : start + chunk]
                hidden_CH = hidden_NH.index_select(0, index_C)
                logits_CV = logits.make(hidden_CH)
                target_logit_N[index_C] = logits.at_target(logits_CV, index_C)
                top_C, sum_C = _exponentials_(logits_CV)
                lse_C = top_C + sum_C.log()
                if group is not None and take_gradient:
                    lse_C = _over_group(lse_C, group)
                lse_N[index_C] = lse_C
                if take_gradient:
                    assert known_grad_N is not None and grad_hidden_NH is not None
                    grad_C = known_grad_N[index_C]
                    # The buffer now holds exp(logit - top); softmax is that times exp(top - lse).
                    logits_CV.mul_((-grad_C * (top_C - lse_C).exp()).unsqueeze(1))
                    grad_hidden_CH = logits.gradient(
                        logits_CV,
                        grad_C,
                        index_C,
                        hidden_CH,
                        weight_VH.main_grad,  # type: ignore[attr-defined]
                        True,
                    )
                    assert grad_hidden_CH is not None
                    grad_hidden_NH[index_C] = grad_hidden_CH
        if group is not None:
            # One exchange for all chunks whose gradient was not taken.
            lse_N[later_N] = _over_group(lse_N[later_N], group)
            dist.all_reduce(target_logit_N, group=group)
        ctx.save_for_backward(
            hidden_NH.index_select(0, later_N) if len(now_N) else hidden_NH,
            weight_VH,
            target_N,
            lse_N,
            now_N,
            later_N,
            grad_hidden_NH,
            known_grad_N,
        )
        ctx.valid, ctx.chunk, ctx.vocab_start, ctx.dummy_gradient = valid, chunk, vocab_start, dummy_gradient
        return target_logit_N - lse_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden_MH, weight_VH, target_N, lse_N, now_N, later_N, grad_hidden_NH, known_grad_N = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        n = target_N.shape[0]
        if known_grad_N is not None:
            came, told = grad_N[now_N], known_grad_N[now_N]
            if not torch.allclose(came, told, rtol=1e-4, atol=0.0):
                raise RuntimeError(
                    f"the gradient of the log-probs ({came[:3].tolist()}, ...) differs from the one known in advance "
                    f"({told[:3].tolist()}, ...), from which the output weight's gradient was computed; report this as a bug"
                )
        if grad_hidden_NH is None:
            grad_hidden_NH = torch.zeros_like(hidden_MH)
        main_grad = getattr(weight_VH, "main_grad", None) if need_weight else None
        grad_weight: Tensor | None = main_grad
        if need_weight and main_grad is None:
            # Always fp32, because thousands of chunks are accumulated.
            grad_weight = torch.zeros(weight_VH.shape, dtype=torch.float32, device=weight_VH.device)
        logits = _Logits(weight_VH, ctx.valid, target_N - ctx.vocab_start, min(ctx.chunk, max(1, n)))
        for start in range(0, len(later_N) if ctx.valid else 0, ctx.chunk):
            index_C = later_N[start : start + ctx.chunk]
            hidden_CH, grad_C = hidden_MH[start : start + ctx.chunk], grad_N[index_C]
            # d logp / d logits = onehot - softmax, with the softmax from the saved global log-sum-exp.
            logits_CV = logits.make(hidden_CH)
            for rows in _cached(logits_CV):
                block = logits_CV[rows]
                block.sub_(lse_N[index_C[rows]].unsqueeze(1)).exp_().mul_(-grad_C[rows].unsqueeze(1))
            grad_hidden = logits.gradient(logits_CV, grad_C, index_C, hidden_CH, grad_weight, need_hidden)
            if grad_hidden is not None:
                grad_hidden_NH[index_C] = grad_hidden
        if main_grad is not None:
            # Like Megatron's fused weight gradient, so that DDP does not add .grad a second time.
            weight_VH.grad_added_to_main_grad = True
            grad_weight = torch.zeros_like(weight_VH) if ctx.dummy_gradient else None
        elif grad_weight is not None:
            grad_weight = grad_weight.to(weight_VH.dtype)
        return grad_hidden_NH if need_hidden else None, grad_weight, None, None, None, None, None, None, None


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
        elif hidden_CH.is_cuda and _WIDE_PRODUCTS:
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
    if total_VH.is_cuda and total_VH.dtype == torch.float32 and _WIDE_PRODUCTS:
        torch.ops.aten.addmm.dtype_out(total_VH, grad_CV.t(), hidden_CH, torch.float32, out=total_VH)
        return
    # By blocks of rows; otherwise the product would be as large as the weight before it is added.
    rows = max(1, 8 * _CACHED // hidden_CH.shape[1])
    for start in range(0, total_VH.shape[0], rows):
        total_VH[start : start + rows].add_(grad_CV[:, start : start + rows].t() @ hidden_CH)
