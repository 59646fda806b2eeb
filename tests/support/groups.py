"""Process groups of workers that take one layout after another."""

from __future__ import annotations

import gc
import os

import torch.distributed as dist
from megatron.core import parallel_state


def destroy_groups() -> None:
    """Destroy all groups but the default one.

    megatron-core 0.16.1 only forgets its groups. gloo keeps three threads per group, 51 per layout: a worker of the parity
    matrix ended with hundreds, and a hundred runnable ones at a time. Those of a layout end here, unless the distributed
    optimizer was used, which stays in memory.
    """
    # A rank may still be using a group.
    dist.barrier()
    parallel_state.destroy_model_parallel()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    # Threads end with the last reference to their group, and models hold some in cycles. A collection takes a third of a
    # second in a process with transformers imported.
    if len(os.listdir("/proc/self/task")) > 100:
        gc.collect()
