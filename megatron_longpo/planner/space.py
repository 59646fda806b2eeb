"""All layouts of a run that the trainer takes.

Degrees are divisors, so their number grows with the logarithm of the world. What the trainer refuses is not asked twice: every
candidate goes through the trainer's own checks (``config.check_against_model``, ``attention.check_ulysses``,
``fp8.check_fp8_widths``).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_longpo.config import (
    Config,
    ParallelConfig,
    TrainingConfig,
    check_against_model,
    data_parallel_size,
    pipeline_split,
    virtual_pipeline_size,
)
from megatron_longpo.errors import ConfigError
from megatron_longpo.model.attention import resolve_comm_type
from megatron_longpo.model.fp8 import check_fp8_widths
from megatron_longpo.model.shape import ModelShape
from megatron_longpo.runtime.process_groups import Parallel

# Beyond this, larger micro batches make no product faster at the lengths that this project is for.
_LARGEST_MICRO_BATCH = 8

STAGES = (
    "num_layers_per_virtual_pipeline_stage",
    "virtual_pipeline_model_parallel_size",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)
RECOMPUTE = ("recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules")
LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "sequence_parallel",
    "cp_comm_type",
    "use_distributed_optimizer",
    *STAGES,
)
CHOSEN = (*LAYOUT, "micro_batch_size", *RECOMPUTE, "cpu_offloading_num_layers", "optimizer_cpu_offload")
"""Fields of ``parallel``, ``training`` and ``optimizer`` that the planner chooses unless they are given."""


@dataclass(frozen=True)
class Candidate:
    """A layout for a world.

    Attributes:
        config: configuration of the run with this layout; what is recomputed is still open.
        parallel: its degrees, as the trainer has them.
        split: layers of each virtual stage of each pipeline rank.
        micro_batches: micro batches per step.
    """

    config: Config
    parallel: Parallel
    split: tuple[tuple[int, ...], ...]
    micro_batches: int

    @property
    def micro_batch_size(self) -> int:
        return self.config.training.micro_batch_size

    def describe(self) -> str:
        """The layout in words."""
        words = self.parallel.describe()
        sizes = {sum(rank) for rank in self.split}
        if len(sizes) > 1:
            words += f", layers {'+'.join(str(sum(rank)) for rank in self.split)}"
        if self.micro_batch_size > 1:
            words += f", micro batch {self.micro_batch_size}"
        return words


def candidates(config: Config, shape: ModelShape, world_size: int, given: frozenset[str]) -> Iterator[Candidate]:
    """All candidates.

    Args:
        config: configuration of the run.
        shape: shape of the model.
        world_size: number of GPUs.
        given: fields that keep their value.
    """
    base = config.parallel
    for tensor in _sizes("tensor_model_parallel_size", base, given, _divisors(world_size)):
        # The trainer's rule, here as well since it excludes most divisors at once.
        if shape.num_attention_heads % tensor or shape.num_query_groups % tensor:
            continue
        for pipeline in _sizes("pipeline_model_parallel_size", base, given, _divisors(world_size // tensor)):
            if pipeline > shape.num_layers or world_size % (tensor * pipeline):
                continue
            left = world_size // (tensor * pipeline)
            for context in _sizes("context_parallel_size", base, given, _divisors(left)):
                if left % context:
                    continue
                degrees = dataclasses.replace(
                    base,
                    tensor_model_parallel_size=tensor,
                    pipeline_model_parallel_size=pipeline,
                    context_parallel_size=context,
                )
                for layout in _layouts(degrees, shape, given, data=left // context):
                    yield from _micro_batches(dataclasses.replace(config, parallel=layout), shape, world_size, given)


def candidate_of(config: Config, shape: ModelShape, world_size: int) -> Candidate:
    """The candidate that a configuration is.

    Raises:
        ConfigError: the trainer does not take it.
    """
    parallel, training = config.parallel, config.training
    check_against_model(
        config,
        world_size=world_size,
        num_layers=shape.num_layers,
        attention_heads=shape.num_attention_heads,
        key_value_heads=shape.num_query_groups,
    )
    if training.fp8_format is not None:
        check_fp8_widths(shape, parallel.tensor_model_parallel_size)
    comm_type, _ = resolve_comm_type(
        parallel.cp_comm_type,
        shape.num_attention_heads,
        shape.num_query_groups,
        parallel.context_parallel_size,
        parallel.tensor_model_parallel_size,
    )
    data = data_parallel_size(config, world_size)
    return Candidate(
        config,
        Parallel(
            tensor_size=parallel.tensor_model_parallel_size,
            pipeline_size=parallel.pipeline_model_parallel_size,
            virtual_stages=virtual_pipeline_size(parallel, shape.num_layers),
            context_size=parallel.context_parallel_size,
            data_size=data,
            sequence_parallel=parallel.sequence_parallel,
            comm_type=comm_type,
            rank=0,
            world_size=world_size,
        ),
        pipeline_split(parallel, shape.num_layers),
        training.global_batch_size // (training.micro_batch_size * data),
    )


def _layouts(
    degrees: ParallelConfig, shape: ModelShape, given: frozenset[str], *, data: int
) -> Iterator[ParallelConfig]:
    """Settings beside the degrees: sequence parallelism, exchange, optimizer, stages."""
    tensor, context = degrees.tensor_model_parallel_size, degrees.context_parallel_size
    sequence = [degrees.sequence_parallel] if "sequence_parallel" in given else [True, False]
    sequence = [on for on in sequence if not on or tensor > 1]
    comm = [degrees.cp_comm_type]
    if "cp_comm_type" not in given or degrees.cp_comm_type == "auto":
        comm = ["a2a", "allgather"] if context > 1 else ["auto"]
    sharded = degrees.use_distributed_optimizer
    if "use_distributed_optimizer" not in given:
        # It costs nothing: as many bytes are exchanged.
        sharded = sharded or data * context > 1
    for stages in _stages(degrees, shape, given):
        for on in sequence:
            for name in comm:
                yield dataclasses.replace(
                    degrees,
                    sequence_parallel=on,
                    cp_comm_type=name,
                    use_distributed_optimizer=sharded,
                    **stages,  # type: ignore[arg-type]
                )


def _stages(
    degrees: ParallelConfig, shape: ModelShape, given: frozenset[str]
) -> Iterator[dict[str, int | bool | None]]:
    """Ways to divide the layers among pipeline ranks, virtual stages included."""
    pipeline = degrees.pipeline_model_parallel_size
    if any(name in given for name in STAGES):
        yield {}
        return
    plain: dict[str, int | bool | None] = {
        **dict.fromkeys(STAGES[:4], None),
        **dict.fromkeys(STAGES[4:], False),
    }
    if pipeline == 1:
        yield plain
        return
    seen = set()
    for embedding, loss in ((False, False), (False, True), (True, True), (True, False)):
        units = shape.num_layers + embedding + loss
        if units % pipeline:
            continue
        stages = {**plain, STAGES[4]: embedding, STAGES[5]: loss}
        for virtual in _divisors(units // pipeline):
            # The embedding and the loss take the place of a layer, and every stage needs one.
            if units // pipeline // virtual <= (embedding or loss):
                continue
            found = {**stages, "virtual_pipeline_model_parallel_size": virtual if virtual > 1 else None}
            # Counted or not, few layers may be divided alike.
            split = pipeline_split(dataclasses.replace(degrees, **found), shape.num_layers)  # type: ignore[arg-type]
            if split not in seen:
                seen.add(split)
                yield found


def _micro_batches(config: Config, shape: ModelShape, world_size: int, given: frozenset[str]) -> Iterator[Candidate]:
    training = config.training
    sizes = [training.micro_batch_size]
    if "micro_batch_size" not in given:
        parallel = config.parallel
        model = (
            parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
        )
        each, left = divmod(training.global_batch_size, world_size // model)
        if left or not each:
            return
        sizes = [n for n in _divisors(each) if n <= _LARGEST_MICRO_BATCH]
    for size in sizes:
        sized = config if size == training.micro_batch_size else _with_size(config, size)
        try:
            yield candidate_of(sized, shape, world_size)
        except ConfigError:
            continue


def _with_size(config: Config, size: int) -> Config:
    training: TrainingConfig = dataclasses.replace(config.training, micro_batch_size=size)
    return dataclasses.replace(config, training=training)


def _sizes(name: str, base: ParallelConfig, given: frozenset[str], sizes: list[int]) -> list[int]:
    return [getattr(base, name)] if name in given else sizes


@functools.cache
def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})
