"""What the last ``megatron-longpo doctor`` found wrong on this machine; training refuses to use it.

One file per host, ``$XDG_CACHE_HOME/megatron_longpo/doctor-HOST.json`` (``~/.cache`` without that variable).
``MEGATRON_LONGPO_DOCTOR_RECORD`` names another file, or is ``ignore``. A record counts only where host, card, driver and library
versions are those that it was made with.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import os
import re
import socket
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_longpo.errors import one_line
from megatron_longpo.runtime.checked_json import read_checked, write_checked
from megatron_longpo.runtime.log import log
from megatron_longpo.runtime.platform import DeviceFacts

VARIABLE = "MEGATRON_LONGPO_DOCTOR_RECORD"
IGNORE = "ignore"
_VERSION = 1


@dataclass(frozen=True)
class Machine:
    """What a record is about: the same values, the same kernels.

    Attributes:
        host: name of the host.
        platform: ``cpu`` or ``cuda``.
        card, driver, runtime, cudnn: as in ``DeviceFacts``.
        torch, megatron_core, transformer_engine: versions; empty for what is not installed.
    """

    host: str
    platform: str
    card: str
    driver: str
    runtime: str
    cudnn: str
    torch: str
    megatron_core: str
    transformer_engine: str


def machine_of(platform_name: str, facts: DeviceFacts) -> Machine:
    """This machine."""
    return Machine(
        host=socket.gethostname(),
        platform=platform_name,
        card=facts.name,
        driver=facts.driver,
        runtime=facts.runtime,
        cudnn=facts.cudnn,
        torch=torch.__version__,
        megatron_core=_version_of("megatron-core"),
        transformer_engine=_version_of("transformer-engine"),
    )


def short(dtype: torch.dtype) -> str:
    """A type's name without ``torch.``."""
    return str(dtype).removeprefix("torch.")


# What every run uses besides attention kernels, as the doctor's lines name it.
COMMON = ("merged blocks", "rotary embedding", "norm", "gate of the MLP", "log-probs")
LAYERS = "layers/transformer_engine"
# What local linear layers use where gradients are added inside their product.
WEIGHT_GRADIENTS = "gradients of weights"


def attention_kernel(name: str, dtype: torch.dtype) -> str:
    """Name of an attention kernel in a record."""
    return f"attention/{name}/{short(dtype)}"


def common_kernel(name: str, dtype: torch.dtype) -> str:
    """Name in a record of something other than attention: one of ``COMMON``, or ``WEIGHT_GRADIENTS``."""
    return f"{name}/{short(dtype)}"


@dataclass(frozen=True)
class WrongKernel:
    """A kernel whose numbers were wrong.

    Attributes:
        kernel: its name, such as ``attention/flash/bfloat16``.
        detail: what was wrong.
        remedy: what avoids it.
    """

    kernel: str
    detail: str
    remedy: str


@dataclass(frozen=True)
class Record:
    """What a doctor found.

    Attributes:
        machine: where.
        date: when, in ISO 8601.
        wrong: kernels whose numbers were wrong.
    """

    machine: Machine
    date: str
    wrong: tuple[WrongKernel, ...]


def record_path() -> Path | None:
    """File of this host's record; None if records are ignored."""
    setting = os.environ.get(VARIABLE, "")
    if setting == IGNORE:
        return None
    if setting:
        return Path(setting)
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    host = re.sub(r"[^\w.-]", "_", socket.gethostname())
    return root / "megatron_longpo" / f"doctor-{host}.json"


def write_record(record: Record, path: Path) -> None:
    """Write a record, in place of the last one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_checked(path, {"version": _VERSION, **dataclasses.asdict(record)})


def read_record(path: Path) -> Record | None:
    """A record, or None: there is none, or the file is damaged, which is logged. A cache must not keep anybody from training."""
    try:
        content: Any = read_checked(path)
        if content["version"] != _VERSION:
            return None
        return Record(
            machine=Machine(**content["machine"]),
            date=str(content["date"]),
            wrong=tuple(WrongKernel(**row) for row in content["wrong"]),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        log(
            f"{path}: cannot be read ({one_line(error)}), so kernels that are wrong here are not known; run megatron-longpo "
            "doctor again",
            level=logging.WARNING,
            active=os.environ.get("RANK", "0") == "0",
        )
        return None


def wrong_kernels(record: Record, machine: Machine, used: Collection[str]) -> list[WrongKernel]:
    """Kernels in use that a record says are wrong; none if the record is of another machine.

    Args:
        record: the record.
        machine: this machine.
        used: names of the kernels in use.
    """
    return [row for row in record.wrong if row.kernel in used] if record.machine == machine else []


def _version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""
