"""Everything a run needs short of an optimizer: data, model, reference and held-out evaluation."""

from __future__ import annotations

from megatron_longpo.config import Config, pipeline_split
from megatron_longpo.model.gpt import build_model
from megatron_longpo.runtime import platform
from megatron_longpo.runtime.log import log
from megatron_longpo.runtime.process_groups import Parallel
from megatron_longpo.training.batch_runner import BatchRunner
from megatron_longpo.training.checkpointer import load_weights
from megatron_longpo.training.data_set import RunData, mixture_lines, open_data
from megatron_longpo.training.held_out import HeldOut
from megatron_longpo.training.memory import decide_recompute
from megatron_longpo.training.optimization import idle_line, weight_gradients
from megatron_longpo.training.plan import RunPlan, groups_of
from megatron_longpo.training.reference import make_reference


class Session:
    """The parts that training and evaluation share.

    Weights are not loaded and nothing is computed yet: call ``score_reference``, then ``load_weights``.

    Args:
        plan: plan of the run, with its resolved configuration.
        parallel: degrees and groups.
        data: data of the run.
    """

    def __init__(self, plan: RunPlan, parallel: Parallel, data: RunData) -> None:
        self.plan, self.parallel, self.data = plan, parallel, data
        self.chunks = build_model(plan.shape, plan.config, parallel)
        attention = self.chunks[0].attention
        log(f"attention: {attention.kernels.name} ({attention.reason})", active=parallel.rank == 0)
        layers = self.chunks[0].implementation
        gradients = weight_gradients(plan.config, is_transformer_engine=layers.is_transformer_engine)
        log(f"linear layers: {layers.name} ({layers.reason}){gradients}", active=parallel.rank == 0)
        self.runner = BatchRunner(plan, parallel)
        self.reference = make_reference(plan, self.chunks, parallel)
        self.held_out = HeldOut(
            plan, parallel, data=data.held_out, chunks=self.chunks, runner=self.runner, reference=self.reference
        )

    @property
    def config(self) -> Config:
        return self.plan.config

    def score_reference(self) -> None:
        """Prepare the reference; collective. A cached one scores the whole data, which may take hours.

        Afterwards the policy's model may hold the reference's weights.
        """
        train = [] if self.config.training.skip_train else [self.data.train]
        held_out = [] if self.data.held_out is None else [self.data.held_out]
        self.reference.prepare([*train, *held_out])

    def load_weights(self) -> None:
        """Load the weights that training starts from; collective."""
        load_weights(self.plan.load, self.chunks, self.parallel)


def open_session(plan: RunPlan) -> Session:
    """Create the process groups, open the data, and build the model; collective.

    Raises:
        DataError, CheckpointError: a file is missing or damaged.
    """
    parallel = groups_of(plan)
    data = open_data(plan)
    _log_plan(plan, parallel)
    plan = decide_recompute(plan, data.train, parallel)
    return Session(plan, parallel, data)


def _log_plan(plan: RunPlan, parallel: Parallel) -> None:
    shape, data, current = plan.shape, plan.manifest, platform.CURRENT
    lines = [
        f"platform: {current.name} with {current.backend} ({current.reason}); layout: {parallel.describe()} on "
        f"{parallel.world_size} process(es)",
        f"model: {shape.family}, {shape.num_layers} layers, hidden {shape.hidden_size}, vocabulary {shape.vocab_size}, rotary "
        f"base {plan.policy_shape.rotary_base:g} (reference {plan.reference_rotary_base:g})",
        f"data: {data.samples} samples, {data.turns} turns, {data.tokens:,} tokens, longest row {data.longest}; "
        f"{plan.train_iters} steps of {plan.samples_per_step} samples",
    ]
    batch, used = plan.config.training.global_batch_size, plan.train_iters * plan.samples_per_step
    if data.samples < batch:
        lines.append(
            f"data: {data.samples} samples are fewer than global_batch_size={batch}; each step takes all of them, each once"
        )
    elif used < data.samples:
        lines.append(
            f"data: {data.samples - used} of {data.samples} samples are not used, since only whole batches are"
        )
    lines += [f"data: {line}" for line in mixture_lines(plan)]
    if idle := idle_line(plan.config, plan.train_iters):
        lines.append(idle)
    split = pipeline_split(plan.config.parallel, shape.num_layers)
    if len({n for rank in split for n in rank}) > 1:
        ranks = ", ".join("+".join(map(str, rank)) for rank in split)
        lines.insert(1, f"pipeline: {ranks} layers on the ranks")
    if parallel.context_size > 1:
        lines.insert(1, f"context parallelism: cp_comm_type={plan.comm_type} ({plan.comm_reason})")
    for line in lines:
        log(line, active=parallel.rank == 0)
