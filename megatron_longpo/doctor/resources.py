"""Disk and memory, for the asked-for model or in general."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_longpo.config import Config
from megatron_longpo.doctor.examination import Check
from megatron_longpo.doctor.findings import Line
from megatron_longpo.doctor.ranks import Ranks
from megatron_longpo.runtime import platform
from megatron_longpo.runtime.collectives import on_rank0
from megatron_longpo.simulation.data import read_shape
from megatron_longpo.simulation.fallback import Estimate, estimate
from megatron_longpo.simulation.request import Card, Request
from megatron_longpo.training.preflight import checkpoint_bytes, free_bytes

_MIB, _GIGA = 2**20, 1e9
# Bytes that are written and read back, at most, and seconds that it may take.
_BYTES = {"cuda": 1024 * _MIB, "cpu": 32 * _MIB}
_SECONDS = 8.0
_LEAST_BYTES = _MIB
# GB/s below which a disk is slow, and seconds that a checkpoint may take on it.
_SLOWEST = {"cuda": 0.1, "cpu": 0.001}
_CHECKPOINT_SECONDS = 600.0
# NCCL's buffers, cuBLAS's workspaces and fragmentation, beside tensors (docs/simulation.md).
_CUDA_BYTES = 2 * 2**30
# Host memory of a rank's process with CUDA's libraries, and what a save holds at once (docs/gpu.md).
_PROCESS_BYTES, _SAVING_BYTES = 4 * 2**30, 256 * _MIB
_DISK = (
    "save to a faster file system (--save; this is the one of --folder), less often (--save-interval), or in the background "
    "(--async-save)"
)


NOT_SHARED = "name a folder on a file system that all nodes share with --folder, and use such a one for --save"


@dataclass(frozen=True)
class Wanted:
    """The run that a machine is asked for.

    Attributes:
        config: its configuration.
        model: folder or file with the model's shape, or None: the configuration's ``load``.
        tokens: tokens of its longest row, or None: of its data, else what the model claims.
    """

    config: Config
    model: str | None
    tokens: int | None

    @property
    def is_there(self) -> bool:
        return self.model is not None or self.config.checkpoint.load is not None


def resource_checks(wanted: Wanted, folder: Path, *, world_size: int, local_size: int) -> list[Check]:
    """Disk and memory.

    Args:
        wanted: the run.
        folder: folder on the disk that is looked at.
        world_size: number of ranks.
        local_size: ranks of a node.
    """
    memory = functools.partial(_check_memory, wanted=wanted, world_size=world_size, local_size=local_size)
    return [
        Check("memory", memory, "give --tokens, or another layout", is_apart=True),
        Check(
            "disk",
            functools.partial(_check_disk, wanted=wanted, folder=folder, world_size=world_size),
            "the file system of --folder does not answer: name another, and use it for --save",
            # But for the folder's first file, which rank 0 writes before the others look.
            is_apart=True,
        ),
    ]


# --------------------------------------------------------------------------------------------------
# Memory
# --------------------------------------------------------------------------------------------------

_NOT_ASKED = "no model was asked for: --hf DIR, or --config run.yaml"


def _check_memory(ranks: Ranks, *, wanted: Wanted, world_size: int, local_size: int) -> Iterator[Line]:
    if not wanted.is_there:
        yield Line("memory for the model", "skipped", _NOT_ASKED)
        return
    found = _estimate(wanted, ranks.rank, world_size, local_size)
    current = platform.CURRENT
    available = current.available_memory_bytes() // (1 if current.is_cuda else local_size)
    needed = found.tensor_bytes + (_CUDA_BYTES if current.is_cuda else 0)
    figures = {"needed_bytes": float(needed), "available_bytes": float(available)}
    detail = f"{found}; {available / 2**30:.1f} GiB are available per rank"
    fits = needed <= available
    yield Line(
        "memory for the model",
        "pass" if fits else "fail",
        detail,
        "raise --context-parallel-size or --tensor-model-parallel-size with --sequence-parallel, set "
        "--use-distributed-optimizer, or take shorter rows",
        figures=figures,
    )
    if current.is_cuda:
        yield _host_line(wanted, found.host_bytes, world_size, local_size)


def _host_line(wanted: Wanted, waiting: int, world_size: int, local_size: int) -> Line:
    """Host memory beside GPUs: what a rank's process takes, what waits there in training, and its share of a checkpoint, which a
    background save copies.

    Args:
        wanted: the run.
        waiting: bytes of a rank's activations and optimizer.
        world_size, local_size: number of ranks, and of those of this node.
    """
    import psutil

    share = _checkpoint_bytes(wanted) // world_size if wanted.config.checkpoint.async_save else 0
    needed = local_size * (_PROCESS_BYTES + _SAVING_BYTES + share + waiting)
    available = int(psutil.virtual_memory().available)
    detail = f"{local_size} rank(s) need {needed / 2**30:.1f} of {available / 2**30:.1f} GiB available on this node"
    if waiting:
        detail += f", {local_size * waiting / 2**30:.1f} of it for activations and the optimizer"
    remedy = (
        "leave out what takes most of it (--async-save, --optimizer-cpu-offload, --cpu-offloading-num-layers), or free memory "
        "of the host"
    )
    figures = {"needed_bytes": float(needed), "available_bytes": float(available)}
    return Line("host memory", "pass" if needed <= available else "fail", detail, remedy, figures=figures)


def _ranks_of(wanted: Wanted, world_size: int) -> int:
    """Ranks of the run: those that are here, or as many as its layout takes if these are other."""
    parallel = wanted.config.parallel
    model = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    return world_size if world_size % model == 0 else model


def _estimate(wanted: Wanted, rank: int, world_size: int, local_size: int) -> Estimate:
    config = wanted.config
    tokens = wanted.tokens
    if tokens is None and config.data.data_path is None:
        tokens = config.data.seq_length or read_shape(wanted.model, config, flag="hf").max_position_embeddings
    size = _ranks_of(wanted, world_size)
    request = Request(config.as_dict(), size, min(rank, size - 1), model=wanted.model, tokens=tokens)
    facts = platform.CURRENT.facts()
    return estimate(
        request,
        Card(memory_bytes=facts.memory_bytes),
        on_cuda=platform.CURRENT.is_cuda,
        host_memory=platform.CURRENT.host_memory_bytes() // local_size,
    )


# --------------------------------------------------------------------------------------------------
# Disk
# --------------------------------------------------------------------------------------------------


def _check_disk(ranks: Ranks, *, wanted: Wanted, folder: Path, world_size: int) -> Iterator[Line]:
    if not sees(folder):
        # Its own disk is not the one that checkpoints go to. The others look at that.
        yield Line(
            "disk space",
            "fail",
            f"rank {ranks.rank} does not see what rank 0 writes to {folder}",
            NOT_SHARED,
        )
        return
    kind = "cuda" if platform.CURRENT.is_cuda else "cpu"
    free = free_bytes(folder)
    needed = _checkpoint_bytes(wanted) if wanted.is_there else None
    figures = {"free_bytes": float(free)} | ({"checkpoint_bytes": float(needed)} if needed else {})
    detail = f"{free / _GIGA:.1f} GB free on the disk of {folder.parent}"
    if needed is not None:
        detail += f"; a checkpoint needs {needed / _GIGA:.1f}"
    yield Line(
        "disk space",
        "fail" if needed is not None and free < needed else "pass",
        detail,
        "free space, name another folder for --save, or save weights only (--no-save-optim)",
        figures=figures,
    )
    if free < _LEAST_BYTES:
        yield Line("disk speed", "skipped", f"{free} bytes are free, too few to write any")
        return
    ranks.at("writing to the disk")
    written, read = rates(folder / f"rates-{ranks.rank}", min(_BYTES[kind], free // 4))
    figures = {"written_gigabytes_per_second": written, "read_gigabytes_per_second": read}
    detail = f"each rank writes {written:.2g} and reads {read:.2g} GB/s, all at once"
    slow = min(written, read) < _SLOWEST[kind]
    if needed is not None:
        seconds = needed / world_size / _GIGA / written
        figures["checkpoint_seconds"] = seconds
        detail += f"; a checkpoint takes {seconds:.0f} s"
        slow = slow or seconds > _CHECKPOINT_SECONDS
    yield Line("disk speed", "slow" if slow else "pass", detail, _DISK, figures=figures)


def sees(folder: Path) -> bool:
    """Whether this rank sees what rank 0 writes to a folder; collective."""
    token = folder / "seen"
    on_rank0(lambda: token.write_text("rank 0"))
    return token.is_file()


def _checkpoint_bytes(wanted: Wanted) -> int:
    return checkpoint_bytes(read_shape(wanted.model, wanted.config, flag="hf"), wanted.config)


def rates(path: Path, size: int) -> tuple[float, float]:
    """GB/s at which a file is written to the disk and read back from it, past the system's cache where it can be told to.

    Args:
        path: path of the file, which is removed again.
        size: its bytes; fewer if it takes long.
    """
    block = torch.randint(0, 256, (4 * _MIB,), dtype=torch.uint8).numpy().tobytes()
    try:
        with open(path, "wb") as stream:
            clock, done = time.monotonic(), 0
            while done < size and time.monotonic() - clock < _SECONDS:
                done += stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())
            written = done / (time.monotonic() - clock) / _GIGA
            # Where a system has no such call, what is read comes from its cache.
            with contextlib.suppress(AttributeError, OSError):
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with open(path, "rb", buffering=0) as source:
            clock, seen = time.monotonic(), 0
            while time.monotonic() - clock < _SECONDS and (got := source.read(len(block))):
                seen += len(got)
            read = seen / (time.monotonic() - clock) / _GIGA
    finally:
        path.unlink(missing_ok=True)
    return written, read
