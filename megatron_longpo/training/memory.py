"""How much memory a step needs, and what its backward recomputes: ``recompute_granularity=auto``.

More than half of what a layer saves is the output of the MLP's up-projection (``mlp_up``). Recomputing it costs one matmul of
that width in nine: a tenth of all operations at a few thousand tokens, and a smaller share as attention grows. So it is
recomputed wherever it costs no more than that (``CHEAP``). Going further, recomputing whole layers costs a third of the linear
layers' time and more of the attention's; that is done only as far as memory demands, for as many layers of a stage as are
needed (``full``, method ``block``).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
import torch.distributed as dist

from megatron_longpo.config import Config, TrainingConfig, pipeline_split
from megatron_longpo.data.sequence import SequenceLayout
from megatron_longpo.model.gpt import padded_vocab_size
from megatron_longpo.model.shape import ModelShape
from megatron_longpo.runtime import platform
from megatron_longpo.runtime.log import log
from megatron_longpo.runtime.process_groups import Parallel
from megatron_longpo.training.activations import Activations, PeakBytes
from megatron_longpo.training.batch import policy_layout
from megatron_longpo.training.data_set import DataSet
from megatron_longpo.training.objective import spec_of
from megatron_longpo.training.plan import RunPlan
from megatron_longpo.training.rerun import RECORD_BYTES

# What the estimate leaves out: the interpreter and its libraries, communication buffers, fragmentation.
_RESERVE_BYTES = 2**30
_USABLE = 0.9

# Largest share of a step's operations that is recomputed without need.
CHEAP = 0.1

# Operations that a GPU does while it copies a byte to host memory: 600 TFLOP/s, more than any step here has reached, beside
# 20 GB/s, less than PCIe 4.0 with 16 lanes gives.
FLOPS_PER_COPIED_BYTE = 30_000
# Share of the host's free memory that activations and the optimizer may take. torch rounds pinned memory up to powers of two.
HOST_SHARE, PINNED_ROUNDING = 0.5, 2

# How many of the most expensive samples are laid out to find the longest micro batch.
_MEASURED_SAMPLES = 4


@dataclass(frozen=True)
class Choice:
    """A way to train, and what it costs.

    Attributes:
        granularity: value of ``recompute_granularity``.
        modules: value of ``recompute_modules``.
        layers: value of ``recompute_num_layers``.
        bytes_needed: estimated peak memory of a rank.
        extra: floating-point operations that are recomputed, as a share of those of a step.
        offloaded: value of ``cpu_offloading_num_layers``.
        host_bytes: estimated memory of the host that a rank takes for them.
    """

    granularity: str
    modules: tuple[str, ...]
    layers: int
    bytes_needed: int
    extra: float
    offloaded: int = 0
    host_bytes: int = 0

    def applied_to(self, training: TrainingConfig) -> TrainingConfig:
        training = dataclasses.replace(training, cpu_offloading_num_layers=self.offloaded)
        if self.granularity == "none":
            return dataclasses.replace(training, recompute_granularity="none")
        if self.granularity == "selective":
            return dataclasses.replace(training, recompute_granularity="selective", recompute_modules=self.modules)
        return dataclasses.replace(
            training,
            recompute_granularity="full",
            recompute_method="block",
            recompute_num_layers=self.layers,
            recompute_modules=self.modules,
        )

    def __str__(self) -> str:
        offloaded = f"; activations of {self.offloaded} layer(s) of each stage in host memory" if self.offloaded else ""
        if self.granularity == "none":
            return f"nothing{offloaded}"
        if self.granularity == "selective":
            return f"the MLPs' up-projections{offloaded}"
        return f"{self.layers} layer(s) of each stage, and the MLPs' up-projections of the others{offloaded}"


@dataclass(frozen=True)
class StaticBytes:
    """What a rank holds from the first step to the last.

    Attributes:
        parameters: number of weights of this rank.
        weights: bytes of the weights, those of an online reference on the device included.
        gradients, optimizer: bytes of gradients and optimizer states.
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class StepBytes:
    """Bytes of tensors of a rank at the peak of a step."""

    static: StaticBytes
    activations: PeakBytes

    @property
    def total(self) -> int:
        return self.static.total + self.activations.total


def decide_recompute(plan: RunPlan, data: DataSet, parallel: Parallel) -> RunPlan:
    """Replace ``recompute_granularity=auto`` by a decision that is the same on all ranks, since they exchange in the same
    order; collective.

    Args:
        plan: plan of the run.
        data: data that is trained on.
        parallel: degrees and groups.

    Returns:
        The plan with the resolved configuration.
    """
    training = plan.config.training
    if training.recompute_granularity != "auto":
        return plan
    if training.skip_train:
        # Nothing is saved for a backward.
        return _with_training(plan, dataclasses.replace(training, recompute_granularity="none"))
    micro_batch = longest_micro_batch(plan.config, data)
    tokens = sum(layout.length for layout in micro_batch)
    found = choices(
        plan.shape,
        plan.config,
        parallel,
        tokens=tokens,
        pairs=sum(layout.attention_pairs for layout in micro_batch),
        num_microbatches=training.global_batch_size // (parallel.data_size * training.micro_batch_size),
        stage=None,
    )
    # The processes of a node share its memory, but each has a GPU of its own.
    sharing = 1 if platform.CURRENT.is_cuda else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    on_host = platform.CURRENT.host_memory_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    on_host = host_room(on_host, plan.shape, plan.config, parallel)
    least = torch.tensor([platform.CURRENT.available_memory_bytes() // sharing, on_host]).to(platform.CURRENT.device)
    # The processes of a node have not all allocated the same when they measure: the tightest rank counts.
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    available, on_host = least.tolist()
    found = [c for c in found if c.host_bytes <= on_host]
    choice = choose(found, [free_bytes(c, available) for c in found])
    need, have = choice.bytes_needed / 2**30, available / 2**30
    log(
        f"recompute: {choice} (estimate {need:.1f} GB of {have:.1f} GB available per process, longest micro batch {tokens} "
        f"tokens, {choice.extra:.0%} more operations)",
        active=parallel.rank == 0,
    )
    if need > have:
        log(
            "recompute: the estimate does not fit even so; raise context_parallel_size or tensor_model_parallel_size, set "
            "use_distributed_optimizer, or preprocess with a smaller --seq-length",
            active=parallel.rank == 0,
        )
    return _with_training(plan, choice.applied_to(training))


def _with_training(plan: RunPlan, training: TrainingConfig) -> RunPlan:
    return dataclasses.replace(plan, config=dataclasses.replace(plan.config, training=training))


def longest_micro_batch(config: Config, data: DataSet) -> list[SequenceLayout]:
    """Layouts of the samples of the longest micro batch there could be.

    Costs are those of chained rows. For independent turns they are only an approximation, so several of the most expensive
    samples are laid out and measured.
    """
    size = config.training.micro_batch_size
    most_expensive = np.argsort(data.costs)[::-1][: max(_MEASURED_SAMPLES, size)]
    layouts = [
        policy_layout([sample], data=config.data, objective=config.objective) for sample in data.samples(most_expensive)
    ]
    return sorted(layouts, key=lambda layout: layout.length)[-size:]


def choices(
    shape: ModelShape,
    config: Config,
    parallel: Parallel,
    *,
    tokens: int,
    pairs: int,
    num_microbatches: int,
    stage: int | None,
    on_cuda: bool | None = None,
) -> list[Choice]:
    """All ways to recompute and to wait in host memory, fewest operations first.

    Args:
        shape: shape of the model.
        config: configuration of the run.
        parallel: degrees.
        tokens: places of the longest micro batch, over all its context-parallel ranks.
        pairs: query-key pairs of that micro batch.
        num_microbatches: micro batches per step.
        stage: pipeline rank; None: for each choice the one that needs most.
        on_cuda: whether the run is on GPUs. Default: whether this process has one.
    """
    split = pipeline_split(config.parallel, shape.num_layers)
    stages = range(parallel.pipeline_size) if stage is None else (stage,)
    largest = max(n for rank in split for n in rank)
    # Floating-point operations of a layer's forward.
    linear, attention = 2.0 * tokens * shape.layer_weights, 4.0 * pairs * shape.query_width
    up = 2 * 2 * shape.hidden_size * shape.ffn_hidden_size * tokens
    # The backward takes twice the linear layers, and five matmuls for the attention's two.
    step = 3 * linear + 3.5 * attention

    on_cuda = platform.CURRENT.is_cuda if on_cuda is None else on_cuda
    wanted = config.training.cpu_offloading_num_layers
    activations = Activations(shape, config, parallel, tokens=tokens, is_first=True, is_last=True, on_cuda=on_cuda)
    in_flight = max(in_flight_forwards(config, shape, parallel, num_microbatches, each) for each in stages)
    sharing = parallel.tensor_size * parallel.context_size

    def choice(granularity: str, modules: tuple[str, ...], layers: int, extra: float, offloaded: int = 0) -> Choice:
        kept = activations.kept(recompute_up="mlp_up" in modules)
        host_bytes = PINNED_ROUNDING * offloaded * kept * in_flight
        found = Choice(granularity, modules, layers, 0, extra, offloaded, host_bytes)
        chosen = dataclasses.replace(config, training=found.applied_to(config.training))
        sizes = {"tokens": tokens, "num_microbatches": num_microbatches, "on_cuda": on_cuda}
        tensors = [step_bytes(shape, chosen, parallel, stage=each, **sizes) for each in stages]  # type: ignore[arg-type]
        return dataclasses.replace(found, bytes_needed=max(n.total for n in tensors if n is not None) + _RESERVE_BYTES)

    def with_offloading(granularity: str, modules: tuple[str, ...], extra: float) -> list[Choice]:
        """Without whole layers recomputed: as many layers in host memory as wanted, or any number if it costs no time."""
        kept = activations.kept(recompute_up="mlp_up" in modules)
        is_hidden = on_cuda and (linear + attention) / sharing >= FLOPS_PER_COPIED_BYTE * kept
        # What is saved would include FP8 copies of weights (config._check_fp8).
        is_hidden = is_hidden and config.training.fp8_format is None
        counts = range(largest if is_hidden else 1) if wanted is None else (min(wanted, largest - 1),)
        # Fewer are better, though it makes no difference in operations.
        return [choice(granularity, modules, 0, extra + 1e-9 * n, n) for n in counts]

    found = with_offloading("selective", ("mlp_up",), up / step)
    if up / step > CHEAP:
        found += with_offloading("none", (), 0.0)
    # The same choices, in the same order, on all ranks, whatever their numbers of layers.
    for layers in range(1, largest + 1):
        share = sum(min(layers, n) for rank in split for n in rank) / shape.num_layers
        extra = (share * (linear + attention) + (1 - share) * up) / step
        found.append(choice("full", ("mlp_up",), layers, extra, max(0, min(wanted or 0, largest - layers - 1))))
    return sorted(found, key=lambda c: c.extra)


def step_bytes(
    shape: ModelShape,
    config: Config,
    parallel: Parallel,
    *,
    tokens: int,
    num_microbatches: int,
    stage: int,
    on_cuda: bool | None = None,
) -> StepBytes | None:
    """Estimate the most bytes of tensors in a step of one rank.

    Args:
        shape, config, parallel, tokens, num_microbatches, stage, on_cuda: as for ``choices``.

    Returns:
        The bytes by part; None if the configuration recomputes something that the estimate does not know.
    """
    training = config.training
    if training.recompute_granularity == "auto":
        return None
    if training.recompute_granularity == "selective" and set(training.recompute_modules) != {"mlp_up"}:
        return None
    is_full, is_uniform = training.recompute_granularity == "full", training.recompute_method == "uniform"
    if is_full and is_uniform and training.recompute_num_layers > 1:
        return None
    found = StageMemory.of(
        shape, config, parallel, tokens=tokens, num_microbatches=num_microbatches, stage=stage, on_cuda=on_cuda
    )
    return found.peak(**found.recomputed(training))


class Recomputed(TypedDict):
    """What is recomputed and what waits in host memory; see ``StageMemory.peak``."""

    whole_layers: int
    recompute_up: bool
    offloaded: int


@dataclass(frozen=True)
class StageMemory:
    """What the estimate needs of a pipeline rank, whatever is recomputed there.

    Attributes:
        static: what is held from the first step to the last.
        activations: bytes of one micro batch.
        layers: layers of its largest virtual stage, which stands for all of them.
        in_flight: forwards of virtual stages whose backward is outstanding when most of them are.
        received: those of them whose input came from another stage.
        update: what the optimizer's update makes for itself.
        records: what two computations of a micro batch leave to be compared.
    """

    static: StaticBytes
    activations: Activations
    layers: int
    in_flight: int
    received: int
    update: PeakBytes
    records: int

    @classmethod
    def of(
        cls,
        shape: ModelShape,
        config: Config,
        parallel: Parallel,
        *,
        tokens: int,
        num_microbatches: int,
        stage: int,
        on_cuda: bool | None = None,
    ) -> StageMemory:
        """The arguments are those of ``choices``."""
        on_cuda = platform.CURRENT.is_cuda if on_cuda is None else on_cuda
        last = stage == parallel.pipeline_size - 1
        static = static_bytes(shape, config, parallel, stage, on_cuda=on_cuda)
        in_flight = in_flight_forwards(config, shape, parallel, num_microbatches, stage)
        activations = Activations(
            shape, config, parallel, tokens=tokens, is_first=not stage, is_last=last, on_cuda=on_cuda
        )
        split = pipeline_split(config.parallel, shape.num_layers)[stage]
        return cls(
            static,
            activations,
            max(split),
            in_flight,
            # Only the very first virtual stage receives nothing.
            in_flight if stage or parallel.virtual_stages else 0,
            PeakBytes(update=_update_bytes(static, shape, config, parallel, stage, on_cuda=on_cuda)),
            _record_bytes(static, activations, config, parallel, layers=sum(split)) if on_cuda else 0,
        )

    def recomputed(self, training: TrainingConfig) -> Recomputed:
        """What a configuration recomputes, as the arguments of ``peak`` and ``waiting``; it is decided, not ``auto``."""
        whole = 0
        if training.recompute_granularity == "full":
            whole = self.layers if training.recompute_method == "uniform" else training.recompute_num_layers
        return Recomputed(
            whole_layers=whole,
            recompute_up=training.recompute_granularity != "none" and "mlp_up" in training.recompute_modules,
            offloaded=training.cpu_offloading_num_layers or 0,
        )

    def peak(self, *, whole_layers: int, recompute_up: bool, offloaded: int) -> StepBytes:
        """Most bytes of a step.

        Args:
            whole_layers: layers of each virtual stage that are recomputed as a whole; those that a stage has, at most.
            recompute_up: whether the others recompute their MLP's first product.
            offloaded: layers of each virtual stage whose activations wait in host memory; all but one of the others, at most.
        """
        peak = self.activations.peak(
            self.layers,
            whole_layers=min(whole_layers, self.layers),
            recompute_up=recompute_up,
            in_flight=self.in_flight,
            received=self.received,
            offloaded=self._offloaded(whole_layers, offloaded),
        )
        peak = dataclasses.replace(peak, records=self.records)
        return StepBytes(self.static, max(peak, self.update, key=lambda moment: moment.total))

    def waiting(self, *, whole_layers: int, recompute_up: bool, offloaded: int) -> int:
        """Bytes of activations that wait in host memory; the arguments are those of ``peak``."""
        kept = self.activations.kept(recompute_up=recompute_up)
        return PINNED_ROUNDING * self._offloaded(whole_layers, offloaded) * self.in_flight * kept

    def _offloaded(self, whole_layers: int, offloaded: int) -> int:
        return max(0, min(offloaded, self.layers - min(whole_layers, self.layers) - 1))


def _record_bytes(
    static: StaticBytes, activations: Activations, config: Config, parallel: Parallel, *, layers: int
) -> int:
    """What the values and gradients of two computations leave to be compared; bits leave nothing."""
    if config.faults.check_rerun_interval is None or config.training.deterministic_mode:
        return 0
    # An interleaved schedule takes micro batches by as many as there are stages.
    micro_batches = parallel.pipeline_size if parallel.virtual_stages else 1
    values = micro_batches * activations.compared_values(layers) + static.parameters
    return int(2 * RECORD_BYTES * values)


def _update_bytes(
    static: StaticBytes, shape: ModelShape, config: Config, parallel: Parallel, stage: int, *, on_cuda: bool
) -> int:
    """What the optimizer's update makes for itself.

    Weight by weight, RMSProp makes the root of the second moment, and Adam another number besides, while it still holds the root
    of the weight before. On CUDA torch's Adam makes the roots of all weights at once; not of simulated tensors, whose class it
    does not know.
    """
    shards = parallel.dp_cp_size if config.parallel.use_distributed_optimizer else 1
    share = static.parameters // shards
    mlp = largest = 2 * shape.hidden_size * shape.ffn_hidden_size // parallel.tensor_size
    if stage in (0, parallel.pipeline_size - 1):
        largest = max(largest, _vocabulary(shape, config, parallel))
    largest = min(share, largest)
    each = 4 * _states(config) * largest
    if config.optimizer.optimizer == "adam":
        each += 4 * min(share - largest, mlp)
        each = max(each, 4 * share) if on_cuda else each
    return int(each * (1 - offloaded_fraction(config)))


def _vocabulary(shape: ModelShape, config: Config, parallel: Parallel) -> int:
    """Weights of this rank's part of the embedding, or of the output."""
    padded = padded_vocab_size(shape.vocab_size, config.model.make_vocab_size_divisible_by, parallel.tensor_size)
    return padded * shape.hidden_size // parallel.tensor_size


def _states(config: Config) -> int:
    """Numbers per weight that the optimizer keeps."""
    return 1 if config.optimizer.optimizer == "rmsprop" else 2


def host_optimizer_bytes(parameters: int, config: Config, parallel: Parallel) -> int:
    """Host memory that a rank takes with ``optimizer_cpu_offload``: of its share, fp32 weights, states, and gradients in pinned
    memory. Weights that are trained in fp32 are pinned as well; an fp32 copy of bf16 weights is not."""
    share = config.optimizer.optimizer_offload_fraction * parameters / parallel.dp_cp_size
    weights = 1 if config.training.bf16 else PINNED_ROUNDING
    return int(share * 4 * (weights + _states(config) + PINNED_ROUNDING))


def host_room(free: int, shape: ModelShape, config: Config, parallel: Parallel) -> int:
    """Bytes of the host's memory that a rank's activations may take: its half, less what the optimizer will put there.

    Args:
        free: a rank's share of the host's memory that is free before the optimizer is made.
        shape, config, parallel: as for ``choices``.
    """
    room = int(HOST_SHARE * free)
    if config.optimizer.optimizer_cpu_offload:
        stages = range(parallel.pipeline_size)
        weights = max(static_bytes(shape, config, parallel, stage).parameters for stage in stages)
        room -= host_optimizer_bytes(weights, config, parallel)
    return max(0, room)


def offloaded_fraction(config: Config) -> float:
    """Share of the optimizer's states, and of its update, that is the host's."""
    optimizer = config.optimizer
    return optimizer.optimizer_offload_fraction if optimizer.optimizer_cpu_offload else 0.0


def free_bytes(choice: Choice, available: int) -> float:
    """Bytes that a choice leaves free of what is available; negative if it does not fit."""
    return _USABLE * available - choice.bytes_needed


def choose(found: Sequence[Choice], free: Sequence[float]) -> Choice:
    """The cheapest choice that fits, or the closest to fitting if none does.

    Args:
        found: all choices, fewest operations first.
        free: for each choice, what the tightest rank has left.
    """
    for choice, left in zip(found, free, strict=True):
        if left >= 0:
            return choice
    return found[max(range(len(found)), key=lambda i: free[i])]


def static_bytes(
    shape: ModelShape, config: Config, parallel: Parallel, stage: int, *, on_cuda: bool | None = None
) -> StaticBytes:
    """Weights, gradients and optimizer states of a rank in bytes."""
    tensor, hidden = parallel.tensor_size, shape.hidden_size
    layer = shape.layer_weights // tensor + 2 * hidden
    if shape.add_qkv_bias:
        layer += (shape.query_width + 2 * shape.kv_width) // tensor
    if shape.qk_layernorm:
        layer += 2 * shape.kv_channels
    vocabulary = _vocabulary(shape, config, parallel)
    first, last = stage == 0, stage == parallel.pipeline_size - 1
    is_shared = first and last and not shape.untie_embeddings_and_output_weights
    num_layers = sum(pipeline_split(config.parallel, shape.num_layers)[stage])
    parameters = num_layers * layer + vocabulary * (first + last - is_shared) + hidden * last
    bf16 = config.training.bf16
    # Adam's two states or RMSProp's one, and an fp32 master copy where the weights are not fp32.
    states = (4 * _states(config) + (4 if bf16 else 0)) * parameters
    on_cuda = platform.CURRENT.is_cuda if on_cuda is None else on_cuda
    if config.parallel.use_distributed_optimizer:
        states //= parallel.dp_cp_size
    if on_cuda:
        states = int(states * (1 - offloaded_fraction(config)))
    # An online reference is a second model, or takes the place of the policy's weights, of which a copy waits on the host.
    has_reference = spec_of(config.objective.objective, config.objective.loss_type).reference_rows is not None
    is_beside = config.reference.reference_model == "resident" or not on_cuda
    copies = 2 if config.reference.reference == "online" and has_reference and is_beside else 1
    weights = (2 if bf16 else 4) * parameters * copies
    gradients = (2 if config.parallel.grad_reduce_in_bf16 else 4) * parameters
    return StaticBytes(parameters=parameters, weights=weights, gradients=gradients, optimizer=states)


def host_bytes(
    shape: ModelShape,
    config: Config,
    parallel: Parallel,
    *,
    tokens: int,
    num_microbatches: int,
    stage: int,
) -> int:
    """Bytes of the host's memory that activations and the optimizer of a rank with a GPU take.

    Args:
        shape, config, parallel, tokens, num_microbatches, stage: as for ``choices``; the recomputation is decided.
    """
    found = StageMemory.of(
        shape, config, parallel, tokens=tokens, num_microbatches=num_microbatches, stage=stage, on_cuda=True
    )
    needed = found.waiting(**found.recomputed(config.training))
    if config.optimizer.optimizer_cpu_offload:
        needed += host_optimizer_bytes(found.static.parameters, config, parallel)
    return needed


def in_flight_forwards(config: Config, shape: ModelShape, parallel: Parallel, num_microbatches: int, stage: int) -> int:
    """Forwards of model chunks of a rank whose backward is outstanding, when most of them are."""
    virtual = len(pipeline_split(config.parallel, shape.num_layers)[0])
    return min(_chunks_in_flight(parallel.pipeline_size, virtual, stage), num_microbatches * virtual)


def _chunks_in_flight(pipeline: int, virtual: int, stage: int) -> int:
    """Largest number of forwards of model chunks whose backward is still outstanding (1F1B, arXiv 2104.04473, 2.2)."""
    if virtual == 1:
        return pipeline - stage
    return (pipeline - stage - 1) * 2 + (virtual - 1) * pipeline + 1
