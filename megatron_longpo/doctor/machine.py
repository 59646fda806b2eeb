"""What the machine is, which implementations a run on it uses and why, and how fast its cards multiply."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform as os_platform
import socket
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

from megatron_longpo import __version__
from megatron_longpo.config import ModelConfig
from megatron_longpo.doctor import plain
from megatron_longpo.doctor.bounds import bounds_of
from megatron_longpo.doctor.examination import Check
from megatron_longpo.doctor.findings import Line, ranges
from megatron_longpo.doctor.ranks import Ranks
from megatron_longpo.errors import ConfigError
from megatron_longpo.model.implementation import choose_layers
from megatron_longpo.model.kernels import kernels_for
from megatron_longpo.runtime import platform
from megatron_longpo.runtime.collectives import all_gather_objects

_PACKAGES = ("torch", "megatron-core", "transformer-engine", "numpy", "transformers")
# Rows and columns of the product whose speed is measured, and how often; the fastest counts.
_SIZE, _TIMES = {"cuda": 8192, "cpu": 256}, 5
# A card that multiplies at less than this share of the others' rate is slow.
_SHARE = 0.75


def software() -> dict[str, str]:
    """Versions of what a run uses."""
    found = {"megatron_longpo": __version__, "python": os_platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine_checks(model: ModelConfig, fp32_products: str) -> list[Check]:
    """Versions and devices on all ranks, what a run would choose, and the speed of products.

    Args:
        model: options of a run.
        fp32_products: torch's precision of matrix products in fp32, as this process found it.
    """
    return [
        Check("machine", _check_machine, "nvidia-smi on each node shows whether the driver answers"),
        Check(
            "choices",
            lambda _: _check_choices(model, fp32_products),
            "--transformer-impl local",
        ),
        Check(
            "products",
            lambda _: _check_products(),
            "see whether the card computes at all: nvidia-smi, dmesg for Xid errors",
        ),
    ]


def _check_machine(ranks: Ranks) -> Iterator[Line]:
    """Every rank should run on the same: what differs is named."""
    facts = platform.CURRENT.facts()
    mine = {**software(), **{k: str(v) for k, v in dataclasses.asdict(facts).items()}}
    mine["memory_bytes"] = f"{facts.memory_bytes / 2**30:.0f} GiB"
    every = all_gather_objects({"host": socket.gethostname(), **mine})
    if ranks.rank != 0:
        return
    differing = []
    for name, value in mine.items():
        others = [rank for rank, theirs in enumerate(every) if theirs[name] != value]
        if others and name != "links":
            differing.append(f"{name} is {value} on rank 0 and {every[others[0]][name]} on rank {ranges(others)}")
    hosts = len({theirs["host"] for theirs in every})
    card = f"{facts.name}, {mine['memory_bytes']}" + (
        f", driver {facts.driver or 'unknown'}" if facts.capability else ""
    )
    links = f"; links {facts.links}" if facts.links else ""
    if differing:
        remedy = (
            "give all ranks the same environment (one image) and the same cards; numbers and speed differ otherwise"
        )
        yield Line("machine", "fail", "; ".join(differing), remedy)
    else:
        detail = f"{ranks.world_size} rank(s) on {hosts} host(s): {card}{links}; torch {mine['torch']}"
        yield Line("machine", "pass", detail)


def _check_choices(model: ModelConfig, fp32_products: str) -> Iterator[Line]:
    try:
        layers = choose_layers(model.transformer_impl)
        yield Line("linear layers", "pass", f"{layers.name} ({layers.reason})")
    except ConfigError as error:
        yield Line("linear layers", "fail", str(error), "--transformer-impl auto")
    if platform.CURRENT.is_cuda:
        is_whole = fp32_products == "highest"
        detail = (
            "fp32"
            if is_whole
            else "TF32 on this machine, which keeps three digits (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=0)"
        )
        yield Line("products of runs in float32", "pass", detail)
    for dtype in (torch.bfloat16, torch.float32):
        name = f"attention of runs in {str(dtype).removeprefix('torch.')}"
        try:
            # Heads of nearly all models have this many channels.
            choice = kernels_for(platform.CURRENT.device.type, dtype, 128, model.attention_backend)
            yield Line(name, "pass", f"{choice.kernels.name} ({choice.reason})")
        except ConfigError as error:
            status: Any = "fail" if dtype == torch.bfloat16 else "skipped"
            yield Line(name, status, str(error), "--attention-backend auto")


def _check_products() -> Iterator[Line]:
    """The product of two matrices, right and as fast as on the other ranks."""
    current = platform.CURRENT
    kind = current.device.type
    size, dtype = _SIZE[kind], torch.bfloat16 if current.is_cuda else torch.float32
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(size, size, generator=generator).to(current.device, dtype) for _ in range(2))
    times = []
    for _ in range(_TIMES):
        current.synchronize()
        clock = time.monotonic()
        found = a @ b
        current.synchronize()
        times.append(time.monotonic() - clock)
    rows = slice(0, 64)
    error = plain.relative_error(found[rows], a[rows].float() @ b.float())
    rate = 2 * size**3 / min(times) / 1e12
    rates = all_gather_objects(rate)
    usual = statistics.median(rates)
    figures = {"tflop_per_second": rate, "error": error}
    detail = f"{rate:.3g} TFLOP/s in {str(dtype).removeprefix('torch.')}"
    bound = bounds_of(dtype, kind).kernel
    if not error <= bound:
        remedy = "this card multiplies wrongly: leave it out, and have it looked at"
        yield Line("products", "fail", f"off by {error:.1e} (rounding: {bound:.0e})", remedy, figures=figures)
    elif current.is_cuda and rate < _SHARE * usual:
        remedy = "nvidia-smi -q -d PERFORMANCE,CLOCK shows what slows the card: heat, a power limit, other processes"
        yield Line("products", "slow", f"{detail}, where the ranks' median is {usual:.3g}", remedy, figures=figures)
    else:
        yield Line("products", "pass", detail, figures=figures)
