"""Machines as data: the constants of a GPU, its node and its network, each with its source, in ``machines/NAME.yaml``.

A file maps each constant's name, which has its unit, to its ``value`` and its ``source``; ``schema_version``, ``name``,
``description`` and ``device`` stand alone. 1 GB is 1e9 bytes, 1 GiB is 2^30.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from megatron_longpo.config import read_yaml
from megatron_longpo.errors import ConfigError
from megatron_longpo.schema import Count, PositiveFiniteFloat, Range, check_ranges, convert_fields, kind_of, nearest

FOLDER = Path(__file__).parent / "machines"
SCHEMA_VERSION = 1

Curve = tuple[tuple[float, float], ...]
"""Pairs of a size and a share of the peak, sizes ascending. Between two sizes the share is linear in the size's logarithm; beyond
the ends it stays."""
Share = Annotated[float, Range(gt=0, le=1)]
NotNegative = Annotated[float, Range(ge=0, lt=math.inf)]

# Read and written per logit by the passes of model/logprobs.py in fp32: the product's result (4), the maximum (4), the
# exponential in place (8), the sum (4), the gradient in place (8), and its 16-bit copy (6).
LOGIT_BYTES = 34

# Memory of the host for each GPU, as a share of the GPU's, where a file does not say.
_HOST_MEMORY = 1.5

# Keys without a source.
_PLAIN = ("name", "description", "device")


@dataclass(frozen=True)
class Machine:
    """A kind of GPU (or CPU process), its node and its network. All figures are per GPU unless they say otherwise.

    Attributes:
        name: name of the file.
        description: what it is, in words.
        device: where tensors live. On a CPU, a "GPU" is one process.
        gpus_per_node: GPUs that share the links inside a node.
        compute_capability: CUDA's, for simulated GPUs; without it, that of a Hopper.
        memory_gib: memory.
        memory_gb_per_s: bandwidth of the memory.
        peak_tflops: dtype ("bfloat16", "float32") -> dense matrix products, 1e12 operations per second.
        linear_efficiency: dtype -> share of the peak that a product reaches, by its rows (tokens).
        attention_forward_efficiency: dtype -> share of the peak of the attention kernel's forward, by the length of the row.
        attention_backward_efficiency: as before, of the backward.
        node_link_gb_per_s: what a GPU sends to others of its node while it receives as much, as collectives reach it.
        node_link_latency_us: time of one step of a collective inside a node.
        network_gb_per_s: what a GPU sends to other nodes while it receives as much, as collectives reach it.
        network_latency_us: time of one step of a collective between nodes.
        host_link_gb_per_s: copies between the GPU and the host's memory, one direction.
        host_memory_gib: memory of the host per GPU; without it, 1.5 times the GPU's.
        host_update_gb_per_s: bytes that an optimizer's update on the host's cores reads and writes, of a GPU's share of the cores
            and of their memory; without it, as copies to the host.
        disk_gb_per_s: writing of checkpoints, per node.
        memory_efficiency: share of the memory's bandwidth that element-wise kernels reach.
        elementwise_efficiency: the same by dtype, of norms, gates, rotary embeddings and sums, where it was measured. On a CPU
            they are bound by arithmetic, and 16-bit types are converted.
        optimizer_gb_per_s: bytes that the optimizer's update reads and writes; without it, as element-wise kernels in fp32.
        fresh_gb_per_s: on a CPU, memory that the system gives to a process some seconds after it was freed, by the seconds that
            this takes longer than at once; without it, no longer. A virtual machine may have to get it from its host.
        logits_g_per_s: dtype -> 1e9 logits per second that pass the softmax of the log-probs and its gradient, beside the
            products; without it, as element-wise kernels that move 34 bytes per logit.
        logprob_efficiency: dtype -> share of the peak that the products of the log-probs reach; without it, as other products of
            as many rows.
        linear_width_efficiency: factor on ``linear_efficiency``, by the smaller one of a product's two other sizes.
        operator_us: time that an operator takes beside its arithmetic: a kernel's launch.
        reserved_gib: memory that tensors cannot have: the CUDA context, buffers of NCCL.
        gpu_hours_between_failures: hours of one GPU between interruptions of a run, on average; infinity if unknown.
        restart_minutes: from an interruption to the next step, what is computed again not included.
        straggler_slowdown: share by which the slowest of many GPUs is slower than the average.
        sources: name of a constant -> where it is from.
    """

    name: str
    description: str
    device: Literal["cuda", "cpu"]
    gpus_per_node: Count
    memory_gib: PositiveFiniteFloat
    memory_gb_per_s: PositiveFiniteFloat
    peak_tflops: dict[str, float]
    linear_efficiency: dict[str, Curve]
    attention_forward_efficiency: dict[str, Curve]
    attention_backward_efficiency: dict[str, Curve]
    node_link_gb_per_s: PositiveFiniteFloat
    node_link_latency_us: NotNegative
    network_gb_per_s: PositiveFiniteFloat
    network_latency_us: NotNegative
    host_link_gb_per_s: PositiveFiniteFloat
    disk_gb_per_s: PositiveFiniteFloat
    compute_capability: PositiveFiniteFloat | None = None
    memory_efficiency: Share = 0.8
    elementwise_efficiency: dict[str, float] = field(default_factory=dict)
    optimizer_gb_per_s: PositiveFiniteFloat | None = None
    fresh_gb_per_s: PositiveFiniteFloat | None = None
    host_memory_gib: PositiveFiniteFloat | None = None
    host_update_gb_per_s: PositiveFiniteFloat | None = None
    logits_g_per_s: dict[str, float] = field(default_factory=dict)
    logprob_efficiency: dict[str, float] = field(default_factory=dict)
    linear_width_efficiency: Curve = ((1.0, 1.0),)
    operator_us: NotNegative = 5.0
    reserved_gib: NotNegative = 2.0
    gpu_hours_between_failures: Annotated[float, Range(gt=0)] = math.inf
    restart_minutes: NotNegative = 10.0
    straggler_slowdown: NotNegative = 0.0
    sources: dict[str, str] = field(default_factory=dict)

    # Rates; seconds and bytes everywhere ------------------------------------------------------------

    @property
    def memory_bytes(self) -> float:
        return self.memory_gib * 2**30

    @property
    def reserved_bytes(self) -> float:
        return self.reserved_gib * 2**30

    @property
    def memory_bytes_per_s(self) -> float:
        """What element-wise kernels read and write together."""
        return self.memory_gb_per_s * 1e9 * self.memory_efficiency

    def elementwise_bytes_per_s(self, dtype: str) -> float:
        """What norms, gates, rotary embeddings and sums read and write together.

        Args:
            dtype: "bfloat16" or "float32".
        """
        return self.memory_gb_per_s * 1e9 * self.elementwise_efficiency.get(dtype, self.memory_efficiency)

    @property
    def optimizer_bytes_per_s(self) -> float:
        """What the optimizer's update reads and writes together."""
        if self.optimizer_gb_per_s is not None:
            return self.optimizer_gb_per_s * 1e9
        return self.elementwise_bytes_per_s("float32")

    @property
    def host_memory_bytes(self) -> float:
        return self.host_memory_gib * 2**30 if self.host_memory_gib is not None else _HOST_MEMORY * self.memory_bytes

    @property
    def host_update_bytes_per_s(self) -> float:
        """What an optimizer's update on the host's cores reads and writes together."""
        return (self.host_update_gb_per_s or self.host_link_gb_per_s) * 1e9

    def logits_per_s(self, dtype: str) -> float:
        """Logits that pass the softmax of the log-probs and its gradient, beside the products.

        Args:
            dtype: "bfloat16" or "float32", of hidden states and weights.
        """
        if dtype in self.logits_g_per_s:
            return self.logits_g_per_s[dtype] * 1e9
        return self.elementwise_bytes_per_s("float32") / LOGIT_BYTES

    def peak_flops_per_s(self, dtype: str) -> float:
        """Dense matrix products.

        Raises:
            ConfigError: the file has no figure for the dtype.
        """
        if dtype not in self.peak_tflops:
            raise ConfigError(
                f"machine {self.name} has no peak_tflops of {dtype}; use one of {', '.join(self.peak_tflops)}"
            )
        return self.peak_tflops[dtype] * 1e12

    def linear_flops_per_s(self, dtype: str, *, rows: float, width: float) -> float:
        """Rate of a matrix product.

        Args:
            dtype: "bfloat16" or "float32".
            rows: tokens.
            width: the smaller one of its other two sizes, on this rank.
        """
        share = share_at(self.linear_efficiency[dtype], rows) * share_at(self.linear_width_efficiency, width)
        return self.peak_flops_per_s(dtype) * share

    def logprob_flops_per_s(self, dtype: str, *, rows: float, width: float) -> float:
        """Rate of the products of the log-probs.

        Args:
            dtype: "bfloat16" or "float32".
            rows: tokens that have a log-prob.
            width: hidden size.
        """
        if dtype in self.logprob_efficiency:
            return self.peak_flops_per_s(dtype) * self.logprob_efficiency[dtype]
        return self.linear_flops_per_s(dtype, rows=rows, width=width)

    def attention_flops_per_s(self, dtype: str, *, length: float, is_backward: bool) -> float:
        """Rate of the attention kernel, in operations on visible pairs of a query and a key.

        Args:
            dtype: "bfloat16" or "float32".
            length: keys that a query may see.
            is_backward: whether the backward is asked for.
        """
        curves = self.attention_backward_efficiency if is_backward else self.attention_forward_efficiency
        return self.peak_flops_per_s(dtype) * share_at(curves[dtype], length)


def share_at(curve: Curve, size: float) -> float:
    """The share of a curve at a size."""
    if size <= curve[0][0]:
        return curve[0][1]
    for (low, before), (high, after) in itertools.pairwise(curve):
        if size <= high:
            return before + (after - before) * math.log(size / low) / math.log(high / low)
    return curve[-1][1]


def machine_names() -> list[str]:
    """Machines that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_machine(name: str) -> Machine:
    """Read a machine.

    Args:
        name: one of ``machine_names()``, or the path of a YAML file.

    Raises:
        ConfigError: no such machine, or a file that cannot be used.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        if name not in machine_names():
            raise ConfigError(
                f"gpu={name} is unknown; {nearest(name, machine_names())}; or give the path of a .yaml file"
            )
        path = FOLDER / f"{name}.yaml"
    return machine_from(read_yaml(path), str(path))


def machine_from(content: Any, where: str) -> Machine:
    """A machine from plain values, as a file holds them.

    Raises:
        ConfigError: of another schema version, a key unknown or missing, or a value of the wrong type or out of its range.
    """
    fix = "correct it there, or measure the machine with megatron-longpo plan calibrate"
    if not isinstance(content, dict) or content.get("schema_version") != SCHEMA_VERSION:
        raise ConfigError(f"{where}: schema_version is not {SCHEMA_VERSION}; {fix}")
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for key, entry in content.items():
        if key in (*_PLAIN, "schema_version"):
            values[key] = entry
        elif isinstance(entry, Mapping) and set(entry) == {"value", "source"}:
            values[key], sources[key] = entry["value"], str(entry["source"])
        else:
            raise ConfigError(f"{where}: {key} is {kind_of(entry)}; it must be a mapping of value and source; {fix}")
    del values["schema_version"]
    converted = convert_fields(Machine, values, f"{where}: ", ConfigError, fix)
    required = [f.name for f in dataclasses.fields(Machine) if f.default is f.default_factory is dataclasses.MISSING]
    missing = [name for name in required if name not in converted]
    if missing:
        raise ConfigError(f"{where}: {', '.join(missing)} is missing; {fix}")
    machine = Machine(**converted, sources=sources)
    try:
        check_ranges(machine)
        _check_curves(machine)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return machine


def _check_curves(machine: Machine) -> None:
    for dtype, rate in machine.logits_g_per_s.items():
        if not 0 < rate < math.inf:
            raise ConfigError(f"logits_g_per_s.{dtype}={rate} must be finite and positive; correct it")
    for name in ("elementwise_efficiency", "logprob_efficiency"):
        for dtype, share in getattr(machine, name).items():
            if not 0 < share <= 1:
                raise ConfigError(f"{name}.{dtype}={share} must be in (0, 1]; correct it")
    curves: dict[str, Curve] = {"linear_width_efficiency": machine.linear_width_efficiency}
    for name in ("linear_efficiency", "attention_forward_efficiency", "attention_backward_efficiency"):
        by_dtype = getattr(machine, name)
        if set(by_dtype) != set(machine.peak_tflops):
            raise ConfigError(
                f"{name} is given for {', '.join(by_dtype)}; give it for {', '.join(machine.peak_tflops)}"
            )
        curves |= {f"{name}.{dtype}": curve for dtype, curve in by_dtype.items()}
    for name, curve in curves.items():
        sizes = [point[0] for point in curve]
        if (
            not curve
            or any(len(p) != 2 or p[0] <= 0 or not 0 < p[1] <= 1 for p in curve)
            or sizes != sorted(set(sizes))
        ):
            raise ConfigError(
                f"{name} must be pairs of a size, ascending, and a share of the peak in (0, 1]; correct it"
            )
