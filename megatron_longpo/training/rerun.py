"""Computes a micro batch twice, now and then: a device whose memory or arithmetic fails silently gives other numbers.

Megatron-LM's RerunStateMachine computes a step again after a result that looks wrong. This finds what is wrong and looks right.
Every value that modules and the backward give is compared, before anything is reduced over data-parallel ranks, so that the
rank in which two computations part first is named. A device that is wrong the same way each time is not found: compare replicas.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_longpo.config import Config
from megatron_longpo.errors import PlatformError
from megatron_longpo.model.gpt import PolicyModel
from megatron_longpo.model.logprobs import KnownGradients
from megatron_longpo.runtime import platform
from megatron_longpo.runtime.collectives import all_gather_objects
from megatron_longpo.runtime.heartbeat import whereabouts
from megatron_longpo.runtime.log import log
from megatron_longpo.runtime.process_groups import Parallel
from megatron_longpo.training.batch import PolicyBatch
from megatron_longpo.training.batch_runner import BatchRunner

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Relative difference of two norms up to which they are equal where kernels add in any order: a unit in the last place of
# bfloat16, and of fp32 what its sums lose.
_BOUND_BF16, _BOUND_FP32 = 2.0**-7, 1e-5
# Values per block. A norm hides signs and places, and in a large tensor also a few wrong values; so each block has a norm, and
# sums with random weights. Noise of a given share of the norm moves such a sum by as much, while it hardly moves a norm: hence
# the larger bound, 1/16 in bf16. k values that change their sign move a block of 1024 by 2 * sqrt(k) / 32 of its norm, and each
# of the sums by about that; three sums seldom all miss it. They take 16 bytes per block, 1/128 of what it has in bf16.
_BLOCK, _SUMS, _BLOCK_FACTOR = 1024, 3, 8.0
# Bytes per value that a computation leaves on the device until the two are compared, where bits may differ: fp32 per block.
RECORD_BYTES = 4 * (1 + _SUMS) / _BLOCK
# Values that are converted to 8 bytes each at a time: 32 MB.
_PIECE = 2**12 * _BLOCK
# Odd, so that a changed bit changes every product with it modulo 2**64.
_STRIDE = 0x9E3779B97F4A7C15 - 2**64
_FORWARD, _BACKWARD, _GRADIENT = range(3)
_NAMED_RANKS = 8


@dataclass(frozen=True)
class Place:
    """A value that a computation gives.

    Attributes:
        name: name of the value.
        kind: forward, backward, or gradient of a weight; in this order one follows from another.
        chunk: number of the chunk of the pipeline rank's model.
    """

    name: str
    kind: int
    chunk: int


@dataclass(frozen=True)
class Blocks:
    """Blocks of 1024 of a value, in its order; the last one is filled up with zeros.

    Attributes:
        norms_K: [K] norm of each block in fp32.
        sums_KW: [K, W] sums of each block with weights of random sign and a size of 0.5 to 1.5, in fp32.
    """

    norms_K: Tensor
    sums_KW: Tensor

    @classmethod
    def of(cls, flat: Tensor) -> Blocks:
        """Blocks of a flat value."""
        weights = _block_weights().to(flat.device, non_blocking=True)
        norms, sums = [], []
        for piece in flat.split(_PIECE):
            filled = torch.nn.functional.pad(piece.double(), (0, -len(piece) % _BLOCK)).view(-1, _BLOCK)
            norms.append(torch.linalg.vector_norm(filled, dim=1).float())
            sums.append((filled @ weights).float())
        return cls(torch.cat(norms), torch.cat(sums))

    def is_close(self, other: Blocks, *, bound: float) -> bool:
        """Whether each block is that of the other computation, to rounding.

        Args:
            other: blocks of the same value.
            bound: difference of two norms or sums relative to the norm. Blocks that are smaller than others, whose values may be
                what is left when larger ones cancel, are taken as being as large as the root mean square of all of them.
        """
        one_K, other_K = self.norms_K.double(), other.norms_K.double()
        same_K = (one_K == other_K) | (one_K.isnan() & other_K.isnan())
        finite_K = one_K.isfinite() & other_K.isfinite()
        if not bool((finite_K | same_K).all()):
            return False
        one_K, other_K = one_K[finite_K], other_K[finite_K]
        largest_K = torch.maximum(one_K, other_K)
        scale_K = torch.maximum(largest_K, largest_K.square().mean().sqrt())
        difference_K = (self.sums_KW[finite_K].double() - other.sums_KW[finite_K].double()).abs().amax(dim=1)
        return bool((torch.maximum(difference_K, (one_K - other_K).abs()) <= bound * scale_K).all())


def _hash(flat: Tensor) -> Tensor:
    """Sum of a value's bits, each as an integer times a number of its place: in integers the order of adding does not matter."""
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for number, piece in enumerate(flat.view(_INTEGERS[flat.element_size()]).split(_PIECE)):
        places = torch.arange(len(piece), device=flat.device) + number * _PIECE
        total += (piece.to(torch.int64) * (2 * places + 1) * _STRIDE).sum()
    return total


@functools.cache
def _block_weights() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.rand(_BLOCK, _SUMS, generator=generator, dtype=torch.float64) + 0.5
    return torch.where(torch.rand(_BLOCK, _SUMS, generator=generator) < 0.5, -sizes, sizes)


class Record:
    """The values of one computation: their places, and what tells them apart.

    Args:
        is_exact: whether only bits will be compared.
    """

    def __init__(self, *, is_exact: bool = False) -> None:
        self.places: list[Place] = []
        self._is_exact = is_exact
        self._bits: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._blocks: list[Blocks] = []

    @torch.no_grad()
    def add(self, place: Place, value: Tensor) -> None:
        """Note a value; nothing waits for the device."""
        flat = value.detach().reshape(-1)
        self.places.append(place)
        self._bits.append(_hash(flat))
        self._norms.append(torch.linalg.vector_norm(flat, dtype=torch.float64))
        if not self._is_exact:
            self._blocks.append(Blocks.of(flat))

    def has_blocks_of(self, other: Record, number: int, *, bound: float) -> bool:
        """Whether a value's blocks are those of the other computation, to rounding (``Blocks.is_close``)."""
        return self._blocks[number].is_close(other._blocks[number], bound=bound)

    def values(self) -> tuple[list[int], list[float]]:
        """Hash of the bits and norm of each value."""
        if not self.places:
            return [], []
        return torch.stack(self._bits).tolist(), torch.stack(self._norms).tolist()


@dataclass(frozen=True)
class Mismatch:
    """The first value of a rank that two computations differ in.

    Attributes:
        place: where.
        order: how many values the rank had given before it.
        norms: its norm in either computation.
        position: the chunk's among all chunks, in the order of the layers.
        replica: its data-parallel rank. Replicas compute different micro batches, without each other.
        device: its device, for people.
    """

    place: Place
    order: int
    norms: tuple[float, float]
    position: int
    replica: int
    device: str


def first_difference(first: Record, second: Record, *, bound: float) -> tuple[int, tuple[float, float]] | None:
    """Number of the first value that differs, and its norms.

    Args:
        first, second: two computations of the same.
        bound: relative difference up to which norms are equal; for blocks eight times as much. 0: bits are compared.
    """
    assert first.places == second.places, "two computations of one micro batch took different ways"
    (bits, norms), (other_bits, other_norms) = first.values(), second.values()
    # What comes first in time may be a consequence: a layer that is recomputed in the backward counts as forward.
    for number in sorted(range(len(bits)), key=lambda n: (first.places[n].kind, n)):
        one, other = norms[number], other_norms[number]
        if bits[number] == other_bits[number]:
            continue
        # Overflows are not the machine's fault: infinity less infinity is NaN.
        is_close = (
            one == other or (math.isnan(one) and math.isnan(other)) or abs(one - other) <= bound * max(one, other)
        )
        if bound and is_close and first.has_blocks_of(second, number, bound=_BLOCK_FACTOR * bound):
            continue
        return number, (one, other)
    return None


def culprits(found: Sequence[Mismatch | None]) -> list[int]:
    """Ranks in which the computations part first, of each replica.

    Values go from rank to rank: in the forward from chunk to chunk, in the backward the other way, and between the ranks of a
    stage in each layer. What differs earliest is the cause; several ranks are named where an exchange within one module hides
    which of them it was.

    Args:
        found: first mismatch of each rank.
    """

    def key(mismatch: Mismatch) -> tuple[int, int, int]:
        kind, position = mismatch.place.kind, mismatch.position
        # A weight's gradient goes nowhere from here.
        return kind, {_FORWARD: position, _BACKWARD: -position, _GRADIENT: 0}[kind], mismatch.order

    named = []
    for replica in {mismatch.replica for mismatch in found if mismatch is not None}:
        ranks = {r: key(m) for r, m in enumerate(found) if m is not None and m.replica == replica}
        named += [rank for rank, at in ranks.items() if at == min(ranks.values())]
    return sorted(named)


class Rerun:
    """Computes the first micro batch of a step twice if it is time to.

    Args:
        config: check_rerun_interval and on_rerun_mismatch.
        parallel: degrees and groups.
        runner: runs micro batches.
        chunks: this pipeline rank's chunks.
        model: the same, wrapped by DDP.
    """

    def __init__(
        self,
        config: Config,
        parallel: Parallel,
        runner: BatchRunner,
        *,
        chunks: Sequence[PolicyModel],
        model: Sequence[DistributedDataParallel],
    ) -> None:
        self._parallel, self._runner, self._chunks, self._model = parallel, runner, chunks, model
        self._interval, self._stops = config.faults.check_rerun_interval, config.faults.on_rerun_mismatch == "stop"
        self._bound = _BOUND_BF16 if config.training.bf16 else _BOUND_FP32
        if config.training.deterministic_mode or not platform.CURRENT.is_cuda:
            self._bound = 0.0

    def is_due(self, step: int) -> bool:
        """Whether a micro batch of this step, counted from 1, is computed twice."""
        return self._interval is not None and step % self._interval == 0

    def check(self, batches: Sequence[PolicyBatch], *, count: int, step: int) -> None:
        """Compute twice, and compare; collective. Gradients in DDP's buffers are lost.

        Args:
            batches: micro batches of this data-parallel rank. Their weights are gathered.
            count: samples of the global batch.
            step: the step, counted from 1.

        Raises:
            PlatformError: the computations differ, with on_rerun_mismatch=stop; on all ranks.
        """
        rng = platform.CURRENT.rng_state()
        # An interleaved schedule takes micro batches by as many as there are stages.
        some = batches[: self._parallel.pipeline_size if self._parallel.virtual_stages else 1]
        records = []
        for _ in range(2):
            platform.CURRENT.set_rng_state(rng)
            records.append(self._compute([_fresh(batch, len(batches) / len(some)) for batch in some], count=count))
        platform.CURRENT.set_rng_state(rng)
        found = all_gather_objects(self._mismatch(*records))
        ranks = culprits(found)
        if not ranks:
            return
        line = f"step {step}: a micro batch computed twice from the same state gave different numbers, {_named(ranks, found)}"
        if self._stops:
            raise PlatformError(
                f"{line}: its memory or its arithmetic fails; leave that machine out, and rerun the command to resume from a "
                "checkpoint before it failed (on_rerun_mismatch=continue trains on)"
            )
        if self._parallel.rank == 0:
            log(f"{line}; training goes on", level=logging.WARNING)

    def _mismatch(self, first: Record, second: Record) -> Mismatch | None:
        difference = first_difference(first, second, bound=self._bound)
        if difference is None:
            return None
        number, norms = difference
        place, current = first.places[number], platform.CURRENT
        return Mismatch(
            place=place,
            order=number,
            norms=norms,
            position=place.chunk * self._parallel.pipeline_size + self._parallel.pipeline_rank,
            replica=self._parallel.data_rank,
            device=f"{current.device}, {current.describe_device()}" if current.is_cuda else "the CPU",
        )

    def _compute(self, batches: Sequence[PolicyBatch], *, count: int) -> Record:
        record = Record(is_exact=not self._bound)
        for model in self._model:
            model.zero_grad_buffer()
            for weight in model.parameters():
                # The optimizer leaves DDP's buffer there.
                weight.grad = None
        with _without_reduction(self._model), _recording(self._chunks, record):
            found = self._runner.forward_backward(self._model, batches, count=count)
        for metrics in found:
            for name, values in metrics.values.items():
                record.add(Place(f"the metric {name}", _FORWARD, len(self._chunks) - 1), values)
        for number, chunk in enumerate(self._chunks):
            for name, weight in chunk.named_parameters():
                if weight.requires_grad:
                    record.add(Place(f"the gradient of {name}", _GRADIENT, number), weight.main_grad)
        return record


def _named(ranks: Sequence[int], found: Sequence[Mismatch | None]) -> str:
    parts = []
    for rank in ranks[:_NAMED_RANKS]:
        mismatch = found[rank]
        assert mismatch is not None
        one, other = mismatch.norms
        values = f"norms {one:.9g} and {other:.9g}" if one != other else f"both of norm {one:.9g}"
        parts.append(f"first in {mismatch.place.name} on rank {rank}{whereabouts(rank)}, {mismatch.device} ({values})")
    return ", or ".join(parts)


def _fresh(batch: PolicyBatch, times: float) -> PolicyBatch:
    """The batch for a schedule of fewer micro batches, in which it counts so many times as much."""
    known = batch.known
    return batch if known is None else replace(batch, known=KnownGradients(known.grad_N * times, known.order))


@contextlib.contextmanager
def _without_reduction(model: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Within this context gradients stay as each rank computes them: the sum over ranks would hide whose is wrong."""
    config = model[0].config
    names = ("finalize_model_grads_func", "no_sync_func", "grad_sync_func")
    before = {name: getattr(config, name) for name in names}
    for name in names:
        setattr(config, name, None)
    try:
        with contextlib.ExitStack() as stack:
            for chunk in model:
                stack.enter_context(chunk.no_sync())
            yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


@contextlib.contextmanager
def _recording(chunks: Sequence[PolicyModel], record: Record) -> Iterator[None]:
    """Note what modules give, and the gradients of it."""

    def hook(name: str, chunk: int) -> Callable[..., None]:
        forward = Place(f"the output of {name}", _FORWARD, chunk)
        backward = Place(f"the gradient of the output of {name}", _BACKWARD, chunk)

        def after(_module: Any, _inputs: Any, output: Any) -> None:
            for x in output if isinstance(output, tuple | list) else [output]:
                if isinstance(x, Tensor) and x.is_floating_point():
                    record.add(forward, x)
                    if x.requires_grad:
                        x.register_hook(lambda g: record.add(backward, g))

        return after

    handles = [
        module.register_forward_hook(hook(name or "the model", number))
        for number, chunk in enumerate(chunks)
        for name, module in chunk.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
