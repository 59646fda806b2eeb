"""Attention kernels behind one protocol: plain or causal attention of a block, with its log-sum-exp, and its backward.

Which one runs is decided once, when the model is built (``kernels_for``), and logged with the reason:

- ``flash`` on CUDA: FlashAttention 2 as torch carries it (``aten::_flash_attention_forward``): variable lengths and grouped
  heads, bf16 and fp16. Where FlashAttention 3 is installed and the GPU is a Hopper, torch's own switch puts it behind the
  same two operators. No package is needed.
- ``fused`` on CUDA: cuDNN's attention, bf16 and fp16.
- ``memory_efficient`` on CUDA: torch's cutlass kernels, the fast ones that also take fp32.
- ``flash`` on the CPU: torch's CPU flash kernels, any floating-point type.
- ``unfused``: the formula in torch, tile by tile, on any device. Slow; it is what the others are measured against.

The log-sum-exp of each block comes out of the forward, and the backward takes the *merged* output and log-sum-exp of all
blocks that share the queries (see ``blocks.py``). So a kernel must not assume that the two belong only to its own keys.

Shape legend: n = queries and m = keys of a block, Q/K = query/key-value heads, G = Q/K, D = head size.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from megatron_longpo.errors import ConfigError
from megatron_longpo.runtime import platform

AttentionBackend = Literal["auto", "flash", "fused", "memory_efficient", "unfused"]
Gradients = tuple[Tensor, Tensor, Tensor]

# The CUDA kernels want a head size that is a multiple of this; ours pads with zeros, which add nothing to any product.
_HEAD_MULTIPLE = 8
# Visible query-key pairs, times heads, from which cuDNN pays for its plan (see CudaLargestFused): 2**31 are a causal block
# of 11.6K tokens with 32 heads, or of 33K with 4.
_FUSED_FROM = 2**31
# Queries of one tile of the plain formula.
_TILE = 512
# FlashAttention 2's forward gives each multiprocessor a tile of this many queries of one head, and all keys.
_FLASH_TILE = 128
# Tiles per multiprocessor that are worth having, and keys that a tile should at least have.
_FLASH_WAVES, _LEAST_KEYS = 2, 2048


@dataclass(frozen=True)
class BlockInputs:
    """What attention within one block is computed from.

    Attributes:
        q: queries, [n, Q, D].
        k, v: keys and values, [m, K, D].
        lengths: None if every query attends to every key. Otherwise queries and keys are runs of these lengths (n = m = their
            sum), and a query attends to the keys of its own run up to itself.
        scale: factor of the dot products.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    lengths: tuple[int, ...] | None
    scale: float

    @property
    def causal(self) -> bool:
        return self.lengths is not None

    @property
    def runs(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Lengths of the runs of queries and of keys."""
        return self.lengths or (self.q.shape[0],), self.lengths or (self.k.shape[0],)


class AttentionKernels(Protocol):
    """Forward and backward of one block, or of several causal blocks at once."""

    @property
    def name(self) -> str:
        """As ``attention_backend`` names it."""
        ...

    def calls(self, lengths: tuple[int, ...], heads: int, /) -> list[list[int]]:
        """Group causal blocks of these lengths, with this number of query heads, into calls of ``forward``.

        Returns:
            The indices of the blocks of each call.
        """
        ...

    def forward(self, block: BlockInputs) -> tuple[Tensor, Tensor]:
        """Compute the output, [n, Q, D], and the log-sum-exp, [Q, n], at least in fp32."""
        ...

    def backward(self, block: BlockInputs, grad_out: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        """Compute this block's share of the gradients.

        Args:
            block: inputs of the block.
            grad_out: gradient of the output, [n, Q, D].
            out: output, merged over all blocks that share the queries, [n, Q, D].
            lse: log-sum-exp, merged likewise, [Q, n].

        Returns:
            Gradients of q, k and v. The latter two are in fp32 if the kernel makes one per query head, since they are then
            summed over the G heads.
        """
        ...


@dataclass(frozen=True)
class CpuFlash:
    """torch's flash kernels for the CPU. They take strided views and stride-0 (shared) key-value heads."""

    name: str = "flash"

    def calls(self, lengths: tuple[int, ...], _heads: int, /) -> list[list[int]]:
        return _one_by_one(lengths)

    def forward(self, block: BlockInputs) -> tuple[Tensor, Tensor]:
        q, k, v = block.q, block.k, block.v
        heads, kv_heads = q.shape[1], k.shape[1]
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            _grouped(q, kv_heads), _shared(k, heads), _shared(v, heads), 0.0, block.causal, scale=block.scale
        )
        return _ungrouped(out), lse.flatten(0, 1)

    def backward(self, block: BlockInputs, grad_out: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        q, k, v = block.q, block.k, block.v
        heads, kv_heads = q.shape[1], k.shape[1]
        g4, q4, o4 = (_grouped(x, kv_heads) for x in (grad_out, q, out))
        gq, gk, gv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            g4,
            q4,
            _shared(k, heads),
            _shared(v, heads),
            o4,
            lse.unflatten(0, (kv_heads, -1)),
            0.0,
            block.causal,
            scale=block.scale,
        )
        return _ungrouped(gq), _summed(gk), _summed(gv)


@dataclass(frozen=True)
class CudaFlash:
    """FlashAttention 2 as every CUDA build of torch carries it: variable lengths, grouped heads, log-sum-exp [Q, n].

    The kernels take strided rows and heads, unit stride in the last dimension only. With dropout 0 the two random-state
    arguments of the backward are not read.

    The forward has one tile per 128 queries and head, so a few branches on a long trunk leave most of the GPU idle: 900 queries
    with 4 heads on 131072 keys are 32 tiles for 132 multiprocessors, and reached 63 TFLOP/s where 32 heads reached 318 (H200).
    So the keys of such a block are cut into runs, each with a copy of the queries, and the results merged by log-sum-exp. (The
    backward has tiles of keys, of which there are enough.)
    """

    name: str = "flash"

    def calls(self, lengths: tuple[int, ...], _heads: int, /) -> list[list[int]]:
        return [list(range(len(lengths)))] if lengths else []

    def forward(self, block: BlockInputs) -> tuple[Tensor, Tensor]:
        q = block.q
        (n, heads, head_size), keys = q.shape, block.k.shape[0]
        of_q, of_k = block.runs
        parts = 1 if block.causal else _key_parts(n, heads, keys)
        if parts > 1:
            of_q = (n,) * parts
            of_k = tuple(keys * (i + 1) // parts - keys * i // parts for i in range(parts))
            q = q.repeat(parts, 1, 1)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            _padded(q),
            _padded(block.k),
            _padded(block.v),
            _boundaries(of_q, q.device),
            _boundaries(of_k, q.device),
            max(of_q),
            max(of_k),
            0.0,
            block.causal,
            False,
            scale=block.scale,
        )
        out = out[..., :head_size]
        if parts == 1:
            return out, lse
        lse_QPn = lse.unflatten(1, (parts, n))
        merged = lse_QPn.logsumexp(1)
        weights_PnQ = (lse_QPn - merged.unsqueeze(1)).exp_().permute(1, 2, 0)
        # The weights are fp32, so 16-bit outputs are rounded only once.
        return (out.unflatten(0, (parts, n)) * weights_PnQ.unsqueeze(-1)).sum(0).to(q.dtype), merged

    def backward(self, block: BlockInputs, grad_out: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        q, k, v = block.q, block.k, block.v
        head_size = q.shape[-1]
        of_q, of_k = block.runs
        unused = _random_state(q.device)
        gq, gk, gv = torch.ops.aten._flash_attention_backward(
            _padded(grad_out),
            _padded(q),
            _padded(k),
            _padded(v),
            _padded(out),
            lse.contiguous(),
            _boundaries(of_q, q.device),
            _boundaries(of_k, q.device),
            max(of_q),
            max(of_k),
            0.0,
            block.causal,
            unused,
            unused,
            scale=block.scale,
        )
        return gq[..., :head_size], gk[..., :head_size], gv[..., :head_size]


@dataclass(frozen=True)
class CudaFused:
    """cuDNN's attention: one block per call, grouped heads, log-sum-exp [1, Q, n, 1]."""

    name: str = "fused"

    def calls(self, lengths: tuple[int, ...], _heads: int, /) -> list[list[int]]:
        return _one_by_one(lengths)

    def forward(self, block: BlockInputs) -> tuple[Tensor, Tensor]:
        q, k, v = block.q, block.k, block.v
        head_size = q.shape[-1]
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *(_batch_of_one(_padded(x)) for x in (q, k, v)), None, True, 0.0, block.causal, scale=block.scale
        )
        return out[0].transpose(0, 1)[..., :head_size], lse.reshape(q.shape[1], q.shape[0])

    def backward(self, block: BlockInputs, grad_out: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        q, k, v = block.q, block.k, block.v
        head_size = q.shape[-1]
        unused = _random_state(q.device)
        # cuDNN describes output and its gradient by one layout: both are made contiguous alike.
        g4, o4 = (_batch_of_one(_padded(x).contiguous()) for x in (grad_out, out))
        q4, k4, v4 = (_batch_of_one(_padded(x)) for x in (q, k, v))
        gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            g4,
            q4,
            k4,
            v4,
            o4,
            lse.contiguous().view(1, *lse.shape, 1),
            unused,
            unused,
            None,
            None,
            None,
            q.shape[0],
            k.shape[0],
            0.0,
            block.causal,
            scale=block.scale,
        )
        gq, gk, gv = (x[0].transpose(0, 1)[..., :head_size] for x in gradients)
        return gq, gk, gv


@dataclass(frozen=True)
class CudaLargestFused:
    """cuDNN for large blocks, FlashAttention 2 for the others.

    On an H200 cuDNN computes a large block, forward and backward, 1.7 to 1.9 times as fast. But for each shape that it has not
    seen it first builds plans on the host: 0.12 to 0.19 s for the two directions together, which all layers share. The rows of
    a preference data set have nearly as many lengths as there are rows, so a block must be large enough for 32 layers to win
    that time back. (Measured with cuDNN 9.19 and torch 2.11: docs/gpu.md.)

    Attributes:
        fused, flash: the two.
        groups: groups of as many heads that each layer computes one after another, with the same plan.
    """

    fused: CudaFused = CudaFused()
    flash: CudaFlash = CudaFlash()
    name: str = "auto"
    groups: int = 1

    def calls(self, lengths: tuple[int, ...], heads: int, /) -> list[list[int]]:
        large = [i for i, n in enumerate(lengths) if _is_large(n, n, heads * self.groups, causal=True)]
        small = [i for i in range(len(lengths)) if i not in large]
        return [[i] for i in large] + ([small] if small else [])

    def _for(self, block: BlockInputs) -> AttentionKernels:
        (queries, heads), keys = block.q.shape[:2], block.k.shape[0]
        is_single = len(block.runs[0]) == 1
        is_large = _is_large(queries, keys, heads * self.groups, causal=block.causal)
        return self.fused if is_single and is_large else self.flash

    def forward(self, block: BlockInputs) -> tuple[Tensor, Tensor]:
        return self._for(block).forward(block)

    def backward(self, block: BlockInputs, grad_out: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        return self._for(block).backward(block, grad_out, out, lse)


@dataclass(frozen=True)
class CudaMemoryEfficient:
    """torch's cutlass kernels.

    Their 16-bit backward computes rowsum(dO * O) itself and reads the rows of O as if they lay G * D elements apart, whatever
    strides O has (``o_strideM()`` in torch 2.14's mem_eff_attention/kernel_backward.h; no stride of O is passed). So O is
    handed over as rows of G heads per key-value head, and nothing else is right.
    """

    name: str = "memory_efficient"

    def calls(self, lengths: tuple[int, ...], _heads: int, /) -> list[list[int]]:
        return _one_by_one(lengths)

    def forward(self, block: BlockInputs) -> tuple[Tensor, Tensor]:
        q, k, v = block.q, block.k, block.v
        head_size, heads, kv_heads = q.shape[-1], q.shape[1], k.shape[1]
        q4, k4, v4 = _grouped(_padded(q), kv_heads), _shared(_padded(k), heads), _shared(_padded(v), heads)
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q4, k4, v4, None, compute_log_sumexp=True, is_causal=block.causal, scale=block.scale
        )
        # Rows of the log-sum-exp are padded to a multiple of 32.
        return _ungrouped(out)[..., :head_size], lse[..., : q.shape[0]].flatten(0, 1)

    def backward(self, block: BlockInputs, grad_out: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        q, k, v = block.q, block.k, block.v
        head_size, heads, kv_heads = q.shape[-1], q.shape[1], k.shape[1]
        g4, q4 = (_grouped(_padded(x), kv_heads) for x in (grad_out, q))
        k4, v4 = _shared(_padded(k), heads), _shared(_padded(v), heads)
        lse4 = torch.nn.functional.pad(lse.unflatten(0, (kv_heads, -1)), (0, -lse.shape[-1] % 32)).contiguous()
        unused = _random_state(q.device)
        gq, gk, gv, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            g4,
            q4,
            k4,
            v4,
            None,
            rows_of_groups(_padded(out), kv_heads),
            lse4,
            unused[0],
            unused[1],
            0.0,
            [True, True, True, False],
            is_causal=block.causal,
            scale=block.scale,
        )
        gq, gk, gv = _ungrouped(gq), _summed(gk), _summed(gv)
        return gq[..., :head_size], gk[..., :head_size], gv[..., :head_size]


@dataclass(frozen=True)
class Unfused:
    """The formula, in fp32 (fp64 for fp64 inputs), a tile of queries at a time: the oracle of the others."""

    name: str = "unfused"

    def calls(self, lengths: tuple[int, ...], _heads: int, /) -> list[list[int]]:
        return _one_by_one(lengths)

    def forward(self, block: BlockInputs) -> tuple[Tensor, Tensor]:
        q, k, v = block.q, block.k, block.v
        dtype = torch.promote_types(q.dtype, torch.float32)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = q.new_empty(q.shape[1], q.shape[0], dtype=dtype)
        keys, values = (_shared(x.to(dtype), q.shape[1]) for x in (k, v))
        for here, scores in _tiles(q.to(dtype), keys, causal=block.causal, scale=block.scale):
            lse[:, here] = scores.logsumexp(-1).flatten(0, 1)
            out[here] = _ungrouped(scores.softmax(-1) @ values).to(q.dtype)
        return out, lse

    def backward(self, block: BlockInputs, grad_out: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        q, k, v = block.q, block.k, block.v
        dtype, kv_heads, heads = torch.promote_types(q.dtype, torch.float32), k.shape[1], q.shape[1]
        keys, values = (_shared(x.to(dtype), heads) for x in (k, v))
        gq = torch.empty_like(q, memory_format=torch.contiguous_format)
        gk, gv = (torch.zeros(kv_heads, *x.shape[::2], dtype=dtype, device=q.device) for x in (k, v))
        # dS = P * (dO V^T - rowsum(dO * O)), as in FlashAttention's backward (arXiv 2205.14135, appendix B.4).
        delta = (grad_out.to(dtype) * out.to(dtype)).sum(-1).t().unflatten(0, (kv_heads, -1))
        lse_KGn = lse.to(dtype).unflatten(0, (kv_heads, -1))
        for here, scores in _tiles(q.to(dtype), keys, causal=block.causal, scale=block.scale):
            g4 = _grouped(grad_out[here].to(dtype), kv_heads)
            weights = (scores - lse_KGn[..., here].unsqueeze(-1)).exp()
            inner = weights * (g4 @ values.transpose(-1, -2) - delta[..., here].unsqueeze(-1)) * block.scale
            gq[here] = _ungrouped(inner @ keys).to(q.dtype)
            gk += (inner.transpose(-1, -2) @ _grouped(q[here].to(dtype), kv_heads)).sum(1)
            gv += (weights.transpose(-1, -2) @ g4).sum(1)
        return gq, gk.transpose(0, 1), gv.transpose(0, 1)


# --------------------------------------------------------------------------------------------------
# The choice
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """Kernels, and why these."""

    kernels: AttentionKernels
    reason: str


@functools.cache
def kernels_for(device_type: str, dtype: torch.dtype, head_size: int, wanted: str = "auto") -> Choice:
    """The kernels for a device, a type and a head size.

    Args:
        device_type: ``cpu`` or ``cuda``.
        dtype: type of queries, keys and values.
        head_size: D.
        wanted: ``attention_backend``.

    Raises:
        ConfigError: what is wanted is not there for this device, type or head size.
    """
    if wanted == "unfused":
        return Choice(Unfused(), "as requested; slow")
    if device_type != "cuda":
        if wanted in ("auto", "flash"):
            return Choice(CpuFlash(), "torch's flash kernels for the CPU")
        raise ConfigError(f"attention_backend={wanted} runs on CUDA only; use auto, flash or unfused on the CPU")
    half = dtype in (torch.bfloat16, torch.float16)
    if wanted in ("flash", "fused") and not half:
        raise ConfigError(
            f"attention_backend={wanted} takes bf16 and fp16 only, not {dtype}; set bf16, or use attention_backend=auto"
        )
    if wanted in ("flash", "fused") and head_size > 256:
        raise ConfigError(
            f"attention_backend={wanted} takes heads of at most 256 channels, not {head_size}; use attention_backend=auto"
        )
    if wanted == "flash":
        return Choice(CudaFlash(), f"FlashAttention {_flash_version()}, as requested")
    if wanted == "memory_efficient":
        return Choice(CudaMemoryEfficient(), "as requested")
    if wanted == "fused":
        return Choice(CudaFused(), "cuDNN, as requested")
    if not half:
        return Choice(CudaMemoryEfficient(), f"the fast CUDA kernels that take {dtype}")
    if head_size > 256:
        return Choice(CudaMemoryEfficient(), f"FlashAttention takes heads of at most 256 channels, not {head_size}")
    flash = f"FlashAttention {_flash_version()}"
    capability, cudnn = platform.CURRENT.capability(), torch.backends.cudnn.version() or 0
    if flash.startswith("FlashAttention 3"):
        return Choice(CudaFlash(), flash)
    if head_size > 128 or head_size % _HEAD_MULTIPLE or capability is None or capability < (9, 0) or cudnn < 90100:
        return Choice(CudaFlash(), flash)
    if torch.are_deterministic_algorithms_enabled():
        return Choice(CudaFlash(), f"{flash}; cuDNN's backward is not deterministic")
    return Choice(CudaLargestFused(), f"cuDNN {cudnn} for large blocks, else {flash}")


def names_of(kernels: AttentionKernels) -> tuple[str, ...]:
    """Names of all kernels that a choice may run."""
    return (kernels.fused.name, kernels.flash.name) if isinstance(kernels, CudaLargestFused) else (kernels.name,)


@functools.cache
def _flash_version() -> str:
    """Which FlashAttention stands behind torch's operators; FlashAttention 3 is put there where it can be."""
    attention = importlib.import_module("torch.nn.attention")
    activate = getattr(attention, "activate_flash_attention_impl", None)
    if activate is None or importlib.util.find_spec("flash_attn_interface") is None:
        return "2, as torch carries it"
    if platform.CURRENT.capability() != (9, 0):
        return "2, as torch carries it (FlashAttention 3 is for Hopper GPUs)"
    try:
        activate("FA3")
    except Exception as error:  # whatever another build of that package raises, torch's own kernels remain
        return f"2, as torch carries it (FlashAttention 3 could not be activated: {error})"
    return "3, through torch's switch"


def _is_large(queries: int, keys: int, heads: int, *, causal: bool) -> bool:
    return queries * keys * heads >= _FUSED_FROM * (2 if causal else 1)


def for_groups(kernels: AttentionKernels, groups: int) -> AttentionKernels:
    """Kernels for layers whose heads are computed in this many groups of equal size."""
    return dataclasses.replace(kernels, groups=groups) if isinstance(kernels, CudaLargestFused) else kernels


def _key_parts(queries: int, heads: int, keys: int) -> int:
    """Into how many runs FlashAttention's forward cuts the keys of a full block, so that its tiles fill the GPU."""
    tiles = -(-queries // _FLASH_TILE) * heads
    return max(1, min(_FLASH_WAVES * platform.CURRENT.multiprocessors() // tiles, keys // _LEAST_KEYS))


def _one_by_one(lengths: tuple[int, ...]) -> list[list[int]]:
    return [[i] for i in range(len(lengths))]


# --------------------------------------------------------------------------------------------------
# Views
# --------------------------------------------------------------------------------------------------


def rows_of_groups(x_nHD: Tensor, kv_heads: int) -> Tensor:
    """[K, G, n, D] whose memory is [K, n, G, D]: the layout that the memory-efficient backward assumes of the output."""
    return x_nHD.unflatten(1, (kv_heads, -1)).transpose(0, 1).contiguous().transpose(1, 2)


def _grouped(x_nHD: Tensor, kv_heads: int) -> Tensor:
    """View [K, G, n, D]."""
    return x_nHD.transpose(0, 1).unflatten(0, (kv_heads, -1))


def _ungrouped(x_KGnD: Tensor) -> Tensor:
    """[n, Q, D]."""
    return x_KGnD.flatten(0, 1).transpose(0, 1)


def _shared(x_mKD: Tensor, heads: int) -> Tensor:
    """View [K, G, m, D]: G query heads see one key-value head without copying it."""
    return x_mKD.transpose(0, 1).unsqueeze(1).expand(-1, heads // x_mKD.shape[1], -1, -1)


def _summed(x_KGmD: Tensor) -> Tensor:
    """[m, K, D] in fp32: the sum over the query heads of each key-value head."""
    return x_KGmD.sum(1, dtype=torch.float32).transpose(0, 1)


def _batch_of_one(x_nHD: Tensor) -> Tensor:
    """View [1, H, n, D]."""
    return x_nHD.transpose(0, 1).unsqueeze(0)


def _padded(x_nHD: Tensor) -> Tensor:
    missing = -x_nHD.shape[-1] % _HEAD_MULTIPLE
    return torch.nn.functional.pad(x_nHD, (0, missing)) if missing else x_nHD


@functools.lru_cache(maxsize=64)
def _boundaries(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Cumulative lengths, from 0; the same for all layers of a micro batch."""
    found = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found


@functools.lru_cache(maxsize=8)
def _random_state(device: torch.device) -> Tensor:
    """Stands for the state of dropout, which is off."""
    return torch.zeros(2, dtype=torch.int64, device=device)


def _tiles(q_nQD: Tensor, keys_KGmD: Tensor, *, causal: bool, scale: float) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows and the scores, [K, G, rows, m], of one tile of queries after another."""
    n, m = q_nQD.shape[0], keys_KGmD.shape[2]
    for start in range(0, n, _TILE):
        here = slice(start, min(n, start + _TILE))
        scores = _grouped(q_nQD[here], keys_KGmD.shape[0]) @ keys_KGmD.transpose(-1, -2) * scale
        if causal:
            rows = torch.arange(start, here.stop, device=q_nQD.device)
            scores = scores.masked_fill(torch.arange(m, device=q_nQD.device) > rows.unsqueeze(1), -torch.inf)
        yield here, scores
