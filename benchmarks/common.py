"""Helpers of the benchmarks: memory of a process (Linux) and a description of the machine."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform as machine
from pathlib import Path

CONVERT = Path(__file__).parent.parent / "tools" / "convert_checkpoint.py"


def _status(key: str) -> float:
    text = Path("/proc/self/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith(key)).split()[1]) / 2**20


def peak_gb() -> float:
    """Largest resident set of this process in GB since its start or the last reset."""
    return _status("VmHWM")


def reset_peak() -> float:
    """Reset the peak; return the present resident set in GB after trimming the allocator."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def describe_machine() -> str:
    """Describe processor, system and version of torch."""
    import torch

    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = next((x.split(":")[1].strip() for x in info.splitlines() if "model name" in x), machine.processor())
    return f"{cpu}, {os.cpu_count()} cores, {machine.system()} {machine.machine()}, torch {torch.__version__}"
