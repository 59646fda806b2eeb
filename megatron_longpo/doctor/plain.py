"""The mathematics of a step written out plainly in fp32: what every kernel is compared with.

Nothing here is shared with the code that trains, so an error in that code is not in here as well. Gradients are autograd's.

Shape legend: n = queries and m = keys, Q/K = query/key-value heads, G = Q/K, D = head size, R = half the rotated channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected; infinite for another shape."""
    if found.shape != expected.shape:
        return float("inf")
    expected = expected.detach().double()
    difference, scale = (found.detach().double() - expected).norm(), expected.norm()
    return float(difference / scale) if scale > 0 else float(difference)


def sees(lengths: Sequence[int] | None, n: int, m: int, device: torch.device) -> Tensor:
    """Which query sees which key, [n, m]: all, or causally within runs of these lengths."""
    if lengths is None:
        return torch.ones(n, m, dtype=torch.bool, device=device)
    run = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    return (run.unsqueeze(1) == run.unsqueeze(0)).tril()


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention.

    Args:
        q: queries, [n, Q, D].
        k, v: keys and values, [m, K, D].
        mask: which query sees which key, [n, m].
        scale: factor of the dot products.

    Returns:
        Output [n, Q, D] and log-sum-exp [Q, n].
    """
    group = q.shape[1] // k.shape[1]
    outs, sums = [], []
    # Head by head: all scores at once would fill a GPU.
    for head in range(q.shape[1]):
        scores = (q[:, head] @ k[:, head // group].t() * scale).masked_fill(~mask, -torch.inf)
        sums.append(scores.logsumexp(-1))
        outs.append(scores.softmax(-1) @ v[:, head // group])
    return torch.stack(outs, 1), torch.stack(sums)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """arXiv 1910.07467: x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def swiglu(both: Tensor) -> Tensor:
    """arXiv 2002.05202: the first half, gated by x * sigmoid(x), times the second half of the last dimension."""
    gate, up = both.tensor_split(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


def rotary(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """arXiv 2104.09864: channels i and i + D/2 turned by position * base^(-2i/D), [s, heads, D]."""
    half = x.shape[-1] // 2
    rates = base ** (-2 * torch.arange(half, dtype=torch.float64, device=x.device) / x.shape[-1])
    angles = positions.double().unsqueeze(1) * rates
    turn = torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * turn
    return torch.cat([turned.real, turned.imag], dim=-1).to(x.dtype)


def log_probs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """log softmax(hidden @ weight^T)[target], [N]."""
    return (hidden @ weight.t()).log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)
