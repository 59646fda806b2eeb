"""Log-probs of given tokens from hidden states and the output weight, without the logits.

The logits of 128K tokens x 152K vocabulary are 80 GB in fp32. Here no tensor of vocabulary width is larger than
``chunk`` x local vocabulary, in forward or backward: the forward keeps one log-sum-exp a token, the backward makes the
logits of a chunk again.

The weight may be a vocabulary shard (Megatron's vocabulary parallelism): the log-sum-exp is then over the group.
Columns from ``vocab_size`` on are padding of the vocabulary and never take part.

Shape legend: N = tokens, C = tokens of a chunk, H = hidden size, V = local vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Logits of one chunk, in fp32, with one temporary of the same size in the backward.
DEFAULT_CHUNK_BYTES = 128 * 2**20


def chunk_tokens(local_vocabulary: int, budget_bytes: int = DEFAULT_CHUNK_BYTES) -> int:
    """Tokens a chunk may have so that its fp32 logits and one temporary stay within the budget.

    At least 16: below that the matrix product starves, and 16 x 152064 x 8 bytes are 20 MB.
    """
    return max(16, budget_bytes // (8 * max(1, local_vocabulary)))


def token_logprobs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    *,
    vocab_size: int,
    vocab_start: int = 0,
    group: dist.ProcessGroup | None = None,
    chunk: int | None = None,
) -> Tensor:
    """log softmax(hidden @ weight.T)[target], one value a token.

    Args:
        hidden_NH: [N, H]; every rank of ``group`` has the same values.
        weight_VH: [V, H], this rank's rows of the output weight.
        target_N: [N] token ids of the whole vocabulary, in [0, vocab_size).
        vocab_size: true vocabulary; rows of the weight past it are padding.
        vocab_start: id of this rank's first row.
        group: ranks that hold the other rows, or None.
        chunk: tokens a chunk; by default what ``chunk_tokens`` says.

    Returns:
        [N] in fp32. The gradient of ``hidden_NH`` is this rank's part only (sum over the group: backward of Megatron's
        copy to, or gather from, the tensor-parallel region); that of ``weight_VH`` is whole. Where the weight has a
        ``main_grad`` (Megatron's DDP) its gradient is accumulated there, in that buffer's precision.
    """
    if group is not None and dist.get_world_size(group) == 1:
        group = None
    valid = max(0, min(weight_VH.shape[0], vocab_size - vocab_start))
    chunk = chunk or chunk_tokens(valid)
    return _TokenLogprobs.apply(hidden_NH, weight_VH, target_N, valid, vocab_start, group, chunk)


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
    ) -> Tensor:
        n = hidden_NH.shape[0]
        lse_N = torch.empty(n, dtype=torch.float32, device=hidden_NH.device)
        target_logit_N = torch.zeros(n, dtype=torch.float32, device=hidden_NH.device)
        weight = weight_VH[:valid]
        local_N = target_N - vocab_start
        mine_N = (local_N >= 0) & (local_N < valid)
        if valid:
            for start in range(0, n, chunk):
                here = slice(start, min(n, start + chunk))
                logits_CV = (hidden_NH[here] @ weight.t()).float()
                lse_N[here] = torch.logsumexp(logits_CV, dim=-1)
                index_C = local_N[here].clamp(0, valid - 1).unsqueeze(1)
                target_logit_N[here] = logits_CV.gather(1, index_C).squeeze(1)
                del logits_CV
            target_logit_N.masked_fill_(~mine_N, 0.0)
        else:
            # This rank holds padding only.
            lse_N.fill_(-torch.inf)
        if group is not None:
            # logsumexp over the ranks' log-sum-exps; exact, and N floats a rank instead of the logits.
            top_N = lse_N.clone()
            dist.all_reduce(top_N, op=dist.ReduceOp.MAX, group=group)
            parts = torch.stack([torch.exp(lse_N - top_N), target_logit_N])
            # Sum in forward; the backward of both parts is local, made from the global lse.
            dist.all_reduce(parts, group=group)
            lse_N = top_N + torch.log(parts[0])
            target_logit_N = parts[1]
        ctx.save_for_backward(hidden_NH, weight_VH, local_N, mine_N, lse_N)
        ctx.valid, ctx.chunk = valid, chunk
        return target_logit_N - lse_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden_NH, weight_VH, local_N, mine_N, lse_N = ctx.saved_tensors
        valid, chunk = ctx.valid, ctx.chunk
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden_NH = torch.zeros_like(hidden_NH) if need_hidden else None
        main_grad = getattr(weight_VH, "main_grad", None) if need_weight else None
        grad_weight: Tensor | None = None
        if main_grad is not None:
            grad_weight = main_grad
        elif need_weight:
            # fp32 whatever the weights are: thousands of chunks are added up.
            grad_weight = torch.zeros(weight_VH.shape, dtype=torch.float32, device=weight_VH.device)
        weight = weight_VH[:valid]
        n = hidden_NH.shape[0]
        for start in range(0, n if valid else 0, chunk):
            here = slice(start, min(n, start + chunk))
            # d logp / d logits = onehot - softmax; the softmax from the saved global log-sum-exp.
            logits_CV = (hidden_NH[here] @ weight.t()).float()
            logits_CV.sub_(lse_N[here].unsqueeze(1)).exp_().mul_(-grad_N[here].unsqueeze(1))
            index_C = local_N[here].clamp(0, valid - 1).unsqueeze(1)
            logits_CV.scatter_add_(1, index_C, (grad_N[here] * mine_N[here]).unsqueeze(1))
            grad_logits_CV = logits_CV.to(weight.dtype)
            if grad_hidden_NH is not None:
                grad_hidden_NH[here] = grad_logits_CV @ weight
            if grad_weight is not None:
                _add_product(grad_weight[:valid], grad_logits_CV, hidden_NH[here])
            del logits_CV, grad_logits_CV
        if main_grad is not None:
            # As Megatron's fused weight gradient does: DDP must not add .grad again, and the hook still has to fire.
            weight_VH.grad_added_to_main_grad = True
            grad_weight = torch.zeros(1, dtype=weight_VH.dtype, device=weight_VH.device).expand(weight_VH.shape)
        elif grad_weight is not None:
            grad_weight = grad_weight.to(weight_VH.dtype)
        return grad_hidden_NH, grad_weight, None, None, None, None, None


def _add_product(total_VH: Tensor, grad_CV: Tensor, hidden_CH: Tensor) -> None:
    """total += grad.T @ hidden, added in the precision of ``total``."""
    if total_VH.dtype == grad_CV.dtype:
        total_VH.addmm_(grad_CV.t(), hidden_CH)
    else:
        total_VH.add_(grad_CV.t() @ hidden_CH)
