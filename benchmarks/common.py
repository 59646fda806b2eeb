"""What the benchmarks share: memory of a process (Linux), the machine in words, where the tools are."""

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
    """Largest resident set of this process, since its start or the last reset."""
    return _status("VmHWM")


def reset_peak() -> float:
    """Count peaks anew from here; gives the resident set now, less what the allocator holds without need."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def describe_machine() -> str:
    """Processor, system and torch."""
    import torch

    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = next((x.split(":")[1].strip() for x in info.splitlines() if "model name" in x), machine.processor())
    return f"{cpu}, {os.cpu_count()} cores, {machine.system()} {machine.machine()}, torch {torch.__version__}"
