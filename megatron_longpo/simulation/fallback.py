"""What is left where nothing can be simulated: the estimate of memory that ``recompute_granularity: auto`` goes by."""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_longpo.config import virtual_pipeline_size
from megatron_longpo.data.indexed import PreferenceData
from megatron_longpo.errors import ConfigError
from megatron_longpo.runtime.process_groups import Parallel
from megatron_longpo.simulation.data import plan_of
from megatron_longpo.simulation.request import Card, Request
from megatron_longpo.training import memory
from megatron_longpo.training.batch import policy_layout

_CONTEXT_BYTES = 2**30


@dataclass(frozen=True)
class Estimate:
    """The estimate of a request's peak.

    Attributes:
        layout: degrees of parallelism, in words.
        tokens: places of a micro batch, over all its context-parallel ranks.
        recompute: what is recomputed, in words.
        tensor_bytes: bytes of tensors of the rank at the peak of a step.
        host_bytes: bytes of the host's memory that its activations and its optimizer take beside a GPU.
    """

    layout: str
    tokens: int
    recompute: str
    tensor_bytes: int
    host_bytes: int = 0

    def __str__(self) -> str:
        return (
            f"{self.layout}, {self.tokens:,} tokens per micro batch, recompute: {self.recompute}: about "
            f"{self.tensor_bytes / 2**30:.1f} GiB of tensors at the peak"
        )


def estimate(request: Request, card: Card, *, on_cuda: bool = True, host_memory: int | None = None) -> Estimate:
    """The estimate of a request's peak.

    Args:
        request: what is estimated.
        card: the GPU; without one, its memory is that of a process.
        on_cuda: whether it is for a GPU.
        host_memory: bytes of the host's memory that are free per rank. Default: as many as are wanted.

    Raises:
        LongPOError: as for a training run.
    """
    with tempfile.TemporaryDirectory() as folder:
        plan = plan_of(request, Path(folder))
        assert isinstance(plan.config.data.data_path, str)
        sample = PreferenceData(plan.config.data.data_path, verify=False)[0]
    training, degrees = plan.config.training, plan.config.parallel
    tensor, pipeline = degrees.tensor_model_parallel_size, degrees.pipeline_model_parallel_size
    context = degrees.context_parallel_size
    parallel = Parallel(
        tensor_size=tensor,
        pipeline_size=pipeline,
        virtual_stages=virtual_pipeline_size(degrees, plan.shape.num_layers),
        context_size=context,
        data_size=request.world_size // (tensor * pipeline * context),
        sequence_parallel=degrees.sequence_parallel,
        comm_type=plan.comm_type,
        rank=request.rank,
        world_size=request.world_size,
    )
    layout = policy_layout([sample] * training.micro_batch_size, data=plan.config.data, objective=plan.config.objective)
    sizes: dict[str, Any] = {
        "tokens": layout.length,
        "num_microbatches": training.global_batch_size // (parallel.data_size * training.micro_batch_size),
        "on_cuda": on_cuda,
    }
    recompute = "as configured"
    if training.recompute_granularity == "auto":
        found = memory.choices(plan.shape, plan.config, parallel, pairs=layout.attention_pairs, stage=None, **sizes)
        if host_memory is not None:
            room = memory.host_room(host_memory, plan.shape, plan.config, parallel)
            found = [c for c in found if c.host_bytes <= room]
        available = card.memory_bytes - _CONTEXT_BYTES
        choice = memory.choose(found, [memory.free_bytes(c, available) for c in found])
        training, recompute = choice.applied_to(training), str(choice)
    # Ranks of a stage are consecutive.
    stage = request.rank // (request.world_size // pipeline)
    chosen = dataclasses.replace(plan.config, training=training)
    tensors = memory.step_bytes(plan.shape, chosen, parallel, stage=stage, **sizes)
    if tensors is None:
        raise ConfigError(
            f"recompute_modules={','.join(training.recompute_modules)} is not in the estimate; use recompute_granularity=auto, "
            "none, full, or selective with mlp_up"
        )
    del sizes["on_cuda"]
    waiting = memory.host_bytes(plan.shape, chosen, parallel, stage=stage, **sizes) if on_cuda else 0
    return Estimate(parallel.describe(), layout.length, recompute, tensors.total, waiting)
