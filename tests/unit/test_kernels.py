"""Attention kernels against the plain formula: those that run here, and what those for CUDA hand to torch's operators.

torch's CUDA operators cannot run on a CPU. Stand-ins take their place: they have the operators' signatures, refuse what the
operators refuse, and read memory the way the kernels read it (which is not always the way the strides say).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_longpo.errors import ConfigError
from megatron_longpo.model import kernels as kernels_module
from megatron_longpo.model.blocks import Blocks, CausalBlock, FullBlock, block_attention, blocks_of
from megatron_longpo.model.kernels import (
    AttentionKernels,
    BlockInputs,
    CpuFlash,
    CudaFlash,
    CudaFused,
    CudaLargestFused,
    CudaMemoryEfficient,
    Unfused,
    kernels_for,
)
from megatron_longpo.runtime import platform
from tests.support.attention import tree


def _repeat(x_mKD: Tensor, heads: int) -> Tensor:
    return x_mKD.repeat_interleave(heads // x_mKD.shape[1], 1)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("nhd,mhd->hnm", q, _repeat(k, q.shape[1])) * scale
    scores = scores.masked_fill(~mask, -torch.inf)
    return torch.einsum("hnm,mhd->nhd", scores.softmax(-1), _repeat(v, q.shape[1])), scores.logsumexp(-1)


def _gradients(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, delta_HN: Tensor, lse_HN: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, and of k and v per query head."""
    heads = q.shape[1]
    scores = torch.einsum("nhd,mhd->hnm", q, _repeat(k, heads)) * scale
    weights = (scores - lse_HN.unsqueeze(-1)).exp().masked_fill(~mask, 0.0)
    inner = weights * (torch.einsum("nhd,mhd->hnm", g, _repeat(v, heads)) - delta_HN.unsqueeze(-1)) * scale
    return (
        torch.einsum("hnm,mhd->nhd", inner, _repeat(k, heads)),
        torch.einsum("hnm,nhd->mhd", inner, q),
        torch.einsum("hnm,nhd->mhd", weights, g),
    )


def _triangle(n: int, m: int, causal: bool) -> Tensor:
    mask = torch.ones(n, m, dtype=torch.bool)
    return mask.tril() if causal else mask


class _Operators:
    """Stand-ins for torch's operators on CUDA. ``calls`` counts the forwards by operator."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in (
            "_flash_attention_forward",
            "_flash_attention_backward",
            "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_cudnn_attention_backward",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_efficient_attention_backward",
        ):
            monkeypatch.setattr(torch.ops.aten, name, getattr(self, name))

    def _count(self, name: str) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1

    # FlashAttention: [tokens, heads, D], boundaries in int32, log-sum-exp [heads, tokens].

    @staticmethod
    def _packed_mask(of_q: Tensor, of_k: Tensor, max_q: int, max_k: int, causal: bool) -> Tensor:
        for boundaries, longest in ((of_q, max_q), (of_k, max_k)):
            assert boundaries.dtype == torch.int32 and boundaries.is_contiguous()
            assert longest == int(boundaries.diff().max())
        mask = torch.zeros(int(of_q[-1]), int(of_k[-1]), dtype=torch.bool)
        for i in range(len(of_q) - 1):
            rows, columns = slice(of_q[i], of_q[i + 1]), slice(of_k[i], of_k[i + 1])
            mask[rows, columns] = _triangle(rows.stop - rows.start, columns.stop - columns.start, causal)
        return mask

    @staticmethod
    def _readable(*tensors: Tensor) -> None:
        for x in tensors:
            assert x.stride(-1) == 1 and x.shape[-1] % 8 == 0

    def _flash_attention_forward(
        self, q: Tensor, k: Tensor, v: Tensor, of_q: Tensor, of_k: Tensor, max_q: int, max_k: int, dropout: float,
        causal: bool, debug: bool, *, scale: float,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        self._count("flash")
        assert dropout == 0 and not debug
        self._readable(q, k, v)
        out, lse = _attention(q, k, v, self._packed_mask(of_q, of_k, max_q, max_k, causal), scale)
        return out, lse, torch.zeros(2), torch.zeros(()), torch.zeros(0)

    def _flash_attention_backward(
        self, g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, of_q: Tensor, of_k: Tensor,
        max_q: int, max_k: int, dropout: float, causal: bool, state: Tensor, unused: Tensor, *, scale: float,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        assert dropout == 0 and lse.is_contiguous() and lse.shape == (q.shape[1], q.shape[0])
        self._readable(g, q, k, v, out)
        mask = self._packed_mask(of_q, of_k, max_q, max_k, causal)
        gq, gk, gv = _gradients(g, q, k, v, (g * out).sum(-1).t(), lse, mask, scale)
        return gq, *(x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (gk, gv))

    # cuDNN: [1, heads, n, D], log-sum-exp [1, heads, n, 1].

    def _scaled_dot_product_cudnn_attention(
        self, q: Tensor, k: Tensor, v: Tensor, bias: None, want_lse: bool, dropout: float, causal: bool, *, scale: float
    ) -> tuple[Tensor, ...]:
        self._count("cudnn")
        assert bias is None and want_lse and dropout == 0 and q.shape[0] == k.shape[0] == 1
        self._readable(q, k, v)
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        out, lse = _attention(q, k, v, _triangle(len(q), len(k), causal), scale)
        return out.transpose(0, 1)[None], lse[None, ..., None], *[None] * 7  # type: ignore[return-value]

    def _scaled_dot_product_cudnn_attention_backward(
        self, g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seed: Tensor, offset: Tensor,
        bias: None, of_q: None, of_k: None, max_q: int, max_k: int, dropout: float, causal: bool, *, scale: float,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        assert lse.shape == (1, q.shape[1], q.shape[2], 1) and lse.is_contiguous()
        assert (max_q, max_k, dropout) == (q.shape[2], k.shape[2], 0) and g.stride() == out.stride()
        self._readable(g, q, k, v, out)
        g, q, k, v, out = (x[0].transpose(0, 1) for x in (g, q, k, v, out))
        mask = _triangle(len(q), len(k), causal)
        gq, gk, gv = _gradients(g, q, k, v, (g * out).sum(-1).t(), lse[0, ..., 0], mask, scale)
        gk, gv = (x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (gk, gv))
        return tuple(x.transpose(0, 1)[None] for x in (gq, gk, gv))

    # cutlass: [batch, heads, n, D] with as many key-value heads; log-sum-exp padded to a multiple of 32.

    def _scaled_dot_product_efficient_attention(
        self, q: Tensor, k: Tensor, v: Tensor, bias: None, compute_log_sumexp: bool, is_causal: bool, scale: float
    ) -> tuple[Tensor, ...]:
        self._count("efficient")
        assert bias is None and compute_log_sumexp and q.shape[:2] == k.shape[:2] == v.shape[:2]
        self._readable(q, k, v)
        found = [
            _attention(*(x.transpose(0, 1) for x in heads), _triangle(q.shape[2], k.shape[2], is_causal), scale)
            for heads in zip(q, k, v, strict=True)
        ]
        # The kernel writes [batch, n, heads, D].
        out = torch.stack([out for out, _ in found]).transpose(1, 2)
        lse = torch.stack([lse for _, lse in found])
        return out, torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf), None, None  # type: ignore[return-value]

    def _scaled_dot_product_efficient_attention_backward(
        self, g: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: None, out: Tensor, lse: Tensor, seed: Tensor,
        offset: Tensor, dropout: float, wanted: list[bool], is_causal: bool, scale: float,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        batch, heads, n, width = q.shape
        assert lse.shape == (batch, heads, n + -n % 32) and lse.is_contiguous() and dropout == 0
        assert wanted == [True, True, True, False]
        self._readable(g, q, k, v, out)
        # The kernel takes the strides of batch and heads from the tensor, but assumes heads * D between rows.
        as_read = out.as_strided(out.shape, (out.stride(0), out.stride(1), heads * width, 1))
        delta = (g * as_read).sum(-1)
        mask = _triangle(n, k.shape[2], is_causal)
        parts = [
            _gradients(*(x[i].transpose(0, 1) for x in (g, q, k, v)), delta[i], lse[i, :, :n], mask, scale)  # type: ignore[arg-type]
            for i in range(batch)
        ]
        return *(torch.stack(x).transpose(1, 2) for x in zip(*parts, strict=True)), None  # type: ignore[return-value]


_ON_CUDA = (CudaFlash(), CudaFused(), CudaLargestFused(), CudaMemoryEfficient())


def _values(kernels: AttentionKernels, tensors: list[Tensor], blocks: Blocks, direction: Tensor) -> tuple[Tensor, ...]:
    out = block_attention(*tensors, blocks, 0.3, kernels)  # type: ignore[misc]
    return out, *torch.autograd.grad((out * direction).sum(), tensors)


@pytest.mark.parametrize("kernels", [*_ON_CUDA, Unfused()], ids=lambda k: k.name)
@pytest.mark.parametrize(("head_size", "kv_heads"), [(8, 2), (12, 2), (8, 1), (16, 4)])
@pytest.mark.parametrize("window", [None, 9])
def test_kernels_agree_with_those_of_the_cpu(
    monkeypatch: pytest.MonkeyPatch, kernels: AttentionKernels, head_size: int, kv_heads: int, window: int | None
) -> None:
    """A tree of branches, values and every gradient. Head sizes that the CUDA kernels refuse are padded."""
    monkeypatch.setattr(kernels_module, "_FUSED_FROM", 1800)
    _Operators().install(monkeypatch)
    layout, tensors = tree(0, head_size, kv_heads)
    blocks = blocks_of(layout.query_spans, window, layout.positions_S)
    direction = torch.randn_like(tensors[0])
    expected = _values(CpuFlash(), tensors, blocks, direction)
    for found, value in zip(_values(kernels, tensors, blocks, direction), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernels", _ON_CUDA, ids=lambda k: k.name)
def test_kernels_take_slices_of_heads(monkeypatch: pytest.MonkeyPatch, kernels: AttentionKernels) -> None:
    """Context parallelism by all-gather hands over some heads of wider tensors, the output and its gradient too."""
    _Operators().install(monkeypatch)
    torch.manual_seed(0)
    q, g, out = (torch.randn(33, 8, 16)[:, 2:6] for _ in range(3))
    k, v = (torch.randn(33, 4, 16)[:, 1:3] for _ in range(2))
    block = BlockInputs(q, k, v, (33,), 0.25)
    made, lse = CpuFlash().forward(block)
    out.copy_(made)
    expected = CpuFlash().backward(block, g, out, lse)
    for found, value in zip(kernels.backward(block, g, out, lse), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)


def test_one_call_takes_all_causal_blocks_where_the_kernels_can(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, tensors = tree(0)
    blocks = blocks_of(layout.query_spans)
    operators = _Operators()
    operators.install(monkeypatch)
    block_attention(*tensors, blocks, 0.3, CudaFlash())  # type: ignore[misc]
    assert operators.calls == {"flash": 1 + len(blocks.full)}
    operators.calls.clear()
    block_attention(*tensors, blocks, 0.3, CudaFused())  # type: ignore[misc]
    assert operators.calls == {"cudnn": len(blocks.causal) + len(blocks.full)}


def test_large_blocks_go_to_cudnn_and_small_ones_together_to_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    # Pairs times four heads; a causal block has half of its square.
    monkeypatch.setattr(kernels_module, "_FUSED_FROM", 800)
    operators = _Operators()
    operators.install(monkeypatch)
    blocks = Blocks(
        (CausalBlock(0, 0, 20), CausalBlock(20, 20, 5), CausalBlock(25, 25, 6)),
        (FullBlock(20, 31, 0, 20), FullBlock(5, 25, 0, 20)),
    )
    q, k, v = torch.randn(31, 4, 8), torch.randn(31, 2, 8), torch.randn(31, 2, 8)
    block_attention(q, k, v, blocks, 0.3, CudaLargestFused())
    # The trunk and both full blocks; the two branches in one call.
    assert operators.calls == {"cudnn": 3, "flash": 1}


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_flash_cuts_the_keys_of_a_block_whose_queries_do_not_fill_the_gpu(
    monkeypatch: pytest.MonkeyPatch, kv_heads: int
) -> None:
    # 64 multiprocessors are to have 2 tiles each: four heads make one tile each, so 32 runs, of at least 10 of the 40 keys.
    monkeypatch.setattr(type(kernels_module.platform.CURRENT), "multiprocessors", lambda _: 64)
    monkeypatch.setattr(kernels_module, "_LEAST_KEYS", 10)
    assert [kernels_module._key_parts(n, 4, 1000) for n in (1, 128, 129, 128 * 16, 128 * 17)] == [32, 32, 16, 2, 1]
    assert kernels_module._key_parts(128, 4, 40) == 4 and kernels_module._key_parts(128, 4, 9) == 1
    operators = _Operators()
    operators.install(monkeypatch)
    runs: list[int] = []
    whole = operators._flash_attention_forward

    def seen(*args: Any, **kwargs: Any) -> Any:
        runs.append(args[3].numel() - 1)
        return whole(*args, **kwargs)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", seen)
    layout, tensors = tree(0, kv_heads=kv_heads)
    blocks = blocks_of(layout.query_spans)
    direction = torch.randn_like(tensors[0])
    expected = _values(CpuFlash(), tensors, blocks, direction)
    for found, value in zip(_values(CudaFlash(), tensors, blocks, direction), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)
    # All causal runs in one call, and the branches on their trunk's 39 places.
    assert runs == [len(blocks.causal), 3] and len(blocks.full) == 1


def test_groups_of_heads_share_the_plan_of_cudnn() -> None:
    kernels = CudaLargestFused()
    # A causal block of 32768 places: too small with one head, large enough as one of four groups.
    assert kernels.calls((32768, 5, 6), 1) == [[0, 1, 2]]
    assert kernels_module.for_groups(kernels, 4).calls((32768, 5, 6), 1) == [[0], [1, 2]]
    assert kernels_module.for_groups(CudaFlash(), 4) == CudaFlash()


def test_the_stand_in_shows_what_other_strides_of_the_output_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Handing over a plain view of the output gives wrong gradients with several key-value heads, as on a GPU."""
    _Operators().install(monkeypatch)
    monkeypatch.setattr(kernels_module, "rows_of_groups", kernels_module._grouped)
    for kv_heads, wrong in ((2, True), (1, False)):
        layout, tensors = tree(0, kv_heads=kv_heads)
        blocks = blocks_of(layout.query_spans)
        direction = torch.randn_like(tensors[0])
        expected = _values(CpuFlash(), tensors, blocks, direction)
        found = _values(CudaMemoryEfficient(), tensors, blocks, direction)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
        error = (found[1] - expected[1]).norm() / expected[1].norm()
        assert (error > 0.1) == wrong


def test_the_formula_in_fp64_is_exact() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(7, h, 4, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2)]
    blocks = Blocks((CausalBlock(0, 0, 5), CausalBlock(5, 5, 2)), (FullBlock(5, 7, 0, 4),))
    assert torch.autograd.gradcheck(lambda *x: block_attention(*x, blocks, 0.5, Unfused()), tensors)


@pytest.mark.parametrize(
    ("device", "dtype", "head_size", "wanted", "name"),
    [
        ("cpu", torch.float32, 64, "auto", "flash"),
        ("cpu", torch.bfloat16, 64, "unfused", "unfused"),
        ("cuda", torch.float32, 128, "auto", "memory_efficient"),
        ("cuda", torch.bfloat16, 512, "auto", "memory_efficient"),
        ("cuda", torch.bfloat16, 128, "flash", "flash"),
        ("cuda", torch.bfloat16, 128, "fused", "fused"),
    ],
)
def test_the_choice_by_device_and_type(device: str, dtype: torch.dtype, head_size: int, wanted: str, name: str) -> None:
    assert kernels_for(device, dtype, head_size, wanted).kernels.name == name


@pytest.mark.parametrize(
    ("device", "dtype", "head_size", "wanted", "message"),
    [
        ("cpu", torch.float32, 64, "fused", "attention_backend=fused runs on CUDA only; use auto, flash or unfused"),
        ("cuda", torch.float32, 64, "flash", "takes bf16 and fp16 only, not torch.float32; set bf16"),
        ("cuda", torch.bfloat16, 512, "fused", "at most 256 channels, not 512"),
    ],
)
def test_what_a_kernel_cannot_do_is_refused(
    device: str, dtype: torch.dtype, head_size: int, wanted: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        kernels_for(device, dtype, head_size, wanted)


@pytest.mark.skipif(
    not platform.CURRENT.is_cuda, reason="the real operators need a process on a GPU (test_gpus.py starts one)"
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("heads", [(8, 2, 64), (32, 8, 128), (4, 1, 128), (4, 4, 16), (4, 2, 12)], ids=str)
@pytest.mark.parametrize("kernels", _ON_CUDA, ids=lambda k: k.name)
def test_real_kernels_agree_with_the_formula(
    monkeypatch: pytest.MonkeyPatch, kernels: AttentionKernels, heads: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """On a GPU, against fp64, on slices of wider tensors: as near as the type allows (seen on an H200: a third of it)."""
    if dtype == torch.float32 and kernels.name != "memory_efficient":
        pytest.skip("takes 16-bit types only")
    monkeypatch.setattr(kernels_module, "_FUSED_FROM", 2**12)
    query_heads, kv_heads, head_size = heads
    layout, _ = tree(0)
    blocks, n = blocks_of(layout.query_spans), layout.length + 2
    torch.manual_seed(0)
    wide = [torch.randn(n, 2 * h, head_size, device="cuda").to(dtype) for h in (query_heads, kv_heads, kv_heads)]
    tensors = [x[:, : x.shape[1] // 2].requires_grad_() for x in wide]
    direction = torch.randn(n, query_heads, head_size, device="cuda").to(dtype)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    found, expected = (
        _values(k, x, blocks, direction.to(x[0].dtype)) for k, x in ((kernels, tensors), (Unfused(), exact))
    )
    bound = {torch.bfloat16: 1e-2, torch.float16: 1.2e-3, torch.float32: 3e-6}[dtype]
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).norm() <= bound * b.norm()
