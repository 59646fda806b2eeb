"""What CUDA operators demand of the tensors that they are given: the fine print of ``kernels.py``.

Shapes are checked by the operators themselves, and on any device. What is here is checked by nobody, or only on a GPU: strides,
alignment, types and contiguity, as the operators' sources say. ``megatron_longpo.simulation`` checks every call of a training
step against it.

Beside the demands of an operator stands what it computes and what it allocates for itself, which a simulation cannot see either.

Shape legend: n = queries and m = keys, Q/K = query/key-value heads, D = head size, b = runs of a call of variable lengths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)
# The kernels load 16 bytes at once.
_ALIGNMENT = 16

Arguments = Mapping[str, Any]
Values = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class Call:
    """A call of an operator.

    Attributes:
        arguments: arguments by their names in the operator's schema.
        values: gives the numbers in a tensor, or None if they are not known.
    """

    arguments: Arguments
    values: Values = lambda _: None

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]


@dataclass(frozen=True)
class Contract:
    """An operator's demands, its work and its memory.

    Attributes:
        violations: what the call does not meet, in words.
        flops: floating-point operations of the call.
        workspace: bytes that the operator allocates beyond its results, freed when it returns.
    """

    violations: Callable[[Call], Iterator[str]]
    flops: Callable[[Call], int] = lambda _: 0
    workspace: Callable[[Call], int] = lambda _: 0


def violations(operator: str, call: Call) -> list[str]:
    """What a call does not meet of its operator's contract; nothing if the operator has none.

    Args:
        operator: name with namespace, without overload, such as ``aten::_flash_attention_forward``.
        call: the call.
    """
    contract = CONTRACTS.get(operator)
    return [] if contract is None else list(contract.violations(call))


# --------------------------------------------------------------------------------------------------
# Common demands
# --------------------------------------------------------------------------------------------------


def _aligned_rows(call: Call, *names: str) -> Iterator[str]:
    """Unit stride in the last dimension, and every row at a multiple of 16 bytes."""
    for name in names:
        x: Tensor = call[name]
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            yield f"{name}: stride {x.stride(-1)} in the last dimension, must be 1"
        size = x.element_size()
        odd = [s for s, n in zip(x.stride()[:-1], x.shape[:-1], strict=True) if n > 1 and s * size % _ALIGNMENT]
        if odd:
            yield f"{name}: rows {odd[0]} elements apart, must be a multiple of {_ALIGNMENT} bytes"
        if x.storage_offset() * size % _ALIGNMENT:
            yield f"{name}: begins {x.storage_offset()} elements into its storage, must be a multiple of {_ALIGNMENT} bytes"


def _one_type(call: Call, types: tuple[torch.dtype, ...], *names: str) -> Iterator[str]:
    first: Tensor = call[names[0]]
    if first.dtype not in types:
        yield f"{names[0]}: {first.dtype}, must be {' or '.join(map(str, types))}"
    for name in names[1:]:
        if call[name].dtype != first.dtype:
            yield f"{name}: {call[name].dtype}, must be {first.dtype} as {names[0]} is"


def _on_cuda(call: Call, *names: str) -> Iterator[str]:
    for name in names:
        if not call[name].is_cuda:
            yield f"{name}: on {call[name].device}, must be on the GPU"


def _fp32_contiguous(call: Call, name: str, shape: tuple[int, ...]) -> Iterator[str]:
    x: Tensor = call[name]
    if x.dtype != torch.float32:
        yield f"{name}: {x.dtype}, must be torch.float32"
    if tuple(x.shape) != shape:
        yield f"{name}: shape {tuple(x.shape)}, must be {shape}"
    if not x.is_contiguous():
        yield f"{name}: strides {x.stride()}, must be contiguous"


def _heads(query_heads: int, kv_heads: int, head_size: int, largest: int) -> Iterator[str]:
    if head_size % 8 or head_size > largest:
        yield f"heads of {head_size} channels, must be a multiple of 8 and at most {largest}"
    if query_heads % kv_heads:
        yield f"{query_heads} query heads, must be a multiple of the {kv_heads} key-value heads"


def _pairs(queries: int, keys: int, *, causal: bool) -> int:
    """Visible query-key pairs; the first query sees the first key only."""
    seen = min(queries, keys)
    return seen * (seen + 1) // 2 + (queries - seen) * keys if causal else queries * keys


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


# --------------------------------------------------------------------------------------------------
# FlashAttention 2 with variable lengths: [total, heads, D] (flash_attn/flash_api.cpp: mha_varlen_fwd, mha_varlen_bwd)
# --------------------------------------------------------------------------------------------------


def _flash(call: Call) -> Iterator[str]:
    q, k = call["query"], call["key"]
    yield from _one_type(call, _HALF, "query", "key", "value")
    yield from _on_cuda(call, "query", "key", "value", "cum_seq_q", "cum_seq_k")
    yield from _aligned_rows(call, "query", "key", "value")
    yield from _heads(q.shape[1], k.shape[1], q.shape[2], 256)
    for name, rows, longest in (("cum_seq_q", q.shape[0], "max_q"), ("cum_seq_k", k.shape[0], "max_k")):
        ends: Tensor = call[name]
        if ends.dtype != torch.int32 or not ends.is_contiguous():
            yield f"{name}: {ends.dtype} with strides {ends.stride()}, must be contiguous torch.int32"
        known = call.values(ends)
        if known is not None:
            lengths = known.diff()
            if int(known[0]) != 0 or int(known[-1]) != rows or bool((lengths < 0).any()):
                yield f"{name}: {known.tolist()[:4]}..., must rise from 0 to the {rows} rows"
            elif int(lengths.max()) > call[longest]:
                yield f"{longest}={call[longest]}, must be at least the longest run, {int(lengths.max())}"


def _flash_backward(call: Call) -> Iterator[str]:
    yield from _flash(call)
    yield from _one_type(call, _HALF, "query", "grad_out", "out")
    yield from _aligned_rows(call, "grad_out", "out")
    n, heads, _ = call["query"].shape
    yield from _fp32_contiguous(call, "logsumexp", (heads, n))


def _flash_pairs(call: Call) -> int:
    runs_q, runs_k = call.values(call["cum_seq_q"]), call.values(call["cum_seq_k"])
    if runs_q is None or runs_k is None:
        return _pairs(call["query"].shape[0], call["key"].shape[0], causal=call["is_causal"])
    pairs = zip(runs_q.diff().tolist(), runs_k.diff().tolist(), strict=True)
    return sum(_pairs(n, m, causal=call["is_causal"]) for n, m in pairs)


def _flash_work(products: int) -> Callable[[Call], int]:
    def work(call: Call) -> int:
        _, heads, size = call["query"].shape
        return 2 * products * _flash_pairs(call) * heads * size

    return work


def _flash_workspace(call: Call) -> int:
    (n, heads, size), m = call["query"].shape, call["key"].shape[0]
    runs, width = call["cum_seq_q"].numel() - 1, call["query"].element_size()
    softmax_d = 4 * runs * heads * _round_up(call["max_q"], 128)
    dq_accum = 4 * (n + 128 * runs) * heads * _round_up(size, 32)
    expanded = 2 * m * heads * size * width if call["key"].shape[1] != heads else 0
    # The operator makes both contiguous before the kernel is called.
    copies = sum(n * heads * size * width for name in ("grad_out", "out") if not call[name].is_contiguous())
    return int(softmax_d + dq_accum + expanded + copies)


# --------------------------------------------------------------------------------------------------
# Scaled dot products: [1 or K, heads, rows, D]
# --------------------------------------------------------------------------------------------------


def _dot_product_work(products: int) -> Callable[[Call], int]:
    def work(call: Call) -> int:
        batch, heads, n, size = call["query"].shape
        return 2 * products * batch * heads * size * _pairs(n, call["key"].shape[2], causal=call["is_causal"])

    return work


def _cudnn(call: Call) -> Iterator[str]:
    """cuDNN describes every tensor by its strides (native/cudnn/MHA.cpp)."""
    q, k = call["query"], call["key"]
    yield from _one_type(call, _HALF, "query", "key", "value")
    yield from _on_cuda(call, "query", "key", "value")
    yield from _aligned_rows(call, "query", "key", "value")
    yield from _heads(q.shape[1], k.shape[1], q.shape[3], 128)


def _cudnn_backward(call: Call) -> Iterator[str]:
    yield from _cudnn(call)
    yield from _one_type(call, _HALF, "query", "grad_out", "out")
    yield from _aligned_rows(call, "grad_out", "out")
    if call["grad_out"].stride() != call["out"].stride():
        yield f"grad_out: strides {call['grad_out'].stride()}, must be those of out, {call['out'].stride()}"
    batch, heads, n, _ = call["query"].shape
    yield from _fp32_contiguous(call, "logsumexp", (batch, heads, n, 1))


def _cudnn_workspace(call: Call) -> int:
    """What cudnn-frontend's SDPA backward asks for: dQ and row sums in fp32, and dK, dV per query head."""
    batch, heads, n, size = call["query"].shape
    m = call["key"].shape[2]
    fullhead = 2 * m * size * call["query"].element_size() if call["key"].shape[1] != heads else 0
    return int(batch * heads * (4 * n * size + 4 * n + fullhead))


def _memory_efficient(call: Call) -> Iterator[str]:
    yield from _one_type(call, (*_HALF, torch.float32), "query", "key", "value")
    yield from _on_cuda(call, "query", "key", "value")
    yield from _aligned_rows(call, "query", "key", "value")
    if call["key"].shape[1] != call["query"].shape[1]:
        yield f"{call['key'].shape[1]} key heads, must be the {call['query'].shape[1]} query heads (an expanded view will do)"


def _memory_efficient_backward(call: Call) -> Iterator[str]:
    yield from _memory_efficient(call)
    yield from _one_type(call, (*_HALF, torch.float32), "query", "grad_out_", "out")
    yield from _aligned_rows(call, "grad_out_", "out")
    batch, heads, n, _ = call["query"].shape
    yield from _fp32_contiguous(call, "logsumexp", (batch, heads, _round_up(n, 32)))
    # mem_eff_attention/kernel_backward.h, `o_strideM()`: the kernel is given no stride of the rows of `out` and takes them to lie
    # heads x D apart. It reads them in 16-bit types only, where it computes rowsum(dO * O) itself.
    out: Tensor = call["out"]
    assumed = out.shape[1] * out.shape[3]
    if out.dtype in _HALF and n > 1 and out.stride(2) != assumed:
        yield f"out: rows {out.stride(2)} elements apart, but the kernel reads them {assumed} apart (heads x channels)"


def _memory_efficient_workspace(call: Call) -> int:
    """dQ in fp32 for 16-bit types, and rowsum(dO * O); dK and dV stay in registers up to 128 channels."""
    batch, heads, n, size = call["query"].shape
    half = call["query"].dtype in _HALF
    beyond = 0 if size <= 128 else 2 * call["key"].shape[2] * size
    return int(batch * heads * (4 * n + 4 * (n * size + beyond) * half))


# --------------------------------------------------------------------------------------------------
# Products with fp32 results, norms
# --------------------------------------------------------------------------------------------------


def _matrix(call: Call, *names: str) -> Iterator[str]:
    """cuBLAS takes a matrix or its transpose: one of its strides is 1. torch would copy others."""
    for name in names:
        x: Tensor = call[name]
        if x.dim() == 2 and 1 not in x.stride() and min(x.shape) > 1:
            yield f"{name}: strides {x.stride()}, one must be 1"


def _wide_product(first: str, second: str) -> Callable[[Call], Iterator[str]]:
    def check(call: Call) -> Iterator[str]:
        yield from _one_type(call, _HALF, first, second)
        yield from _matrix(call, first, second)
        if call["out_dtype"] != torch.float32:
            yield f"out_dtype: {call['out_dtype']}, must be torch.float32"
        out = call.arguments.get("out")
        if out is not None and (out.dtype != torch.float32 or out.stride(-1) != 1):
            yield f"out: {out.dtype} with strides {out.stride()}, must be torch.float32 with a last stride of 1"

    return check


def _product_work(first: str, second: str) -> Callable[[Call], int]:
    def work(call: Call) -> int:
        *batch, m, k = call[first].shape
        return 2 * math.prod(batch) * m * k * int(call[second].shape[-1])

    return work


def _norm_backward(call: Call) -> Iterator[str]:
    yield from _one_type(call, (*_HALF, torch.float32), "input", "grad_out", "weight")
    if call["rstd"].dtype != torch.float32:
        yield f"rstd: {call['rstd'].dtype}, must be torch.float32"


def _nothing(_call: Call) -> Iterator[str]:
    yield from ()


CONTRACTS: dict[str, Contract] = {
    "aten::_flash_attention_forward": Contract(_flash, _flash_work(2)),
    # Five products: scores, dV, dP, dQ, dK.
    "aten::_flash_attention_backward": Contract(_flash_backward, _flash_work(5), _flash_workspace),
    "aten::_scaled_dot_product_cudnn_attention": Contract(_cudnn, _dot_product_work(2)),
    "aten::_scaled_dot_product_cudnn_attention_backward": Contract(
        _cudnn_backward, _dot_product_work(5), _cudnn_workspace
    ),
    "aten::_scaled_dot_product_efficient_attention": Contract(_memory_efficient, _dot_product_work(2)),
    "aten::_scaled_dot_product_efficient_attention_backward": Contract(
        _memory_efficient_backward, _dot_product_work(5), _memory_efficient_workspace
    ),
    "aten::_fused_rms_norm_backward": Contract(_norm_backward),
    "aten::mm": Contract(_nothing, _product_work("self", "mat2")),
    "aten::bmm": Contract(_nothing, _product_work("self", "mat2")),
    "aten::addmm": Contract(_nothing, _product_work("mat1", "mat2")),
    "aten::addmm_": Contract(_nothing, _product_work("mat1", "mat2")),
    "aten::baddbmm": Contract(_nothing, _product_work("batch1", "batch2")),
    # Overloads of mm and addmm with an output type.
    "aten::mm.dtype": Contract(_wide_product("self", "mat2"), _product_work("self", "mat2")),
    "aten::addmm.dtype": Contract(_wide_product("mat1", "mat2"), _product_work("mat1", "mat2")),
}


def contract_of(name: str, overload: str) -> Contract | None:
    """The contract of an operator, or None.

    Args:
        name: name with namespace.
        overload: name of the overload.
    """
    if overload.startswith("dtype"):
        return CONTRACTS.get(f"{name}.dtype")
    return CONTRACTS.get(name)
