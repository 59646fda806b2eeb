"""Helpers of the benchmarks: memory of a process (Linux), a description of the machine, a hash of the code."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform as machine
from importlib import metadata
from pathlib import Path

CONVERT = Path(__file__).parent.parent / "tools" / "convert_checkpoint.py"
PACKAGE = Path(__file__).parent.parent / "megatron_longpo"


def code_hash(*without: str, script: Path | None = None, package: Path = PACKAGE) -> str:
    """Twelve digits of the hash of the package's modules and machines, and of the versions of torch and megatron-core: results of
    other code are not those of this one.

    Args:
        without: files and folders that the result does not depend on, relative to the package.
        script: a benchmark that is part of the code.
        package: folder of the package.
    """
    found = hashlib.sha256(b"" if script is None else script.read_bytes())
    for name in ("torch", "megatron-core"):
        found.update(f"{name} {metadata.version(name)}\0".encode())
    for path in sorted(path for path in package.rglob("*") if path.suffix in (".py", ".yaml")):
        name = path.relative_to(package)
        if not any(name.is_relative_to(other) for other in without):
            found.update(f"{name.as_posix()}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return found.hexdigest()[:12]


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
