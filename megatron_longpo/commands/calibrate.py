"""``megatron-longpo plan calibrate``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from megatron_longpo.command_line import parse
from megatron_longpo.errors import ConfigError
from megatron_longpo.schema import Count, Range, check_ranges


@dataclass(frozen=True)
class CalibrateOptions:
    """What is measured."""

    output: Annotated[str, tyro.conf.arg(metavar="FILE.yaml")]
    """File of the machine, for --gpu of plan."""
    nproc_per_node: Count | None = None
    """Processes that measure at once, as many as a run on this node will have. Default: one per GPU, or per CPU core."""
    seconds: Annotated[float, Range(ge=1, le=3600, fix="120 is enough")] = 120.0
    """About how long it may take."""
    like: Annotated[str | None, tyro.conf.arg(metavar="MACHINE")] = None
    """Machine whose network between nodes and rate of failures are taken: a name or a file, as for --gpu of plan. Default: one
    node."""


def calibrate(arguments: Sequence[str], *, prog: str) -> None:
    """Measure this machine for the planner: products, attention, log-probs, norms, optimizer, collectives, disk. Nothing else
    should run meanwhile."""
    options = parse(CalibrateOptions, arguments, prog=prog, description=" ".join((calibrate.__doc__ or "").split()))
    check_ranges(options)
    if Path(options.output).suffix not in (".yaml", ".yml"):
        raise ConfigError(f"output={options.output} is no YAML file; name it with .yaml, by which plan knows a file")
    # Not before the flags are read: it imports torch and megatron-core.
    from megatron_longpo.planner.calibrate import calibrate as measure
    from megatron_longpo.planner.machine import load_machine
    from megatron_longpo.runtime import platform
    from megatron_longpo.runtime.log import log

    like = None if options.like is None else load_machine(options.like)
    processes = options.nproc_per_node or platform.CURRENT.device_count()
    log(
        f"measuring {processes} process(es) at once on {platform.CURRENT.describe_device()}, load {os.getloadavg()[0]:.1f}"
    )
    machine = measure(Path(options.output), processes=processes, seconds=options.seconds, like=like)
    for dtype in machine.peak_tflops:
        log(
            f"{dtype}: products {machine.linear_flops_per_s(dtype, rows=4096, width=4096) / 1e12:.3g} TFLOP/s at 4096 rows, "
            f"attention {machine.attention_flops_per_s(dtype, length=8192, is_backward=False) / 1e12:.3g} and "
            f"{machine.attention_flops_per_s(dtype, length=8192, is_backward=True) / 1e12:.3g} at 8192 tokens"
        )
    log(
        f"memory {machine.memory_gb_per_s:.3g} GB/s, links of the node {machine.node_link_gb_per_s:.3g} GB/s; {options.output}"
    )
