"""Degrees of parallelism and process groups: megatron-core's parallel state, set up once and passed on explicitly."""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

# isort: off
from megatron_longpo.errors import PlatformError
from megatron_longpo.runtime import platform  # must precede megatron-core
from megatron_longpo.runtime.heartbeat import start_heartbeat, stop_heartbeat
from megatron.core import parallel_state, tensor_parallel

# isort: on


_LAUNCHES = "megatron_longpo/launch"
_ASK_SECONDS = 0.02


@dataclass(frozen=True)
class Parallel:
    """Degrees of parallelism, and the ranks and groups of this process.

    The ``dp_cp`` ranks are the data- and context-parallel ranks together. The optimizer is sharded over them, and whole short
    rows are assigned to them.

    Attributes:
        virtual_stages: virtual pipeline stages per rank; None without interleaving.
        comm_type: how context parallelism exchanges, ``a2a`` or ``allgather``.
        rank: global rank of this process.
        world_size: number of processes.
    """

    tensor_size: int
    pipeline_size: int
    virtual_stages: int | None
    context_size: int
    data_size: int
    sequence_parallel: bool
    comm_type: str
    rank: int
    world_size: int

    @property
    def pipeline_rank(self) -> int:
        return int(parallel_state.get_pipeline_model_parallel_rank())

    @property
    def context_rank(self) -> int:
        return int(parallel_state.get_context_parallel_rank())

    @property
    def data_rank(self) -> int:
        return int(parallel_state.get_data_parallel_rank())

    @property
    def dp_cp_rank(self) -> int:
        return int(parallel_state.get_data_parallel_rank(with_context_parallel=True))

    @property
    def dp_cp_size(self) -> int:
        return self.data_size * self.context_size

    @property
    def tensor_group(self) -> dist.ProcessGroup:
        return parallel_state.get_tensor_model_parallel_group()

    @property
    def pipeline_group(self) -> dist.ProcessGroup:
        return parallel_state.get_pipeline_model_parallel_group()

    @property
    def context_group(self) -> dist.ProcessGroup:
        return parallel_state.get_context_parallel_group()

    @property
    def data_group(self) -> dist.ProcessGroup:
        return parallel_state.get_data_parallel_group()

    @property
    def dp_cp_group(self) -> dist.ProcessGroup:
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def last_stage_rank(self) -> int:
        """Global rank of this pipeline's last stage."""
        return int(parallel_state.get_pipeline_model_parallel_last_rank())

    def describe(self) -> str:
        parts = [f"TP {self.tensor_size}{' + SP' if self.sequence_parallel else ''}", f"PP {self.pipeline_size}"]
        if self.virtual_stages:
            parts.append(f"VPP {self.virtual_stages}")
        context = f"CP {self.context_size}{f' {self.comm_type}' if self.context_size > 1 else ''}"
        return ", ".join([*parts, context, f"DP {self.data_size}"])


def start_processes(timeout_minutes: int) -> None:
    """Join the process group that torchrun describes in the environment; without torchrun, a group of one process.

    Args:
        timeout_minutes: minutes after which a collective fails.
    """
    if dist.is_initialized():
        return
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    platform.CURRENT.use_local_rank(int(os.environ["LOCAL_RANK"]))
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if int(os.environ["WORLD_SIZE"]) == 1 and "MASTER_PORT" not in os.environ:
        # A single process can use a store in memory, which needs no free port.
        dist.init_process_group(platform.CURRENT.backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        try:
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
                shared = dist.TCPStore(address, port, world, is_master=False, timeout=timeout)
                store = store_of_launch(shared, rank=rank, world=world, timeout=timeout)
                dist.init_process_group(
                    platform.CURRENT.backend, store=store, rank=rank, world_size=world, timeout=timeout
                )
            else:
                dist.init_process_group(platform.CURRENT.backend, timeout=timeout)
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            raise PlatformError(
                f"MASTER_PORT={os.environ.get('MASTER_PORT')} is in use by another program; choose a free one, or start with "
                "torchrun --standalone, which finds one"
            ) from None
        start_heartbeat()


@contextlib.contextmanager
def joined(timeout_minutes: int) -> Iterator[None]:
    """Within this context the process is in a group: one that was there already, or that of ``start_processes``, which ends with
    the context.

    Args:
        timeout_minutes: minutes after which a collective fails.
    """
    is_ours = not dist.is_initialized()
    start_processes(timeout_minutes)
    try:
        yield
    finally:
        if is_ours:
            stop_processes()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within this context the process is a world of its own, whatever the launcher says; before ``start_processes``."""
    platform.CURRENT.use_local_rank(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(platform.CURRENT.backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        stop_processes()


def store_of_launch(
    store: dist.Store, *, rank: int, world: int, timeout: datetime.timedelta = datetime.timedelta(minutes=10)
) -> dist.Store:
    """A part of torchrun's store that only the processes of this launch use; every rank calls it.

    torchrun keeps one store while it starts its processes again (torch 2.13, unless each node's first process makes one,
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE), and the addresses of those that died are still in it: the group would try to reach them.
    The number of the attempt does not tell launches apart, since a node that joins later counts from 0. So rank 0 gives the
    launch a name, and answers only what the ranks have just asked.

    Args:
        store: the store that torchrun shares.
        rank: this rank.
        world: number of ranks.
        timeout: how long to wait for the other ranks.

    Raises:
        PlatformError: a rank did not come.
    """
    mine = uuid.uuid4().hex
    if rank:
        store.set(f"{_LAUNCHES}/asks/{rank}", mine)
        name = store.get(f"{_LAUNCHES}/answers/{mine}").decode()
        store.set(f"{_LAUNCHES}/joined/{name}/{rank}", "1")
        return dist.PrefixStore(f"{_LAUNCHES}/{name}", store)
    missing, answered = set(range(1, world)), set()
    deadline = time.monotonic() + timeout.total_seconds()
    while missing:
        for other in sorted(missing):
            if store.check([f"{_LAUNCHES}/asks/{other}"]):
                question = store.get(f"{_LAUNCHES}/asks/{other}").decode()
                if question not in answered:
                    # It may be that of a process that has died; then the present one asks a little later.
                    store.set(f"{_LAUNCHES}/answers/{question}", mine)
                    answered.add(question)
            if store.check([f"{_LAUNCHES}/joined/{mine}/{other}"]):
                missing.discard(other)
        if time.monotonic() > deadline:
            raise PlatformError(
                f"rank {min(missing)} of {world} did not come within {timeout}; see what its machine is doing, or raise "
                "distributed_timeout_minutes"
            )
        time.sleep(_ASK_SECONDS if missing else 0)
    return dist.PrefixStore(f"{_LAUNCHES}/{mine}", store)


def set_up(
    *,
    tensor: int = 1,
    pipeline: int = 1,
    virtual: int | None = None,
    context: int = 1,
    sequence_parallel: bool = False,
    comm_type: str = "a2a",
    seed: int = 1234,
    timeout_minutes: int = 10,
) -> Parallel:
    """Create all process groups; may be called again with other degrees, as the tests do."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual,
        context_parallel_size=context,
        distributed_timeout_minutes=timeout_minutes,
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    world = dist.get_world_size()
    return Parallel(
        tensor_size=tensor,
        pipeline_size=pipeline,
        virtual_stages=virtual,
        context_size=context,
        data_size=world // (tensor * pipeline * context),
        sequence_parallel=sequence_parallel,
        comm_type=comm_type,
        rank=dist.get_rank(),
        world_size=world,
    )


class _SumOverGroup(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(_ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        return grad, None


def sum_over_group(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Sum in the forward, identity in the backward.

    Every rank computes the same loss from the sum, and the backward has to give each rank the gradient of its own summand
    once. ``torch.distributed.nn.all_reduce`` would give it once per rank.
    """
    if dist.get_world_size(group) == 1:
        return x
    return _SumOverGroup.apply(x, group)


# Of a process that goes through several layouts.
_MANY_THREADS = 100


def destroy_groups() -> None:
    """Destroy all groups but the default one, for a process that goes on with another layout; collective.

    megatron-core 0.16.1 only forgets its groups. gloo keeps three threads per group, 51 per layout, and NCCL its buffers on the
    GPU. Those of a layout end here, unless the distributed optimizer was used, which stays in memory.
    """
    # A rank may still be using a group.
    dist.barrier()
    parallel_state.destroy_model_parallel()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    # Threads end with the last reference to their group, and models hold some in cycles. A collection takes a third of a
    # second in a process with transformers imported.
    if _threads() > _MANY_THREADS:
        gc.collect()


def _threads() -> int:
    with contextlib.suppress(OSError):
        return len(os.listdir("/proc/self/task"))
    return 0


def stop_processes() -> None:
    """Destroy all process groups."""
    stop_heartbeat()
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
