"""Each kernel of a step, forward and backward, against plain mathematics in fp32 (``plain.py``).

Attention kernels are given the shapes and strides of real layouts (``calls.py``). Inputs are rounded to the type that is looked
at before either side sees them, so that errors are the kernels' own.

Shape legend: n = queries and m = keys, Q/K = query/key-value heads, D = head size, s = places, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_longpo.data.sequence import Row, lay_out
from megatron_longpo.doctor import plain
from megatron_longpo.doctor.bounds import bounds_of
from megatron_longpo.doctor.calls import PACKED, SINGLE, BlockCall, block_calls
from megatron_longpo.doctor.examination import Check
from megatron_longpo.doctor.findings import Line, by_error
from megatron_longpo.doctor.ranks import Ranks
from megatron_longpo.errors import ConfigError, one_line
from megatron_longpo.model import layers
from megatron_longpo.model.attention import rotate
from megatron_longpo.model.blocks import block_attention, blocks_of
from megatron_longpo.model.kernels import (
    AttentionKernels,
    BlockInputs,
    CpuFlash,
    CudaFlash,
    CudaFused,
    CudaMemoryEfficient,
    Unfused,
    kernels_for,
    names_of,
)
from megatron_longpo.model.logprobs import KnownGradients, token_logprobs
from megatron_longpo.model.rotary import rotary_of
from megatron_longpo.model.shape import ModelShape
from megatron_longpo.runtime import platform, products
from megatron_longpo.runtime.machine_record import WEIGHT_GRADIENTS, attention_kernel, common_kernel, short

Errors = dict[str, float]
_NO_FLAG = "no flag avoids it: use another version of torch, or another card, and report it"
# Keys and values of other blocks, which a merged output and log-sum-exp stem from as well.
_OTHERS = 24


@dataclass(frozen=True)
class Device:
    """What kernels are looked at on.

    Attributes:
        device: the device.
        size: which calls: ``large`` or ``small``.
        types: types that runs compute in.
    """

    device: torch.device
    size: str
    types: tuple[torch.dtype, ...]

    @classmethod
    def current(cls) -> Device:
        """This process's."""
        current = platform.CURRENT
        return cls(current.device, "large" if current.is_cuda else "small", (torch.bfloat16, torch.float32))


@dataclass(frozen=True)
class _Looked:
    """A kernel in a type.

    Attributes:
        name: of its line.
        kernel: of the kernel, as records have it.
        dtype: the type.
        errors: computes its errors.
        remedy: what avoids it.
        is_needed: whether runs would use it, so that it must be there.
    """

    name: str
    kernel: str
    dtype: torch.dtype
    errors: Callable[[], Errors]
    remedy: str
    is_needed: bool


def kernel_checks(attention_backend: str) -> list[Check]:
    """A check per kernel that a run on this platform may use, and type.

    Args:
        attention_backend: the kernels that runs ask for.
    """
    device = Device.current()
    kernels = [*_attention(device, attention_backend), *_others(device)]
    return [
        Check(k.name, functools.partial(_check_kernel, looked=k, device=device), k.remedy, k.kernel) for k in kernels
    ]


def _check_kernel(_: Ranks, *, looked: _Looked, device: Device) -> Iterator[Line]:
    bound = bounds_of(looked.dtype, device.device.type).kernel
    try:
        errors = looked.errors()
    except (RuntimeError, NotImplementedError) as error:
        # This card, or this build of torch, does not have it.
        status: Any = "fail" if looked.is_needed else "skipped"
        yield Line(looked.name, status, one_line(error, 200), looked.remedy, looked.kernel)
        return
    yield by_error(looked.name, errors, bound, remedy=looked.remedy, kernel=looked.kernel)


def _attention(device: Device, attention_backend: str) -> list[_Looked]:
    found: list[_Looked] = []
    for dtype in device.types:
        # Heads of nearly all models have 128 channels.
        try:
            needed = names_of(kernels_for(device.device.type, dtype, 128, attention_backend).kernels)
        except ConfigError:
            needed = ()
        for kernels, remedy in _attention_kernels(device, dtype):
            name = kernels.name
            found.append(
                _Looked(
                    f"attention {name}, {short(dtype)}",
                    attention_kernel(name, dtype),
                    dtype,
                    functools.partial(attention_errors, kernels, dtype, device),
                    remedy,
                    is_needed=name in needed,
                )
            )
    return found


def _attention_kernels(device: Device, dtype: torch.dtype) -> list[tuple[AttentionKernels, str]]:
    """Kernels that take a type, each with what avoids it."""
    slow = "--attention-backend unfused, which is slow"
    if device.device.type != "cuda":
        return [(CpuFlash(), slow), (Unfused(), _NO_FLAG)]
    if dtype == torch.float32:
        return [(CudaMemoryEfficient(), f"--bf16 where flash passes, or {slow}"), (Unfused(), _NO_FLAG)]
    return [
        (CudaFlash(), "--attention-backend memory_efficient"),
        (CudaFused(), "--attention-backend flash"),
        (CudaMemoryEfficient(), "--attention-backend flash"),
        (Unfused(), _NO_FLAG),
    ]


def _others(device: Device) -> list[_Looked]:
    table: dict[str, Callable[[torch.dtype, torch.device], Errors]] = {
        "merged blocks": merge_errors,
        "rotary embedding": rotary_errors,
        "norm": norm_errors,
        "gate of the MLP": gate_errors,
        "log-probs": log_prob_errors,
    }
    return [
        _Looked(
            f"{name}, {short(dtype)}",
            common_kernel(name, dtype),
            dtype,
            functools.partial(errors_of, dtype, device.device),
            _NO_FLAG,
            is_needed=True,
        )
        for name, errors_of in table.items()
        for dtype in device.types
    ] + [
        _Looked(
            f"{WEIGHT_GRADIENTS}, {short(dtype)}",
            common_kernel(WEIGHT_GRADIENTS, dtype),
            # The products of 16-bit numbers are added in fp32.
            torch.float32,
            functools.partial(weight_gradient_errors, dtype, device.device),
            "--no-gradient-accumulation-fusion",
            is_needed=products.are_fused(device.device),
        )
        for dtype in device.types
        if dtype.itemsize == 2
    ]


# --------------------------------------------------------------------------------------------------
# Attention
# --------------------------------------------------------------------------------------------------


def attention_errors(kernels: AttentionKernels, dtype: torch.dtype, device: Device) -> Errors:
    """Largest errors of a kernel over the calls of all layouts, by value."""
    worst: Errors = {}
    for call in block_calls(device.size, PACKED if isinstance(kernels, CudaFlash) else SINGLE):
        errors = _backward_errors if call.backward else _forward_errors
        _worsen(worst, errors(kernels, call, dtype, device.device))
    return worst


def _worsen(worst: Errors, errors: Errors) -> None:
    """Keep the largest of each value's errors. NaN is larger than any number, and stays: ``max`` would drop it."""
    for name, error in errors.items():
        if not math.isnan(worst.get(name, 0.0)) and not error <= worst.get(name, -1.0):
            worst[name] = error


def _forward_errors(kernels: AttentionKernels, call: BlockCall, dtype: torch.dtype, device: torch.device) -> Errors:
    block, _ = _inputs(call, dtype, device)
    out, lse = kernels.forward(block)
    q, k, v = (x.float() for x in (block.q, block.k, block.v))
    mask = plain.sees(call.lengths, len(q), len(k), device)
    expected_out, expected_lse = plain.attention(q, k, v, mask, block.scale)
    return {"output": plain.relative_error(out, expected_out), "log-sum-exp": plain.relative_error(lse, expected_lse)}


def _backward_errors(kernels: AttentionKernels, call: BlockCall, dtype: torch.dtype, device: torch.device) -> Errors:
    """Gradients from an output and log-sum-exp that other keys have part in, as merged blocks hand them over."""
    block, generator = _inputs(call, dtype, device)
    grad_out = call.random("grad_out", dtype, generator, device)
    out = call.random("out", dtype, generator, device)
    lse = call.random("lse", torch.float32, generator, device)
    q, k, v = (x.float().requires_grad_() for x in (block.q, block.k, block.v))
    mask = plain.sees(call.lengths, len(q), len(k), device)
    all_out, all_lse = _with_others(q, k, v, mask, block.scale, generator)
    expected = torch.autograd.grad(all_out, (q, k, v), grad_out.float())
    out.copy_(all_out.detach())
    lse.copy_(all_lse.detach())
    found = kernels.backward(block, grad_out, out, lse)
    return {n: plain.relative_error(f, e) for n, f, e in zip(("dQ", "dK", "dV"), found, expected, strict=True)}


def _inputs(call: BlockCall, dtype: torch.dtype, device: torch.device) -> tuple[BlockInputs, torch.Generator]:
    generator = torch.Generator().manual_seed(5)
    q, k, v = (call.random(name, dtype, generator, device) for name in ("q", "k", "v"))
    return BlockInputs(q, k, v, call.lengths, q.shape[-1] ** -0.5), generator


def _with_others(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Attention to a block's keys and to others, through which no gradient flows: what is left is the block's share.

    The scores of the other keys come from queries without gradient. d loss / d score of the block's keys is that of the merged
    softmax, as it must be.
    """
    others = [torch.randn(_OTHERS, *x.shape[1:], generator=generator).to(x.device) for x in (k, v)]
    group = q.shape[1] // k.shape[1]
    outs, sums = [], []
    for head in range(q.shape[1]):
        mine = (q[:, head] @ k[:, head // group].t() * scale).masked_fill(~mask, -torch.inf)
        theirs = q[:, head].detach() @ others[0][:, head // group].t() * scale
        scores = torch.cat([mine, theirs], dim=1)
        sums.append(scores.logsumexp(-1))
        outs.append(scores.softmax(-1) @ torch.cat([v[:, head // group], others[1][:, head // group]]))
    return torch.stack(outs, 1), torch.stack(sums)


def merge_errors(dtype: torch.dtype, device: torch.device) -> Errors:
    """A trunk with branches, with and without a sliding window, computed block by block with the formula as kernel."""
    rng, generator = np.random.default_rng(3), torch.Generator().manual_seed(3)
    document = rng.integers(3, 100, 48)
    rows = [Row(np.concatenate([document, rng.integers(3, 100, n)]), *_no_loss(48 + n), 0) for n in (6, 11, 17)]
    layout = lay_out(rows, prefix_sharing=True, num_samples=1, num_responses=6)
    worst: Errors = {}
    for window in (None, 10):
        heads = (4, 2, 2)
        tensors = [torch.randn(layout.length, h, 16, generator=generator).to(device, dtype) for h in heads]
        direction = torch.randn(layout.length, 4, 16, generator=generator).to(device, dtype)
        mask = torch.zeros(layout.length, layout.length, dtype=torch.bool)
        for span in layout.query_spans:
            for block in span.keys:
                seen = torch.ones(span.end - span.start, block.end - block.start, dtype=torch.bool)
                mask[span.start : span.end, block.start : block.end] = seen.tril() if block.causal else seen
        if window is not None:
            positions = torch.from_numpy(layout.positions_S)
            mask &= positions.unsqueeze(1) - positions.unsqueeze(0) < window
        blocks = blocks_of(layout.query_spans, window, layout.positions_S)
        given = [x.requires_grad_() for x in tensors]
        wide = [x.detach().float().requires_grad_() for x in tensors]
        out = block_attention(given[0], given[1], given[2], blocks, 0.25, Unfused())
        expected, _ = plain.attention(wide[0], wide[1], wide[2], mask.to(device), 0.25)
        found = [out, *torch.autograd.grad(out, given, direction)]
        right = [expected, *torch.autograd.grad(expected, wide, direction.float())]
        names = ("output", "dQ", "dK", "dV")
        _worsen(worst, {n: plain.relative_error(f, e) for n, f, e in zip(names, found, right, strict=True)})
    return worst


def _no_loss(length: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full(length, -1), np.ones(length, bool)


# --------------------------------------------------------------------------------------------------
# Everything else
# --------------------------------------------------------------------------------------------------


def _compare(
    names: Sequence[str],
    given: Sequence[Tensor],
    run: Callable[..., Tensor],
    expected: Callable[..., Tensor],
) -> Errors:
    """Errors of a function's result and of its gradients against the formula on the same inputs in fp32.

    Args:
        names: names of the inputs.
        given: the inputs.
        run: function of them.
        expected: the formula.
    """
    own = [x.detach().requires_grad_() for x in given]
    wide = [x.detach().float().requires_grad_() for x in given]
    out, right = run(*own), expected(*wide)
    direction = torch.randn(right.shape, generator=torch.Generator().manual_seed(7)).to(out.device, out.dtype)
    found = torch.autograd.grad(out, own, direction)
    gradients = torch.autograd.grad(right, wide, direction.float())
    errors = {"output": plain.relative_error(out, right)}
    return errors | {
        f"gradient of {n}": plain.relative_error(f, e) for n, f, e in zip(names, found, gradients, strict=True)
    }


def _random(seed: int, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def _sizes(device: torch.device) -> tuple[int, int]:
    """Places, and width, that kernels for the device are at home with."""
    return (1024, 4096) if device.type == "cuda" else (24, 96)


def rotary_errors(dtype: torch.dtype, device: torch.device) -> Errors:
    """Queries at the first places and at those of a long sequence, and a slice of a fused projection."""
    heads, size, base = 4, 128, 1e6
    shape = ModelShape(
        "llama", 1, heads * size, 1, heads, heads, size, 8, 1e-5, False, True, base, 2**20
    )  # fmt: skip
    # Angles in fp32 are good to a position times 2^-24.
    ends = (16, 131072) if dtype == torch.bfloat16 else (16,)
    positions = torch.cat([torch.arange(end - 16, end) for end in ends]).to(device)
    cos, sin = rotary_of(shape, base).cos_sin(positions, dtype)
    fused = _random(1, len(positions), 3 * heads, size, dtype=dtype, device=device)
    x = fused[:, heads : 2 * heads]
    return _compare(("input",), (x,), lambda y: rotate(y, cos, sin), lambda y: plain.rotary(y, positions, base))


def norm_errors(dtype: torch.dtype, device: torch.device) -> Errors:
    """The norm of hidden states, small ones among them (for which epsilon counts), and of the heads of a projection."""
    places, width = _sizes(device)
    eps = 1e-5
    worst: Errors = {}
    for x in (
        _random(1, places, 1, width, dtype=dtype, device=device),
        _random(2, places, 1, width, dtype=dtype, device=device) * 2e-3,
        _random(3, places, 1, 12, 64, dtype=dtype, device=device)[:, :, 4:8],
    ):
        weight = 1 + 0.3 * _random(4, x.shape[-1], dtype=dtype, device=device)
        module = layers.RMSNorm(SimpleNamespace(params_dtype=dtype, sequence_parallel=False), x.shape[-1], eps)  # type: ignore[arg-type]

        def run(y: Tensor, w: Tensor, module: layers.RMSNorm = module) -> Tensor:
            # The module with another weight, so that its gradient arrives here.
            return torch.func.functional_call(module.to(y.device), {"weight": w}, (y,))

        _worsen(worst, _compare(("input", "weight"), (x, weight), run, lambda y, w: plain.rms_norm(y, w, eps)))
    return worst


def gate_errors(dtype: torch.dtype, device: torch.device) -> Errors:
    """SwiGLU of a product's output, [s, 1, 2 F]."""
    places, width = _sizes(device)
    both = _random(1, places, 1, 2 * width, dtype=dtype, device=device)
    return _compare(("input",), (both,), layers.gated, plain.swiglu)


def weight_gradient_errors(dtype: torch.dtype, device: torch.device) -> Errors:
    """Gradients of a wide and of a narrow weight over two micro batches, added to what is there."""
    places, width = _sizes(device)
    worst: Errors = {}
    for outputs, inputs in ((3 * width, width), (width, 3 * width)):
        total = _random(1, outputs, inputs, dtype=torch.float32, device=device)
        expected = total.clone()
        for seed in (2, 3):
            grad = _random(seed, places, outputs, dtype=dtype, device=device)
            given = _random(seed + 2, places, inputs, dtype=dtype, device=device)
            products.add_product(total, grad, given)
            expected += grad.float().t() @ given.float()
        _worsen(worst, {"sum": plain.relative_error(total, expected)})
    return worst


def log_prob_errors(dtype: torch.dtype, device: torch.device) -> Errors:
    """Log-probs in several chunks, with gradients known before and not, a vocabulary with padding."""
    places, width = _sizes(device)
    vocabulary = 8 * width + 3
    hidden = _random(1, places, width, dtype=dtype, device=device)
    weight = _random(2, vocabulary + 5, width, dtype=dtype, device=device) * width**-0.5
    targets = torch.randint(0, vocabulary, (places,), generator=torch.Generator().manual_seed(3)).to(device)
    chunk = places // 3

    def run(h: Tensor, w: Tensor) -> Tensor:
        return token_logprobs(h, w, targets, vocab_size=vocabulary, chunk=chunk)

    def formula(h: Tensor, w: Tensor) -> Tensor:
        return plain.log_probs(h, w[:vocabulary], targets)

    errors = _compare(("hidden states", "weight"), (hidden, weight), run, formula)
    return errors | _known_errors(hidden, weight, targets, vocabulary, chunk)


def _known_errors(hidden: Tensor, weight: Tensor, targets: Tensor, vocabulary: int, chunk: int) -> Errors:
    """The same where the gradients of two thirds of the tokens are known in the forward, as those of the NLL are."""
    h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    w.main_grad = torch.zeros(w.shape, dtype=torch.float32, device=w.device)  # type: ignore[attr-defined]
    direction = torch.randn(len(targets), generator=torch.Generator().manual_seed(7)).to(h.device)
    told = direction.clone()
    told[::3] = torch.nan
    known = KnownGradients.of(told)
    out = token_logprobs(h, w, targets, vocab_size=vocabulary, chunk=chunk, known=known)
    out.backward(direction)
    wide = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    right = plain.log_probs(wide[0], wide[1][:vocabulary], targets)
    gradients = torch.autograd.grad(right, wide, direction)
    main_grad: Any = w.main_grad  # type: ignore[attr-defined]
    assert h.grad is not None
    return {
        "output, gradient known": plain.relative_error(out, right),
        "gradient of hidden states, known": plain.relative_error(h.grad, gradients[0]),
        "gradient of weight, known": plain.relative_error(main_grad, gradients[1]),
    }
