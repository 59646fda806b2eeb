"""A machine's file from measurements on it: starts the processes of ``measure.py`` and turns what they found into constants."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_longpo.errors import LongPOError
from megatron_longpo.planner.machine import SCHEMA_VERSION, Machine, machine_from
from megatron_longpo.runtime.files import write_atomically

_PACKAGE_ROOT = Path(__file__).resolve().parents[2]
_GIB = 2**30
_DTYPES = ("bfloat16", "float32")
# Constants that no run of a few minutes on one node shows; taken from another machine.
_ELSEWHERE = (
    "network_gb_per_s",
    "network_latency_us",
    "gpu_hours_between_failures",
    "restart_minutes",
    "straggler_slowdown",
)
_MEASUREMENT = "megatron_longpo.planner.measure"


def calibrate(path: Path, *, processes: int, seconds: float, like: Machine | None) -> Machine:
    """Measure this machine, and write its file.

    Args:
        path: file to write.
        processes: processes that measure at the same time, as a run on this node will have.
        seconds: about how long it may take.
        like: machine whose network and failures are taken; None: one node without a network.

    Returns:
        The machine.

    Raises:
        LongPOError: a process failed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".calibrate-") as folder:
        found = _measured(Path(folder) / "found.json", processes=processes, seconds=seconds)
    content = content_of(found, name=path.stem, like=like, today=datetime.date.today())
    machine = machine_from(content, str(path))
    write_atomically(path, yaml.safe_dump(content, sort_keys=False, width=130, default_flow_style=None).encode())
    return machine


def _measured(path: Path, *, processes: int, seconds: float) -> dict[str, Any]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    python_path = os.pathsep.join(filter(None, [str(_PACKAGE_ROOT), os.environ.get("PYTHONPATH", "")]))
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    done = subprocess.run(
        [*launcher, "-m", _MEASUREMENT, str(path), str(seconds)],
        env={**os.environ, "PYTHONPATH": python_path, "OMP_NUM_THREADS": threads},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode or not path.exists():
        raise LongPOError(f"the measurement ended with status {done.returncode}: {done.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def content_of(found: Mapping[str, Any], *, name: str, like: Machine | None, today: datetime.date) -> dict[str, Any]:
    """The content of a machine's file.

    Args:
        found: what ``measure.py`` found.
        name: name of the machine.
        like: machine whose network and failures are taken.
        today: date of the measurement, for the sources.
    """
    processes, threads = found["processes"], found["threads"]
    how = f"measured on {today} by {processes} process(es) of {threads} thread(s) at once"
    gb, gib = 1e-9, 1 / _GIB
    content: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "description": f"{found['device']}, {processes} process(es) per node",
        "device": found["platform"],
    }

    def constant(key: str, value: Any, source: str = how) -> None:
        content[key] = {"value": value, "source": source}

    constant("gpus_per_node", processes)
    # The processes of a CPU share its memory.
    constant("memory_gib", _rounded(found["memory_bytes"] * gib / (1 if found["platform"] == "cuda" else processes)))
    constant("reserved_gib", _rounded(found["used_bytes"] * gib))
    # Small tensors stay in a CPU's caches, so more than the copy's rate was seen.
    bandwidth = max(found["copy_bytes_per_s"], *(found[d]["elementwise_bytes_per_s"] for d in _DTYPES))
    constant("memory_gb_per_s", _rounded(bandwidth * gb))
    constant("memory_efficiency", _rounded(found["copy_bytes_per_s"] / bandwidth))
    constant("elementwise_efficiency", {d: _rounded(found[d]["elementwise_bytes_per_s"] / bandwidth) for d in _DTYPES})
    constant("optimizer_gb_per_s", _rounded(found["optimizer_bytes_per_s"] * gb))
    if "fresh_bytes_per_s" in found:
        constant("fresh_gb_per_s", _rounded(found["fresh_bytes_per_s"] * gb))
    peaks = {d: _fastest(found[d]) for d in _DTYPES}
    constant("logits_g_per_s", {d: _rounded(found[d]["logits_per_s"] * gb) for d in _DTYPES})
    shares = {d: _rounded(min(1.0, found[d]["logprob_flops_per_s"] / peaks[d])) for d in _DTYPES}
    constant("logprob_efficiency", shares)
    constant("peak_tflops", {d: _rounded(peaks[d] * 1e-12) for d in _DTYPES}, f"{how}: the fastest product")
    constant("linear_efficiency", {d: _curve(found[d]["rows"], peaks[d]) for d in _DTYPES})
    constant("linear_width_efficiency", _widths(found))
    for key, place in (("attention_forward_efficiency", 0), ("attention_backward_efficiency", 1)):
        constant(key, {d: _curve({n: r[place] for n, r in found[d]["attention"].items()}, peaks[d]) for d in _DTYPES})
    constant("operator_us", _rounded(found["operator_seconds"] * 1e6))
    constant("host_link_gb_per_s", _rounded(found["host_bytes_per_s"] * gb))
    if "compute_capability" in found:
        constant("compute_capability", found["compute_capability"], "as CUDA says")
    if "host_update_bytes_per_s" in found:
        constant("host_memory_gib", _rounded(found["host_memory_bytes"] * gib / processes))
        constant("host_update_gb_per_s", _rounded(found["host_update_bytes_per_s"] * gb))
    constant("disk_gb_per_s", _rounded(found["disk_bytes_per_s"] * gb))
    if found["exchanges"]:
        rate, latency = _link(found["exchanges"])
        constant("node_link_gb_per_s", _rounded(rate * gb))
        constant("node_link_latency_us", _rounded(latency * 1e6))
    else:
        constant("node_link_gb_per_s", _rounded(found["copy_bytes_per_s"] * gb / 2), "one process: half a copy's rate")
        constant("node_link_latency_us", 0.0, "one process: nothing is exchanged")
    if like is not None:
        for key in _ELSEWHERE:
            constant(key, getattr(like, key), like.sources.get(key, f"as {like.name}"))
    else:
        constant("network_gb_per_s", content["node_link_gb_per_s"]["value"], "one node: as inside it")
        constant("network_latency_us", content["node_link_latency_us"]["value"], "one node: as inside it")
        constant("straggler_slowdown", 0.0, "measurements are means of processes that run at the same time")
    return content


def _fastest(found: Mapping[str, Any]) -> float:
    return max(
        *found["rows"].values(),
        *found["widths"].values(),
        *(rate for pair in found["attention"].values() for rate in pair),
    )


def _curve(rates: Mapping[Any, float], peak: float) -> list[list[float]]:
    return [[int(size), _rounded(rate / peak)] for size, rate in rates.items()]


def _widths(found: Mapping[str, Any]) -> list[list[float]]:
    """Factor of the width, the mean of both types; the widest is that of the curve by rows."""
    sizes = list(found[_DTYPES[0]]["widths"])
    factors = []
    for size in sizes:
        shares = [found[d]["widths"][size] / found[d]["widths"][sizes[-1]] for d in _DTYPES]
        factors.append([int(size), min(1.0, _rounded(sum(shares) / len(shares)))])
    return factors


def _link(exchanges: Mapping[str, Mapping[str, Mapping[str, float]]]) -> tuple[float, float]:
    """Bytes per second and seconds per step of a ring, of the largest group: from its smallest and its largest exchanges.

    The mean of the collectives' seconds counts, since a step has all of them.
    """
    size, collectives = max(((int(n), c) for n, c in exchanges.items()), key=lambda item: item[0])
    sent = sorted(map(int, next(iter(collectives.values()))))
    steps = {"all_reduce": 2 * (size - 1), "all_to_all": 1}
    latencies = [times[str(sent[0])] / steps.get(name, size - 1) for name, times in collectives.items()]
    latency = sum(latencies) / len(latencies)
    seconds = [times[str(sent[-1])] - times[str(sent[0])] for times in collectives.values()]
    return sent[-1] * len(seconds) / max(sum(seconds), 1e-9), latency


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
