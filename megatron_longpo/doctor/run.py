"""The whole examination: each rank by itself, then all together; the report, and the record that training reads."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from megatron_longpo.doctor.checkpoints import checkpoint_check
from megatron_longpo.doctor.collectives import collective_checks
from megatron_longpo.doctor.examination import Check, Examination
from megatron_longpo.doctor.findings import EXIT_STATUS, Line, Report
from megatron_longpo.doctor.implementations import implementation_check
from megatron_longpo.doctor.kernels import kernel_checks
from megatron_longpo.doctor.machine import machine_checks, software
from megatron_longpo.doctor.ranks import Ranks
from megatron_longpo.doctor.resources import Wanted, resource_checks
from megatron_longpo.doctor.steps import Workshop, step_checks
from megatron_longpo.errors import ConfigError
from megatron_longpo.runtime import machine_record, platform, process_groups
from megatron_longpo.runtime.collectives import on_rank0
from megatron_longpo.runtime.log import log
from megatron_longpo.runtime.machine_record import (
    Record,
    WrongKernel,
    machine_of,
    read_record,
    record_path,
    write_record,
)

# A process group's own time-out must not come before the watch.
_TIMEOUT_MINUTES = 10
_WIDTH = 132


@dataclass(frozen=True)
class Order:
    """What is to be examined.

    Attributes:
        wanted: the run that the machine is for.
        folder: folder of whose disk checkpoints will be saved; None: one for temporary files.
        output: file of the report.
        seconds: time after which no further layout is begun.
        check_seconds: time of each check, after which it counts as hanging.
    """

    wanted: Wanted
    folder: Path | None
    output: Path
    seconds: float
    check_seconds: float


def examine(order: Order) -> int:
    """Examine this machine, with all ranks that torchrun has started; collective.

    Returns:
        The exit status: 0, or that of ``findings.EXIT_STATUS`` for slow and fail.

    Raises:
        ConfigError: the folder is none.
    """
    # Of the node that makes a folder in it; one that does not see it says so later, where the others do not wait for it.
    first_node = os.environ.get("GROUP_RANK", "0") == "0"
    if first_node and order.folder is not None and not order.folder.is_dir():
        raise ConfigError(f"folder={order.folder} is not a folder; make it, or name another")
    current = platform.CURRENT
    first = os.environ.get("RANK", "0") == "0"
    fp32_products = torch.get_float32_matmul_precision()
    # NGC's containers have TF32 on (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE), which would make plain mathematics good to three digits.
    torch.set_float32_matmul_precision("highest")
    log(f"platform: {current.name} with {current.backend} ({current.reason})", active=first)
    with tempfile.TemporaryDirectory(prefix="megatron-longpo-doctor-") as own:
        workshop = Workshop(Path(own))
        by_itself = _by_itself(order, workshop)
        process_groups.start_processes(_TIMEOUT_MINUTES + math.ceil(order.check_seconds / 60))
        lines = _together(order, workshop, by_itself, fp32_products)
        process_groups.stop_processes()
    return EXIT_STATUS[Report(lines=lines).status]


def _by_itself(order: Order, workshop: Workshop) -> list[Line]:
    """What this rank finds before it joins the others: kernels, and a step alone."""
    current = platform.CURRENT
    current.use_local_rank(int(os.environ.get("LOCAL_RANK", "0")))
    report = Report()

    def on_end(lines: list[Line]) -> None:
        # Otherwise the ranks report together.
        if examination.is_given_up:
            report.write(order.output)
            report.print(_console())
            rank = int(os.environ.get("RANK", "0"))
            print(f"rank {rank} hangs by itself", file=sys.stderr, flush=True)
            # Within its own examination it is rank 0 of 1.
            _record([dataclasses.replace(line, ranks=()) for line in lines], 1)

    examination = Examination(
        Ranks.alone(), report, check_seconds=order.check_seconds, on_change=lambda _: None, on_end=on_end
    )
    alone = Check("a step by itself", functools.partial(_prepare, workshop=workshop), "see the kernels above it")
    model = order.wanted.config.model
    examination.run([*kernel_checks(model.attention_backend), alone], seconds=math.inf)
    return examination.close()


def _prepare(_: Ranks, *, workshop: Workshop) -> Iterator[Line]:
    workshop.prepare()
    yield Line("a step by itself", "pass", "in fp32: what layouts are compared with")


def _together(order: Order, workshop: Workshop, by_itself: list[Line], fp32_products: str) -> list[Line]:
    world_size, local_size = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    facts = platform.CURRENT.facts()
    report = Report(facts=_facts())
    shared = on_rank0(lambda: Path(tempfile.mkdtemp(prefix=".megatron-longpo-doctor-", dir=order.folder)))

    def on_end(lines: list[Line]) -> None:
        if dist.get_rank() == 0:
            report.print(_console())
            log(f"report: {order.output}")
        if os.environ.get("LOCAL_RANK", "0") == "0":
            _record(lines, local_size)
        if dist.get_rank() == 0:
            shutil.rmtree(shared, ignore_errors=True)

    examination = Examination(
        Ranks.of_process_group(),
        report,
        check_seconds=order.check_seconds,
        on_change=lambda found: found.write(order.output),
        on_end=on_end,
    )
    config = order.wanted.config
    by_themselves, *steps = step_checks(workshop, world_size)
    checks = [
        *machine_checks(config.model, fp32_products),
        Check("kernels", lambda _: by_itself),
        *collective_checks(config.parallel, world_size=world_size, local_size=local_size, links=facts.links),
        *resource_checks(order.wanted, shared, world_size=world_size, local_size=local_size),
        by_themselves,
        implementation_check(workshop),
        checkpoint_check(workshop, shared),
        *steps,
    ]
    examination.run(checks, seconds=order.seconds)
    return examination.close()


def _facts() -> dict[str, Any]:
    facts = platform.CURRENT.facts()
    return {**software(), "platform": platform.CURRENT.name, "card": facts.name} | {
        name: value
        for name in ("driver", "runtime", "cudnn", "nccl", "capability", "cards", "links")
        if (value := getattr(facts, name))
    }


def _console() -> Console:
    console = Console()
    # Not a terminal: rich would take it for one of 80 columns.
    return console if console.is_terminal else Console(width=_WIDTH)


def _record(lines: list[Line], local_size: int) -> None:
    """Leave on this host which of its kernels are wrong, for training to read.

    What an earlier examination found of kernels that this one did not come to stays.
    """
    path = record_path()
    if path is None:
        return
    rank = int(os.environ.get("RANK", "0"))
    here = range(rank, rank + local_size)
    wrong = tuple(
        WrongKernel(line.kernel, line.detail, line.remedy)
        for line in lines
        if line.kernel and line.status == "fail" and (not line.ranks or any(r in here for r in line.ranks))
    )
    machine, before = machine_of(platform.CURRENT.name, platform.CURRENT.facts()), read_record(path)
    if before is not None and before.machine == machine:
        examined = {line.kernel for line in lines if line.status != "skipped"}
        wrong += tuple(kernel for kernel in before.wrong if kernel.kernel not in examined)
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    record = Record(machine, now, wrong)
    try:
        write_record(record, path)
    except OSError as error:
        log(f"{path}: the record cannot be written ({error}), so training will not know; set {machine_record.VARIABLE}")
        return
    if rank == 0:
        log(f"record for training: {path}")
