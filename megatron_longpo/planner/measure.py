"""What one of several busy processes measures of its machine, for ``calibrate.py``: run by torchrun, a process per GPU (or CPU
core), all of them at the same time, since they share memory, caches and power.

Operations are the trainer's own where it has its own: the attention kernels, norms, gates, rotary embeddings, log-probs.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_longpo.model import attention, layers, logprobs
from megatron_longpo.model.kernels import BlockInputs, kernels_for
from megatron_longpo.planner.timing import PASSES
from megatron_longpo.runtime import platform, process_groups

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_TIMEOUT_MINUTES = 10
# Seconds per measurement below which only small tensors are measured.
_SHORT = 0.1
# Standard deviation of an output weight (Hugging Face's ``initializer_range``); that of the last norm's output is 1.
_WEIGHT_SCALE = 0.02
# Seconds after which a system that reports free memory to its host has done so (Linux waits two).
_REPORTED = 3.0
Found = TypeVar("Found")


def main() -> None:
    """Measure everything, and write what was found to the file of the first argument, on rank 0."""
    process_groups.start_processes(_TIMEOUT_MINUTES)
    # What a training process has in memory before it makes a tensor.
    importlib.import_module("megatron_longpo.training.trainer")
    found = Measurement(seconds=float(sys.argv[2]), folder=Path(sys.argv[1]).parent).all()
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")
    process_groups.stop_processes()


class Measurement:
    """Times of operations, all processes together.

    Args:
        seconds: about how long all of it may take.
        folder: where the disk is measured.
    """

    def __init__(self, *, seconds: float, folder: Path) -> None:
        self.device, self.is_cuda = platform.CURRENT.device, platform.CURRENT.is_cuda
        self.world, self.folder = dist.get_world_size(), folder
        # There are about 90 measurements, a warm-up each.
        self.each = seconds / 180
        self.last = 0.0
        torch.manual_seed(0)

    def all(self) -> dict[str, Any]:
        """Everything, by name; sizes are texts, since JSON has no other keys."""
        found: dict[str, Any] = {
            "platform": platform.CURRENT.name,
            "device": platform.CURRENT.describe_device(),
            "processes": self.world,
            "threads": torch.get_num_threads(),
            "memory_bytes": platform.CURRENT.memory_bytes(),
            "copy_bytes_per_s": self.copy(),
            "operator_seconds": self.operator(),
        }
        for name, dtype in DTYPES.items():
            rows = self.curve(self.rows, functools.partial(self.product, dtype, self.widths[-1]))
            found[name] = {
                "rows": rows,
                "widths": {width: self.product(dtype, width, max(rows)) for width in self.widths},
                "attention": self.curve(self.lengths, functools.partial(self.attention, dtype)),
                "elementwise_bytes_per_s": self.elementwise(dtype),
                **self.logprobs(dtype),
            }
        found["optimizer_bytes_per_s"] = self.optimizer(self.device)
        if not self.is_cuda:
            found["fresh_bytes_per_s"] = self.fresh()
        if self.is_cuda:
            found["compute_capability"] = float(platform.CURRENT.facts().capability)
            found["host_memory_bytes"] = platform.CURRENT.host_memory_bytes()
            found["host_update_bytes_per_s"] = self.optimizer(torch.device("cpu"))
        found["host_bytes_per_s"] = self.host_copies()
        found["disk_bytes_per_s"] = self.disk()
        found["exchanges"] = self.exchanges()
        # Tensors are gone; libraries, their buffers and those of the collectives are still there.
        platform.CURRENT.free_memory()
        found["used_bytes"] = platform.CURRENT.used_memory_bytes()
        return found

    # Sizes ------------------------------------------------------------------------------------------

    @property
    def rows(self) -> tuple[int, ...]:
        return (16, 64, 256, 1024, 4096, 16384) if self.is_cuda else (16, 64, 256, 1024, 4096)

    @property
    def widths(self) -> tuple[int, ...]:
        return (64, 256, 1024, 4096) if self.is_cuda else (64, 256, 512, 1024)

    @property
    def lengths(self) -> tuple[int, ...]:
        return (512, 2048, 8192, 32768, 131072) if self.is_cuda else (256, 512, 1024, 2048, 4096, 8192)

    # Time -------------------------------------------------------------------------------------------

    def curve(self, sizes: Sequence[int], measure: Callable[[int], Found]) -> dict[int, Found]:
        """A rate by size, up to the first one that takes too long for the time there is."""
        found = {}
        for size in sizes:
            found[size] = measure(size)
            if self.last > 6 * self.each:
                break
        return found

    def seconds(self, action: Callable[[], object], *, counts: bool = True) -> float:
        """Seconds of an action: the median of its repetitions, and the mean over the processes, which all repeat it as often.

        Args:
            action: what is measured.
            counts: whether this process has a part in it; one that only waits is left out of the mean.
        """
        action()
        platform.CURRENT.synchronize()
        dist.barrier()
        began = time.perf_counter()
        action()
        platform.CURRENT.synchronize()
        once = self._mean(time.perf_counter() - began)
        # Of short actions several are timed together: a clock and a wait for the GPU take time as well.
        together = max(1, min(1000, int(0.002 / max(once, 1e-7))))
        repeats = max(3, min(25, int(self.each / (once * together))))
        times = []
        for _ in range(repeats):
            dist.barrier()
            began = time.perf_counter()
            for _ in range(together):
                action()
            platform.CURRENT.synchronize()
            times.append((time.perf_counter() - began) / together)
        self.last = self._mean(statistics.median(times), counts=counts)
        return self.last

    def _mean(self, value: float, *, counts: bool = True) -> float:
        """Mean over the processes that count."""
        both = torch.tensor([value * counts, counts], dtype=torch.float64, device=self.device)
        dist.all_reduce(both)
        total, number = both.tolist()
        return total / number

    def random(self, *sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*sizes, dtype=torch.float32, device=self.device).to(dtype)

    # Arithmetic -------------------------------------------------------------------------------------

    def product(self, dtype: torch.dtype, width: int, rows: int) -> float:
        """Operations per second of a linear layer's three products, whose weight is ``width`` x 4 ``width``."""
        inputs, outputs = self.random(rows, width, dtype=dtype), self.random(rows, 4 * width, dtype=dtype)
        weight = self.random(4 * width, width, dtype=dtype)

        def products() -> None:
            inputs @ weight.T
            outputs @ weight
            outputs.T @ inputs

        return 6.0 * rows * width * 4 * width / self.seconds(products)

    def attention(self, dtype: torch.dtype, length: int) -> list[float]:
        """Operations per second of a causal block, forward and backward. Two operations per number of a visible pair."""
        heads, size = (32, 128) if self.is_cuda else (2, 64)
        kernels = kernels_for(self.device.type, dtype, size).kernels
        q, grad = (self.random(length, heads, size, dtype=dtype) for _ in range(2))
        k, v = (self.random(length, max(1, heads // 4), size, dtype=dtype) for _ in range(2))
        block = BlockInputs(q, k, v, (length,), size**-0.5)
        out, lse = kernels.forward(block)
        work = 4.0 * length * (length + 1) / 2 * heads * size
        forward = self.seconds(lambda: kernels.forward(block))
        backward = self.seconds(lambda: kernels.backward(block, grad, out, lse))
        return [work / forward, 2.5 * work / backward]

    def logprobs(self, dtype: torch.dtype) -> dict[str, float]:
        """Logits per second that pass the softmax and its gradient, and operations per second of the products.

        The log-probs of several hidden sizes differ by products only: t = a + b hidden, by least squares. What products reach
        here is less than a layer's: their results are as wide as the vocabulary, and gradients of the weight are added by chunks.

        Weights have a model's scale, and so have the logits. Where these differ by more than 87, the softmax is denormal in fp32,
        with which a CPU's exponentials, products and conversions are slow: with weights of scale 1, 4096 tokens took 2.7 s of a
        core instead of 1.2 (hidden size 512, vocabulary 32000, bf16).
        """
        tokens, vocabulary, sizes = (4096, 32000, (256, 512, 1024)) if self.is_cuda else (1024, 32000, (256, 512, 768))
        tokens //= 1 if self.each > _SHORT else 64
        times = {}
        for hidden in sizes:
            states = self.random(tokens, hidden, dtype=dtype).requires_grad_()
            weight = self.random(vocabulary, hidden, dtype=dtype).mul_(_WEIGHT_SCALE).requires_grad_()
            weight.main_grad = torch.zeros(vocabulary, hidden, device=self.device)  # type: ignore[attr-defined]
            targets = torch.arange(tokens, device=self.device)
            known = logprobs.KnownGradients.of(torch.full((tokens,), -1.0 / tokens, device=self.device))

            def step(
                states: Tensor = states, weight: Tensor = weight, known: Any = known, targets: Tensor = targets
            ) -> None:
                found = logprobs.token_logprobs(states, weight, targets, vocab_size=vocabulary, known=known)
                found.backward(known.grad_N)

            times[hidden] = self.seconds(step)
        softmax, per_hidden = split_times(times)
        return {
            "logits_per_s": tokens * vocabulary / softmax,
            "logprob_flops_per_s": 6.0 * tokens * vocabulary / per_hidden,
        }

    # Memory -----------------------------------------------------------------------------------------

    def copy(self) -> float:
        """Bytes per second that a copy reads and writes."""
        numbers = 2**28 if self.is_cuda else 2**25
        source, target = (torch.ones(numbers, device=self.device) for _ in range(2))
        return 2 * 4 * numbers / self.seconds(lambda: target.copy_(source))

    def fresh(self) -> float:
        """Bytes of memory that was freed some seconds ago, by the seconds that it takes longer to be had than if freed just now.

        All that is measured here is measured again and again, on memory that was freed just now; what a step saves takes memory
        that the step before freed. A core of a virtual machine whose free memory is reported to its host took 0.06 s for 256 MB
        at once and 0.2 s after two seconds.
        """
        numbers = min(2**28, platform.CURRENT.memory_bytes() // (64 * self.world))
        pause = _REPORTED
        if self.each <= _SHORT:
            numbers, pause = numbers // 64, 0.05

        def seconds(pause: float) -> float:
            times = []
            for _ in range(3):
                time.sleep(pause)
                dist.barrier()
                began = time.perf_counter()
                torch.empty(numbers).fill_(1.0)
                times.append(time.perf_counter() - began)
            return self._mean(statistics.median(times))

        seconds(0.0)
        at_once = seconds(0.0)
        # No difference is one of a thousandth.
        return 4 * numbers / max(seconds(pause) - at_once, 1e-3 * at_once)

    def operator(self) -> float:
        """Seconds of an operator that has hardly anything to do."""
        x = self.random(1)

        def several() -> None:
            for _ in range(100):
                x.add_(1.0)

        return self.seconds(several) / 100

    def elementwise(self, dtype: torch.dtype) -> float:
        """Bytes per second of a layer's norms, gate, rotation and sums, as ``timing.py`` counts their passes."""
        # As large as a step's: smaller tensors stay in a CPU's caches, and are not mapped anew each time (runtime/platform.py).
        rows, hidden, mlp, heads, size = (8192, 4096, 14336, 40, 128) if self.is_cuda else (4096, 768, 2048, 15, 64)
        rows //= 1 if self.each > _SHORT else 64
        x = self.random(rows, 1, hidden, dtype=dtype).requires_grad_()
        weight = self.random(hidden, dtype=dtype).requires_grad_()
        both = self.random(rows, 1, 2 * mlp, dtype=dtype).requires_grad_()
        queries = self.random(rows, heads, size, dtype=dtype).requires_grad_()
        cos, sin = (self.random(rows, size // 2, dtype=dtype) for _ in range(2))
        grad_x, grad_both = torch.ones_like(x), torch.ones(rows, 1, mlp, dtype=dtype, device=self.device)
        grad_queries = torch.ones_like(queries)

        def layer() -> None:
            normed, _ = layers._RMSNormFunction.apply(x, weight, 1e-5)
            torch.autograd.grad(normed, (x, weight), grad_x)
            torch.autograd.grad(layers._SwiGLU.apply(both), both, grad_both)
            torch.autograd.grad(attention.rotate(queries, cos, sin), queries, grad_queries)
            # The residual's sum, and that of its gradients.
            torch.add(x.detach(), grad_x)
            torch.add(grad_x, grad_x)

        norm, gate = sum(PASSES[self.device.type].norm), sum(PASSES[self.device.type].gate)
        numbers = rows * hidden * (norm + 6) + rows * mlp * gate + 14 * rows * heads * size
        return numbers * dtype.itemsize / self.seconds(layer)

    def optimizer(self, device: torch.device) -> float:
        """Bytes per second of RMSProp's update (training/optimization.py) with an fp32 copy of the gradient and clipping."""
        # More than the caches of the host's processors hold, where it is a GPU's.
        numbers = 2**27 if device.type == "cuda" else 2**26 if self.is_cuda else 2**22
        weight, grad, mean = (torch.ones(numbers, device=device) for _ in range(3))

        def update() -> None:
            # A copy of the gradient 8, its norm 4, clipping 8, the running mean 8 + 12, the root 8, the sum 8, the update 16, a
            # copy of the weights 8.
            wide = grad.clone()
            wide.norm()
            wide.mul_(0.5)
            mean.mul_(0.99).addcmul_(wide, wide, value=0.01)
            weight.addcdiv_(wide, mean.sqrt().add_(1e-8), value=-1e-9)
            weight.clone()

        return 80 * numbers / self.seconds(update)

    def host_copies(self) -> float:
        """Bytes per second to the host's memory; on a CPU, of a copy in it."""
        numbers = 2**27 if self.is_cuda else 2**24
        source = torch.ones(numbers, device=self.device)
        target = platform.CURRENT.host_copy(source)
        return 4 * numbers / self.seconds(lambda: target.copy_(source))

    def disk(self) -> float:
        """Bytes per second that all processes of the node write together, until the disk has them."""
        content = os.urandom(2**20) * 64
        path = self.folder / f"part-{dist.get_rank()}"

        def write() -> None:
            with open(path, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())

        seconds = self.seconds(write)
        path.unlink()
        return self.world * len(content) / seconds

    # Exchanges --------------------------------------------------------------------------------------

    def exchanges(self) -> dict[str, dict[str, dict[str, float]]]:
        """Seconds of collectives: group size -> collective -> bytes that a rank of a ring sends."""
        found: dict[str, dict[str, dict[str, float]]] = {}
        size = 2
        while size <= self.world:
            groups: list[Any] = [
                dist.new_group(list(range(i, i + size))) for i in range(0, self.world - size + 1, size)
            ]
            mine = dist.get_rank() // size
            group = groups[mine] if mine < len(groups) else None
            found[str(size)] = {
                name: {
                    # With three processes one is in no group of two, and has nothing to do.
                    str(sent): self.seconds(self._exchange(name, sent, size, group), counts=group is not None)
                    for sent in (2**12, 2**20, 2**24, *([2**28] if self.is_cuda else []))
                }
                for name in ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")
            }
            size *= 2
        return found

    def _exchange(self, name: str, sent: int, size: int, group: dist.ProcessGroup | None) -> Callable[[], object]:
        if group is None:
            return lambda: None
        # (n - 1) / n of the whole is sent by each rank for a gather, and twice that for an all-reduce.
        whole = max(size, round(sent / 4 * size / (size - 1)) // size * size)
        if name == "all_reduce":
            whole = max(size, whole // 2)
        full, part = torch.zeros(whole, device=self.device), torch.zeros(max(1, whole // size), device=self.device)
        other = torch.zeros_like(full)
        return {
            "all_gather": lambda: dist.all_gather_into_tensor(full, part, group=group),
            "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, full, group=group),
            "all_reduce": lambda: dist.all_reduce(full, group=group),
            "all_to_all": lambda: dist.all_to_all_single(other, full, group=group),
        }[name]


def split_times(times: Mapping[int, float]) -> tuple[float, float]:
    """The a and b of t = a + b size, by least squares. Noise makes neither of them nothing; their mean is what was measured.

    Args:
        times: size -> t.
    """
    size, mean = statistics.fmean(times), statistics.fmean(times.values())
    slope = sum((n - size) * (t - mean) for n, t in times.items()) / sum((n - size) ** 2 for n in times)
    first = min(max(mean - slope * size, 0.05 * mean), 0.6 * mean)
    return first, (mean - first) / size


if __name__ == "__main__":
    main()
