"""The platform, CPU with gloo or CUDA with NCCL, resolved once. Only this file touches ``torch.cuda`` or patches megatron-core.

The choice is made when this module is first imported, because the patches below must precede every import of
megatron-core: the ``__init__`` of each subpackage that imports megatron-core imports this module.
``MEGATRON_LONGPO_PLATFORM`` (``auto``, ``cpu`` or ``cuda``) overrides it.

Each patch explains why it is needed and with which versions. Those of ``_patch_megatron_everywhere`` apply to both platforms,
all others only to the CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import importlib
import itertools
import os
import platform as os_platform
import re
import resource
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from megatron_longpo.errors import PlatformError
from megatron_longpo.runtime.products import FusedWeightGradient
from megatron_longpo.runtime.unpickling import load_checkpoints_safely

_VARIABLE = "MEGATRON_LONGPO_PLATFORM"


# Dense bfloat16 products by part of the device's name, the longer names first.
_PEAK_TFLOPS = {
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200": 989,
    "H800": 989,
    "A100": 312,
    "A800": 312,
    "B200": 2250,
}


@dataclass(frozen=True)
class DeviceFacts:
    """What this process's device is, for reports. Empty texts where it is the CPU, or where the driver does not tell.

    Attributes:
        name: the card's name, or the processor's architecture.
        memory_bytes: memory of the card, or of the machine.
        capability: CUDA compute capability.
        driver: version of the NVIDIA driver.
        runtime: version of CUDA that torch was built for.
        cudnn, nccl: versions of these libraries.
        cards: number of cards on this node.
        links: what connects the cards of this node, such as ``NV18 x 7``.
    """

    name: str
    memory_bytes: int
    capability: str = ""
    driver: str = ""
    runtime: str = ""
    cudnn: str = ""
    nccl: str = ""
    cards: int = 0
    links: str = ""


_QUERY_SECONDS = 20


def _nvidia_smi(*arguments: str) -> str:
    """Output of nvidia-smi; empty if it is not there or fails. The driver's version is not told by CUDA itself."""
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=_QUERY_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def links_in(topology: str) -> str:
    """Kinds of links between the cards in the matrix of ``nvidia-smi topo -m``, from the first card, with their numbers."""
    # The headings are underlined by escape sequences.
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).split() for line in topology.splitlines()]
    row = next((line for line in lines if line[:1] == ["GPU0"] and "X" in line), [])
    cards = sum(line[:1] != [] and re.fullmatch(r"GPU\d+", line[0]) is not None and "X" in line for line in lines)
    kinds = [kind for kind in row[1 : cards + 1] if kind != "X"]
    return ", ".join(f"{kind} x {kinds.count(kind)}" for kind in dict.fromkeys(kinds))


@dataclass(frozen=True)
class Platform:
    """The device and back end that this process runs on.

    Attributes:
        name: ``cpu`` or ``cuda``.
        backend: the torch.distributed back end, ``gloo`` or ``nccl``.
        reason: why this platform was chosen, for the log.
    """

    name: Literal["cpu", "cuda"]
    backend: Literal["gloo", "nccl"]
    reason: str

    @property
    def is_cuda(self) -> bool:
        return self.name == "cuda"

    @property
    def device(self) -> torch.device:
        """Device of this process. On CUDA it is the current device, so ``use_local_rank`` must be called first."""
        return torch.device("cuda", torch.cuda.current_device()) if self.is_cuda else torch.device("cpu")

    def free_memory(self) -> None:
        """Collect garbage and return cached memory to the device."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()

    def use_local_rank(self, local_rank: int) -> None:
        """Bind the process to its accelerator.

        Raises:
            PlatformError: there are fewer accelerators than processes on this node.
        """
        if not self.is_cuda:
            return
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise PlatformError(
                f"local rank {local_rank} has no GPU: {count} visible on this node; launch at most {count} processes a "
                f"node (--nproc-per-node {count}) or set {_VARIABLE}=cpu"
            )
        torch.cuda.set_device(local_rank)

    def start_kernels_in_order(self, tensor_parallel_size: int) -> None:
        """With tensor parallelism before Blackwell, give the device one queue, so that kernels start as they were launched.

        Otherwise the exchange that should run beside the product of a weight's gradient may start after it. As Megatron-LM asks
        its users to set it; if the user sets the variable, it is left alone. To be called before the device is first used.
        """
        if self.is_cuda and tensor_parallel_size > 1 and torch.cuda.get_device_capability() < (10, 0):
            os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

    def use_deterministic_algorithms(self) -> None:
        """Let torch, cuBLAS, NCCL and Transformer Engine use only operations that give the same bits in every run; an operation
        without such a form raises an error. To be called before the device is first used. Variables that the user sets win, as in
        Megatron-LM, which asks its users to set them."""
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NCCL_ALGO", "Ring")
        os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
        torch.use_deterministic_algorithms(True)
        # Nothing here reads memory that was not written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

    def peak_flops(self) -> float | None:
        """Floating-point operations per second that the device does at most in dense bfloat16 products, as its maker states them;
        None where that is not known."""
        if not self.is_cuda:
            return None
        name = torch.cuda.get_device_name()
        return next((tera * 1e12 for part, tera in _PEAK_TFLOPS.items() if part in name), None)

    def host_copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in host memory; on CUDA in pinned memory, and the host does not wait for it."""
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=self.is_cuda)
        return copy.copy_(tensor.detach(), non_blocking=True)

    def capability(self) -> tuple[int, int] | None:
        """CUDA compute capability of the current device; None on the CPU."""
        return torch.cuda.get_device_capability() if self.is_cuda else None

    def multiprocessors(self) -> int:
        """Multiprocessors of the current device, which compute tiles of a kernel side by side; 1 on the CPU."""
        return int(torch.cuda.get_device_properties().multi_processor_count) if self.is_cuda else 1

    def facts(self) -> DeviceFacts:
        """What this process's device is; asks the driver, which takes a moment."""
        if not self.is_cuda:
            import psutil

            return DeviceFacts(os_platform.machine(), int(psutil.virtual_memory().total))
        properties = torch.cuda.get_device_properties(self.device)
        nccl: Any = torch.cuda.nccl.version()
        return DeviceFacts(
            name=properties.name,
            memory_bytes=int(properties.total_memory),
            capability=f"{properties.major}.{properties.minor}",
            driver=(_nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader").split() or [""])[0],
            runtime=str(torch.version.cuda or ""),
            cudnn=str(torch.backends.cudnn.version() or ""),
            nccl=".".join(map(str, nccl)) if isinstance(nccl, tuple) else str(nccl),
            cards=torch.cuda.device_count(),
            links=links_in(_nvidia_smi("topo", "-m")),
        )

    def to_device(self, arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """Bring arrays to the device with one copy that the host does not wait for; on the CPU they are used as they are.

        Args:
            arrays: arrays by name.
        """
        if not self.is_cuda:
            return {name: torch.from_numpy(array) for name, array in arrays.items()}
        # Each begins at a multiple of 16 bytes, which suits every type and every kernel's loads.
        starts = list(itertools.accumulate((-(-a.nbytes // 16) * 16 for a in arrays.values()), initial=0))
        host = np.zeros(starts[-1], np.uint8)
        for array, start in zip(arrays.values(), starts, strict=False):
            host[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        # torch's allocator of pinned memory keeps the block until the copy has been made.
        there = torch.from_numpy(host).pin_memory().to(self.device, non_blocking=True)
        return {
            name: there[start : start + a.nbytes].view(torch.from_numpy(a).dtype).view(a.shape)
            for (name, a), start in zip(arrays.items(), starts, strict=False)
        }

    def synchronize(self) -> None:
        """Wait for all queued work, so that a clock read afterwards measures it."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def mark(self) -> Any:
        """A point in time, for ``seconds_between``: now, or on CUDA when the main stream gets there. None on any other stream: it
        runs beside the main one."""
        if not self.is_cuda:
            return time.monotonic()
        if torch.cuda.current_stream() != torch.cuda.default_stream():
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds_between(self, marks: Iterable[tuple[Any, Any]]) -> float:
        """Sum of the seconds between the marks of each pair; on CUDA the device must have come past them (``synchronize``)."""
        if not self.is_cuda:
            return float(sum(end - began for began, end in marks))
        return float(sum(began.elapsed_time(end) for began, end in marks)) / 1000

    def peak_memory_bytes(self) -> int:
        """Peak memory: the allocator's on CUDA, the peak resident set of the process on the CPU."""
        if self.is_cuda:
            return int(torch.cuda.max_memory_allocated())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return int(peak) if sys.platform == "darwin" else int(peak) * 1024

    def device_count(self) -> int:
        """GPUs of this node, or cores that this process may use."""
        if self.is_cuda:
            return int(torch.cuda.device_count())
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def memory_bytes(self) -> int:
        """Memory of the device; on the CPU that of the system."""
        if self.is_cuda:
            return int(torch.cuda.mem_get_info()[1])
        import psutil

        return int(psutil.virtual_memory().total)

    def used_memory_bytes(self) -> int:
        """Memory that is not free: of the device, or the resident set of this process."""
        if self.is_cuda:
            free, total = torch.cuda.mem_get_info()
            return int(total - free)
        import psutil

        return int(psutil.Process().memory_info().rss)

    def describe_device(self) -> str:
        """Name of the GPU, or of the processor."""
        if self.is_cuda:
            return str(torch.cuda.get_device_name())
        with contextlib.suppress(OSError):
            names = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.M)
            if names:
                return names[1].strip()
        return os_platform.processor() or os_platform.machine()

    def available_memory_bytes(self) -> int:
        """Memory that this process can still allocate."""
        if self.is_cuda:
            return int(torch.cuda.mem_get_info()[0])
        return self.host_memory_bytes()

    def host_memory_bytes(self) -> int:
        """Memory of the host that can still be allocated, by all processes together."""
        import psutil

        return min(int(psutil.virtual_memory().available), _left_in_control_group())

    def host_memory_size(self) -> int:
        """Bytes of the host's memory, or of what the container or the job may take of it; the same on all ranks of a node."""
        import psutil

        return min(int(psutil.virtual_memory().total), *(limit for limit, _ in _control_group_memory()), sys.maxsize)

    def start_memory_history(self) -> None:
        """Record allocations from here on, for ``write_memory_snapshot``; does nothing on the CPU."""
        if self.is_cuda:
            torch.cuda.memory._record_memory_history()

    def write_memory_snapshot(self, path: Path) -> None:
        """Write the allocations since ``start_memory_history``, and stop recording them; does nothing on the CPU."""
        if self.is_cuda:
            torch.cuda.memory._dump_snapshot(str(path))
            torch.cuda.memory._record_memory_history(enabled=None)

    def rng_state(self) -> dict[str, torch.Tensor]:
        """Return the state of the random number generators that model code uses."""
        state = {"cpu": torch.get_rng_state()}
        if self.is_cuda:
            state["cuda"] = torch.cuda.get_rng_state()
        return state

    def set_rng_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore a state from ``rng_state``. A state saved on the other platform restores only the CPU generator."""
        torch.set_rng_state(state["cpu"])
        if self.is_cuda and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"])


class HostTraffic:
    """Streams that copy between the device and host memory beside the stream that computes; on the CPU everything is in order.

    The caller holds a tensor that is copied to host memory until the computing stream has waited for the copy.
    """

    def __init__(self) -> None:
        self._to_host: Any = torch.cuda.Stream()
        self._to_device: Any = torch.cuda.Stream()

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in pinned memory of what the computing stream has made by now."""
        self._to_host.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._to_host):
            return CURRENT.host_copy(tensor)

    def bring_back(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the device, in memory of the computing stream."""
        there = torch.empty(tensor.shape, dtype=tensor.dtype, device=CURRENT.device)
        # What was in that memory before may still be in use.
        self._to_device.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._to_device):
            return there.copy_(tensor, non_blocking=True)

    def mark_sent(self) -> Any:
        """A mark behind all copies to host memory so far, for ``wait``."""
        return self._to_host.record_event()

    def mark_received(self) -> Any:
        """A mark behind all copies to the device so far, for ``wait``."""
        return self._to_device.record_event()

    def wait(self, mark: Any) -> None:
        """Let the computing stream wait for a mark; the host does not wait."""
        if mark is not None:
            torch.cuda.current_stream().wait_event(mark)


_CONTROL_GROUPS, _CONTROL_GROUP_OF_PROCESS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def _left_in_control_group(root: Path = _CONTROL_GROUPS, process: Path = _CONTROL_GROUP_OF_PROCESS) -> int:
    """Memory left under the limit of a container or a Slurm job; ``sys.maxsize`` if there is no limit."""
    left = (limit - used for limit, used in _control_group_memory(root, process))
    return max(0, min(left, default=sys.maxsize))


def _control_group_memory(
    root: Path = _CONTROL_GROUPS, process: Path = _CONTROL_GROUP_OF_PROCESS
) -> Iterator[tuple[int, int]]:
    """Limits of the control groups that this process is in, and the memory that they use."""
    folders = [root]
    with contextlib.suppress(OSError):
        for line in process.read_text().splitlines():
            folders.append(root / line.split(":", 2)[2].lstrip("/"))
    for folder in folders:
        # Control groups version 2, then version 1.
        for limit, used in (
            ("memory.max", "memory.current"),
            ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
        ):
            # A missing file, or one that contains "max", means no limit.
            with contextlib.suppress(OSError, ValueError):
                most = int((folder / limit).read_text())
                cached = re.search(r"^inactive_file (\d+)", (folder / limit).with_name("memory.stat").read_text(), re.M)
                # The kernel drops cached files before an allocation fails.
                now = int((folder / used).read_text()) - int(cached[1] if cached else 0)
                yield most, now


def _tune_allocator() -> None:
    """Put large CPU tensors into huge pages, and return them to the system when they are freed.

    Measured with SmolLM2-135M at 4096 tokens in fp32. Huge pages take 3% less time and 1.3 GB less at the peak. Mapping
    tensors of 4 MB and more individually saves 0.6 GB in each of two context-parallel processes: by default glibc raises that
    threshold to 32 MB, and long-lived tensors end up between the holes that freed ones leave. torch reads its variable once,
    at its first tensor. Without huge pages, or with another libc, nothing changes. If the user sets the variables, they are
    left alone.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ and os_platform.libc_ver()[0] == "glibc":
        mmap_threshold = -3  # M_MMAP_THRESHOLD in malloc.h
        ctypes.CDLL(None).mallopt(mmap_threshold, 4 * 2**20)


def _tune_cuda_allocator() -> None:
    """Let allocator segments grow: micro batches have different lengths, and segments of fixed size would fragment.

    torch reads the variable at its first allocation on the GPU. If the user sets either variable, it is left alone.
    """
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def _resolve() -> Platform:
    wanted = os.environ.get(_VARIABLE, "auto").lower()
    if wanted not in ("auto", "cpu", "cuda"):
        raise PlatformError(f"{_VARIABLE}={wanted} is not a platform; set it to auto, cpu or cuda, or unset it")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise PlatformError(
            f"{_VARIABLE}=cuda but torch {torch.__version__} sees no GPU; check nvidia-smi and that torch is a CUDA "
            f"build, or set {_VARIABLE}=cpu"
        )
    if wanted != "auto":
        return Platform(wanted, "nccl" if wanted == "cuda" else "gloo", f"{_VARIABLE}={wanted}")  # type: ignore[arg-type]
    if torch.cuda.is_available():
        return Platform("cuda", "nccl", f"torch {torch.__version__} sees {torch.cuda.device_count()} GPU(s)")
    return Platform("cpu", "gloo", f"torch {torch.__version__} sees no GPU")


# --------------------------------------------------------------------------------------------------
# Patches
# --------------------------------------------------------------------------------------------------


class _NoStream:
    """Stand-in for a CUDA stream or event; on the CPU everything runs in program order."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> _NoStream:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def record_event(self, *_: Any) -> _NoStream:
        return self

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: None


def _answering(value: Any) -> Callable[..., Any]:
    """Return a new function each time, because torch's compiler keeps one rule per function object."""
    return lambda *_, **__: value


def _is_cuda_device(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda_device(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return wrapped


@contextlib.contextmanager
def _type_says_cuda() -> Iterator[None]:
    original = torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        if isinstance(answer, str) and answer.startswith("torch.") and "cuda" not in answer:
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    torch.Tensor.type = type_  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.Tensor.type = original  # type: ignore[method-assign]


def _with_cuda_type_names(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with _type_says_cuda():
            return function(*args, **kwargs)

    return wrapped


def _patch_torch_for_cpu() -> None:
    """Let code that asks for ``cuda`` run on the CPU. megatron-core 0.16.1 and 0.19.2 need this throughout."""
    # The device of P2P shape buffers, DDP buffers and the optimizer's master weights.
    torch.cuda.current_device = _answering(torch.device("cpu"))
    for name in ("synchronize", "empty_cache", "set_device", "reset_peak_memory_stats", "ipc_collect"):
        setattr(torch.cuda, name, _answering(None))
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(torch.cuda, name, _answering(0))
    # The asynchronous checkpoint writer takes a rank's device modulo the count.
    torch.cuda.device_count = _answering(1)
    # DDP's overlapped reductions and asynchronous checkpoints open streams and wait on events.
    for name in ("Stream", "Event"):
        setattr(torch.cuda, name, _NoStream)
    for name in ("current_stream", "default_stream"):
        setattr(torch.cuda, name, _NoStream)
    torch.cuda.stream = _answering(contextlib.nullcontext())
    torch.cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    # torch.manual_seed itself calls manual_seed_all for CUDA, so that one must do nothing.
    torch.cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))  # type: ignore[assignment]
    torch.cuda.manual_seed_all = _answering(None)
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign,assignment]


class _TorchOnCpu(types.ModuleType):
    """``torch`` as megatron-core's modules see it: factories called with ``device="cuda"`` allocate on the CPU.

    torch's own functions stay as they are: a wrapped factory is not recognised by ``with torch.device(...)``, and
    transformers would load models with uninitialised buffers.
    """

    factories = frozenset(
        {"empty", "zeros", "ones", "full", "tensor", "arange", "rand", "randn", "as_tensor"}
        | {"empty_like", "zeros_like", "ones_like", "full_like"}
    )

    def __init__(self) -> None:
        super().__init__("torch")
        self._wrapped: dict[str, Callable[..., Any]] = {}

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        if name not in self.factories:
            return value
        if name not in self._wrapped:
            self._wrapped[name] = _on_cpu(value)
        return self._wrapped[name]


def _patch_megatron_for_cpu() -> None:
    """Patch megatron-core for the CPU. 0.16.1 and 0.19.2 need every one of these patches."""
    # Fused functions are decorated with torch.compile when their modules are imported, and compiling them needs a C++ compiler
    # and takes minutes. The switch that turns the fuser off is in the package whose import decorates them, hence the detour.
    compile_, torch.compile = torch.compile, lambda function=None, **_: function  # type: ignore[assignment]
    try:
        importlib.import_module("megatron.core.jit").disable_jit_fuser()
        importlib.import_module("megatron.core.models.gpt")
        importlib.import_module("megatron.core.optimizer")
    finally:
        torch.compile = compile_  # type: ignore[assignment]

    # These modules would otherwise be imported later and miss the replacement below.
    for name in ("pipeline_parallel", "distributed", "dist_checkpointing.strategies.torch", "datasets.indexed_dataset"):
        importlib.import_module(f"megatron.core.{name}")
    for name in ("async_utils", "filesystem_async", "fully_parallel", "state_dict_saver"):
        importlib.import_module(f"megatron.core.dist_checkpointing.strategies.{name}")
    seen = _TorchOnCpu()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = seen  # type: ignore[attr-defined]

    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    # Both index torch's CUDA generators; here model-parallel seeds live in the CPU generator.
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)

    # Both optimizers and the clipping compare Tensor.type() with names that begin with "torch.cuda.".
    optimizer: Any = importlib.import_module("megatron.core.optimizer.optimizer")
    float16 = optimizer.Float16OptimizerWithFloat16Params
    float16.__init__ = _with_cuda_type_names(float16.__init__)
    distributed = importlib.import_module("megatron.core.optimizer.distrib_optimizer").DistributedOptimizer
    distributed.__init__ = _with_cuda_type_names(distributed.__init__)
    clip: Any = importlib.import_module("megatron.core.optimizer.clip_grads")
    clip.clip_grad_by_total_norm_fp32 = _with_cuda_type_names(clip.clip_grad_by_total_norm_fp32)
    optimizer.clip_grad_by_total_norm_fp32 = clip.clip_grad_by_total_norm_fp32

    # It asks a parameter whether it is on a GPU before it offloads it.
    hybrid = importlib.import_module("megatron.core.optimizer.cpu_offloading.hybrid_optimizer").HybridDeviceOptimizer
    hybrid._get_sub_optimizer_param_groups = _divided_parameters

    # In an interleaved pipeline of two ranks both neighbours are the same rank, and gloo matches untagged messages only by
    # their order: with as many micro batches as stages the two ranks deadlock. Besides, a gloo send completes only when it
    # is received, whereas NCCL's wait blocks a stream and not the program.
    p2p: Any = importlib.import_module("megatron.core.pipeline_parallel.p2p_communication")
    p2p._p2p_ops = _tagged_p2p_ops


def _divided_parameters(self: Any, offload_fraction: float) -> tuple[Any, ...]:
    """HybridDeviceOptimizer's division of parameters between host and device, where both are host memory."""
    total = sum(p.numel() for group in self.param_groups for p in group["params"])
    on_host: list[dict[str, Any]] = []
    on_device: list[dict[str, Any]] = []
    copies, originals, wide, offloaded = {}, {}, {}, 0
    for group in self.param_groups:
        parts: dict[bool, list[torch.Tensor]] = {True: [], False: []}
        for parameter in group["params"]:
            goes = offloaded < offload_fraction * total
            inner = parameter
            if goes or parameter.dtype != torch.float32:
                inner = parameter.detach().to(torch.float32, copy=True)
            if parameter.dtype != torch.float32:
                wide[parameter] = inner
            if goes:
                copies[parameter], originals[inner] = inner, parameter
                offloaded += parameter.numel()
            parts[goes].append(inner)
        on_host += [{**group, "params": parts[True]}] if parts[True] else []
        on_device += [{**group, "params": parts[False]}] if parts[False] else []
    return on_host, on_device, copies, originals, wide


def _communicate_shapes(
    self: Any,
    tensor_send_next: torch.Tensor | None,
    tensor_send_prev: torch.Tensor | None,
    recv_prev: bool,
    recv_next: bool,
) -> tuple[list[int], list[int]]:
    """Exchange the shapes of tensors between neighbouring stages, in the order in which the tensors themselves are sent."""
    p2p: Any = importlib.import_module("megatron.core.pipeline_parallel.p2p_communication")

    def shape_of(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else torch.tensor(tensor.size(), device=CURRENT.device, dtype=torch.int64)

    def room(wanted: bool) -> torch.Tensor | None:
        return torch.empty(3, device=CURRENT.device, dtype=torch.int64) if wanted else None

    from_prev, from_next = room(recv_prev), room(recv_next)
    requests = p2p._p2p_ops(
        tensor_send_prev=shape_of(tensor_send_prev),
        tensor_recv_prev=from_prev,
        tensor_send_next=shape_of(tensor_send_next),
        tensor_recv_next=from_next,
        group=self.pp_group,
        prev_pipeline_rank=self.prev_rank,
        next_pipeline_rank=self.next_rank,
    )
    for request in requests.values():
        request.wait()
    nothing = [0, 0, 0]
    return (
        nothing if from_prev is None else from_prev.tolist(),
        nothing if from_next is None else from_next.tolist(),
    )


class _Background:
    """Sends that nobody waits for. Each tensor is kept alive until the peer has received it."""

    pending: list[tuple[Any, torch.Tensor]] = []  # noqa: RUF012

    @classmethod
    def add(cls, work: Any, tensor: torch.Tensor) -> None:
        cls.pending = [(w, t) for w, t in cls.pending if not w.is_completed()]
        cls.pending.append((work, tensor))


def _tagged_p2p_ops(
    *,
    tensor_send_prev: torch.Tensor | None,
    tensor_recv_prev: torch.Tensor | None,
    tensor_send_next: torch.Tensor | None,
    tensor_recv_next: torch.Tensor | None,
    group: Any,
    prev_pipeline_rank: int,
    next_pipeline_rank: int,
) -> dict[str, Any]:
    """megatron-core's ``_p2p_ops`` for gloo, with one tag per direction; only receives are waited for."""
    forward, backward = 1, 2
    received = {}
    for name, tensor, peer, tag in (
        ("recv_prev", tensor_recv_prev, prev_pipeline_rank, forward),
        ("recv_next", tensor_recv_next, next_pipeline_rank, backward),
    ):
        if tensor is not None:
            received[name] = torch.distributed.irecv(tensor, src=peer, group=group, tag=tag)
    for tensor, peer, tag in (
        (tensor_send_next, next_pipeline_rank, forward),
        (tensor_send_prev, prev_pipeline_rank, backward),
    ):
        if tensor is not None:
            # A separate tensor object, because the schedule empties the other one after sending it
            # (deallocate_pipeline_outputs).
            kept = tensor.detach().contiguous()
            _Background.add(torch.distributed.isend(kept, dst=peer, group=group, tag=tag), kept)
    return received


def _without_step(setter: Callable[..., None]) -> Callable[..., None]:
    """Wrap the distributed optimizer's setter of loaded states so that it ignores torch AdamW's ``step``."""

    @functools.wraps(setter)
    def wrapped(self: Any, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        step = None if "step" in tensors else state.pop("step", None)
        setter(self, model_param, tensors)
        if step is not None:
            state["step"] = step

    return wrapped


def _only_for_shards(init: Callable[..., None]) -> Callable[..., None]:
    """Wrap the part of HybridDeviceOptimizer's set-up that copies parameters, so that it passes over whole models."""

    @functools.wraps(init)
    def wrapped(self: Any) -> None:
        if not any(isinstance(p, torch.nn.Parameter) for group in self.param_groups for p in group["params"]):
            init(self)

    return wrapped


def _telling_the_weight(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """Extend the Function of megatron-core's linear layers: that a gradient is in ``main_grad`` is told to the weight itself.

    megatron-core tells the weight that it saved. Where hooks decide what is saved (``layers.recompute_in_backward``, activations
    in host memory), torch gives back another tensor on the same storage, without the weight's attributes. DDP's hook would then
    find neither a gradient nor the mark, which it refuses when it overlaps reductions.
    """

    class Telling(function):  # type: ignore[misc,valid-type]
        @staticmethod
        def forward(ctx: Any, given: torch.Tensor, weight: torch.Tensor, *args: Any) -> Any:
            ctx.parameter = weight
            return function.forward(ctx, given, weight, *args)

        @staticmethod
        def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
            grads = function.backward(ctx, *grad_outputs)
            weight = ctx.parameter
            if not ctx.gradient_accumulation_fusion or grads[1] is not None:
                return grads
            weight.grad_added_to_main_grad = True
            # Nobody reads it.
            return grads[0], torch.empty_like(weight), *grads[2:]

    return Telling


def _patch_megatron_everywhere() -> None:
    """Patch megatron-core on every platform; seen to be needed with 0.16.1 and 0.19.2.

    Exchange of shapes with ``variable_seq_lengths``: megatron-core batches (send previous, receive previous, send next,
    receive next). In an interleaved pipeline of two ranks, previous and next are the same rank, and what one rank sends to
    its previous the other receives as coming from its previous. With micro batches of unequal length the shapes are swapped,
    and tensors arrive with the wrong size.

    Distributed optimizer with torch's AdamW: a fully reshardable checkpoint contains no ``step`` per parameter, but loading
    looks for one (KeyError).

    Optimizer states in host memory: the optimizer is first built over the whole model, of which every rank would make a copy in
    fp32, and then again over the rank's shards, which are no ``Parameter``.

    Gradients of weights that linear layers add to ``main_grad`` in one product: megatron-core calls an extension of Apex for it,
    which has to be compiled by hand. torch has such a product of its own. And see ``_telling_the_weight``.
    """
    p2p: Any = importlib.import_module("megatron.core.pipeline_parallel.p2p_communication")
    p2p.P2PCommunicator._communicate_shapes = _communicate_shapes
    distributed: Any = importlib.import_module("megatron.core.optimizer.distrib_optimizer").DistributedOptimizer
    distributed._set_main_param_and_optimizer_states = _without_step(distributed._set_main_param_and_optimizer_states)
    hybrid = importlib.import_module("megatron.core.optimizer.cpu_offloading.hybrid_optimizer").HybridDeviceOptimizer
    hybrid._init_sub_optimizers = _only_for_shards(hybrid._init_sub_optimizers)
    linear: Any = importlib.import_module("megatron.core.tensor_parallel.layers")
    linear.fused_weight_gradient_mlp_cuda = FusedWeightGradient
    linear.LinearWithGradAccumulationAndAsyncCommunication = _telling_the_weight(
        linear.LinearWithGradAccumulationAndAsyncCommunication
    )


def _install(platform: Platform) -> Platform:
    if not platform.is_cuda:
        _tune_allocator()
        _patch_torch_for_cpu()
        _patch_megatron_for_cpu()
    else:
        _tune_cuda_allocator()
    _patch_megatron_everywhere()
    load_checkpoints_safely()
    return platform


CURRENT: Platform = _install(_resolve())


# --------------------------------------------------------------------------------------------------
# Limits of a platform
# --------------------------------------------------------------------------------------------------


def use_batched_p2p(virtual_pipeline: bool) -> bool:
    """Whether pipeline stages exchange tensors by batched isend/irecv.

    On gloo, interleaved stages with batched sends and receives silently give wrong losses (megatron-core 0.16.1 and 0.19.2),
    because two messages between the same pair of ranks have no tag that tells them apart. Plain sends and receives in program
    order are correct, so gloo always uses those.
    """
    return CURRENT.is_cuda and not virtual_pipeline


def check_p2p(batch_p2p_comm: bool, virtual_pipeline_size: int | None) -> None:
    """Refuse a combination that would give wrong results without an error.

    Raises:
        PlatformError: interleaved pipeline with batched P2P on gloo.
    """
    if not CURRENT.is_cuda and batch_p2p_comm and virtual_pipeline_size is not None:
        raise PlatformError(
            f"virtual_pipeline_model_parallel_size={virtual_pipeline_size} with batch_p2p_comm=True gives wrong losses "
            "on gloo, without an error; leave batch_p2p_comm off on the CPU, or run on CUDA with NCCL"
        )
