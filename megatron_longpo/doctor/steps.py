"""One LongPO step of a tiny model, in every layout that the ranks allow, against one process in fp32.

Each rank first takes the step by itself, as a world of one (``Workshop.prepare``): this is what layouts are compared with, and
ranks whose own numbers differ from the others' have a card that computes wrong. Then they take it together. The code is the
trainer's: plan, session, reference, DDP, optimizer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_longpo.checkpoint.checksums import write_checksums
from megatron_longpo.checkpoint.saving import start_save
from megatron_longpo.config import Config, from_dict
from megatron_longpo.doctor.bounds import bounds_of
from megatron_longpo.doctor.canonical import canonical, gather_gradient_shards
from megatron_longpo.doctor.examination import Check
from megatron_longpo.doctor.findings import Line, by_error
from megatron_longpo.doctor.ranks import Ranks
from megatron_longpo.errors import ConfigError
from megatron_longpo.model.attention import check_ulysses
from megatron_longpo.model.gpt import PolicyModel, build_model
from megatron_longpo.model.shape import ModelShape
from megatron_longpo.runtime import platform, process_groups
from megatron_longpo.runtime.collectives import all_gather_objects
from megatron_longpo.runtime.log import LOGGER
from megatron_longpo.runtime.process_groups import destroy_groups
from megatron_longpo.simulation.data import made_up_sample, write_samples
from megatron_longpo.training.checkpointer import weights_state
from megatron_longpo.training.plan import make_plan
from megatron_longpo.training.session import open_session
from megatron_longpo.training.trainer import Trainer, start_training

# Eight key-value heads and four layers: TP and a2a up to 8 ranks, PP up to 4. A bias and an output layer of its own.
SHAPE = ModelShape(
    family="qwen2",
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=16,
    num_query_groups=8,
    kv_channels=16,
    vocab_size=250,
    layernorm_epsilon=1e-5,
    add_qkv_bias=True,
    untie_embeddings_and_output_weights=True,
    rotary_base=1e4,
    max_position_embeddings=1024,
    weights_hash="doctor",
)
# Tokens of the chosen rows, turns, and tokens of an answer.
_SAMPLES = ((150, 1, 20), (230, 2, 24), (120, 1, 17), (190, 1, 40))
_HANG = (
    "a collective of this layout hangs, while each by itself did not: run with CUDA_LAUNCH_BLOCKING=1 and "
    "TORCH_NCCL_BLOCKING_WAIT=1, and report it; other layouts are not affected"
)
_WRONG = "do not train in this layout; if lines above it fail, mend those first, else report it"


NOT_READY = "a rank could not take the step by itself"


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism.

    Attributes:
        name: for people.
        parallel: section ``parallel`` of a configuration.
        kinds: kinds of parallelism that it combines.
    """

    name: str
    parallel: dict[str, Any]
    kinds: int = 0


def layouts(world_size: int) -> list[Layout]:
    """Every layout of ``SHAPE`` that a number of ranks allows; those with one kind of parallelism first.

    TP comes with sequence parallelism, and alone also without; PP of two also interleaved; CP in both forms where heads divide.
    """
    found: list[Layout] = []
    for tensor in _divisors(world_size, SHAPE.num_query_groups):
        for pipeline in _divisors(world_size // tensor, SHAPE.num_layers):
            for context in _divisors(world_size // tensor // pipeline):
                data = world_size // tensor // pipeline // context
                kinds = sum(n > 1 for n in (tensor, pipeline, context, data))
                for sequence in [False, True] if kinds == 1 and tensor > 1 else [tensor > 1]:
                    for comm in _comm_types(context, tensor):
                        for interleaved in [False, True] if pipeline == 2 else [False]:
                            parallel = {
                                "tensor_model_parallel_size": tensor,
                                "sequence_parallel": sequence,
                                "pipeline_model_parallel_size": pipeline,
                                "num_layers_per_virtual_pipeline_stage": 1 if interleaved else None,
                                "context_parallel_size": context,
                                "cp_comm_type": comm,
                                "use_distributed_optimizer": context * data > 1,
                            }
                            found.append(Layout(_name(parallel, data), parallel, kinds))
    return sorted(found, key=lambda layout: layout.kinds)


def _divisors(number: int, also: int | None = None) -> list[int]:
    """Divisors, of another number as well if there is one."""
    return [n for n in range(1, number + 1) if number % n == 0 and (also is None or also % n == 0)]


def _comm_types(context: int, tensor: int) -> list[str]:
    if context == 1:
        return ["auto"]
    try:
        check_ulysses(SHAPE.num_attention_heads, SHAPE.num_query_groups, context, tensor)
    except ConfigError:
        return ["allgather"]
    return ["a2a", "allgather"]


def _name(parallel: dict[str, Any], data: int) -> str:
    tensor, pipeline = parallel["tensor_model_parallel_size"], parallel["pipeline_model_parallel_size"]
    context = parallel["context_parallel_size"]
    parts = []
    if tensor > 1:
        parts.append(f"TP {tensor}{' + SP' if parallel['sequence_parallel'] else ''}")
    if pipeline > 1:
        parts.append(f"PP {pipeline}{' interleaved' if parallel['num_layers_per_virtual_pipeline_stage'] else ''}")
    if context > 1:
        parts.append(f"CP {context} {parallel['cp_comm_type']}")
    if data > 1:
        parts.append(f"DP {data}")
    return ", ".join(parts) or "one process"


@dataclass(frozen=True)
class Numbers:
    """What a step computed; tensors whole, by Hugging Face's names, on rank 0 only.

    Attributes:
        metrics: means over the global batch.
        gradients: gradients of all weights.
        weights: weights after the step.
        trouble: why there are no tensors, if copies of them on several ranks differ.
    """

    metrics: dict[str, float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    trouble: str = ""


class Workshop:
    """A tiny model, samples for it, and what one process computes of them.

    Args:
        folder: empty folder of this rank's own.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint, self.data = folder / "checkpoint", folder / "samples"
        self.alone: Numbers | None = None
        # Whether all ranks have taken the step by themselves, so that they can take it together.
        self.is_ready = False

    def prepare(self) -> None:
        """Make model and samples, and take the step alone; before the process joins the others."""
        samples = [
            made_up_sample(tokens, answer=answer, turns=turns, vocab_size=SHAPE.vocab_size)
            for tokens, turns, answer in _SAMPLES
        ]
        write_samples(samples, SHAPE, self.data, count=len(samples))
        with process_groups.alone(), quietly():
            self._write_model()
            self.alone = self.step(Layout("one process", {}), torch.float32)

    def _write_model(self) -> None:
        self.checkpoint.mkdir()
        parallel = process_groups.set_up()
        chunks = build_model(SHAPE, from_dict({"model": {"make_vocab_size_divisible_by": 8}}, "doctor"), parallel)
        fill(chunks)
        start_save(
            weights_state(chunks, parallel), self.checkpoint, lambda: None, group=parallel.dp_cp_group, staged=False
        ).finish()
        SHAPE.write(self.checkpoint)
        write_checksums(self.checkpoint)

    def config(
        self, layout: Layout, dtype: torch.dtype, *, save: Path | None = None, transformer_impl: str = "auto"
    ) -> Config:
        """Configuration of a run of two steps on the tiny model."""
        sections: dict[str, dict[str, Any]] = {
            "data": {"data_path": str(self.data)},
            # Large enough for every term of the loss to show in the gradients.
            "objective": {"beta": 0.2, "preference_weight": 0.5},
            "reference": {"reference": "online"},
            "model": {"rotary_base": 40000.0, "make_vocab_size_divisible_by": 8, "transformer_impl": transformer_impl},
            "parallel": layout.parallel,
            "training": {
                "global_batch_size": len(_SAMPLES),
                "train_iters": 2,
                "bf16": dtype == torch.bfloat16,
                "recompute_granularity": "selective",
                "recompute_modules": ("mlp_up",),
            },
            # A large epsilon: Adam would amplify the rounding of gradients near zero to whole steps. No gradient is clipped, so
            # what the buffers hold afterwards is the gradient.
            "optimizer": {"lr": 1e-3, "lr_decay_style": "constant", "adam_eps": 1e-4, "clip_grad": 1e6},
            "checkpoint": {"load": str(self.checkpoint), "save": None if save is None else str(save)},
            "logging": {"tensorboard": False},
        }
        return from_dict(sections, "doctor")

    def trainer(self, layout: Layout, dtype: torch.dtype, **changes: Any) -> Trainer:
        """A trainer in a layout, ready for its next step; collective. ``changes`` are those of ``config``."""
        plan = make_plan(self.config(layout, dtype, **changes), dist.get_world_size())
        return start_training(open_session(plan), began=time.monotonic())

    def step(self, layout: Layout, dtype: torch.dtype) -> Numbers:
        """Take one step in a layout; collective."""
        return numbers_of(self.trainer(layout, dtype))


def numbers_of(trainer: Trainer) -> Numbers:
    """Take a trainer's next step and gather what it computed; collective."""
    record = trainer.train_step()
    trainer.step += 1
    gather_gradient_shards(trainer.model)
    gradients, trouble = whole(trainer, lambda p: p.main_grad)  # type: ignore[attr-defined]
    weights, more = whole(trainer, lambda p: p.detach())
    timed = ("step_seconds", "tokens_per_second", "peak_memory_gb")
    metrics = {k: float(v) for k, v in record.items() if isinstance(v, int | float) and k not in timed}
    return Numbers(metrics, gradients, weights, trouble or more)


def whole(trainer: Trainer, value_of: Any) -> tuple[dict[str, Tensor], str]:
    """A value of each weight by Hugging Face's names, on rank 0; and what is wrong if copies on several ranks differ. Collective.

    Args:
        trainer: the trainer.
        value_of: the value of a parameter.
    """
    try:
        return canonical(trainer.chunks, trainer.plan.shape, trainer.parallel, value_of), ""
    except AssertionError as error:
        return {}, str(error)


def fill(chunks: list[PolicyModel]) -> None:
    """Give a model random weights, the same on every machine."""
    generator = torch.Generator().manual_seed(11)
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            values = torch.randn(parameter.shape, generator=generator) * 0.1
            with torch.no_grad():
                parameter.copy_(values + 1 if "norm" in name else values)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Within this context the training code logs warnings only."""
    level = LOGGER.level
    LOGGER.setLevel(logging.WARNING)
    try:
        yield
    finally:
        LOGGER.setLevel(level)


def step_errors(found: Numbers, expected: Numbers) -> dict[str, float]:
    """Relative errors of a step's loss, gradient norm, gradients and new weights; of tensors all together.

    What a step makes of log-probs is compared relative to them.
    """
    errors = {
        name: abs(found.metrics[name] - expected.metrics[name]) / abs(expected.metrics[name])
        for name in ("loss", "nll", "logps/chosen", "logps/rejected", "grad_norm")
    }
    for name in ("gradients", "weights"):
        own, other = getattr(found, name), getattr(expected, name)
        if own.keys() != other.keys():
            errors[name] = float("inf")
            continue
        total = torch.tensor([[(own[k].double() - v.double()).norm(), v.double().norm()] for k, v in other.items()])
        difference, scale = total.norm(dim=0).tolist()
        errors[name] = difference / scale
    return errors


# --------------------------------------------------------------------------------------------------
# Checks
# --------------------------------------------------------------------------------------------------


def step_checks(workshop: Workshop, world_size: int) -> list[Check]:
    """A check per layout and type; on the CPU bf16 in the first layout only."""
    checks = [Check("the same step on every rank by itself", lambda _: _check_alone(workshop), remedy=_HANG)]
    found = layouts(world_size)
    simple = [layout for layout in found if layout.kinds <= 1]
    # If time is short, what is left out is bf16 in layouts whose parts have been seen in it.
    if platform.CURRENT.is_cuda:
        order = [(layout, dtype) for layout in simple for dtype in (torch.float32, torch.bfloat16)]
        order += [(layout, dtype) for dtype in (torch.float32, torch.bfloat16) for layout in found[len(simple) :]]
    else:
        order = [(found[0], torch.bfloat16), *((layout, torch.float32) for layout in found)]
    return [*checks, *(_step_check(workshop, layout, dtype) for layout, dtype in order)]


def _step_check(workshop: Workshop, layout: Layout, dtype: torch.dtype) -> Check:
    name = f"step, {layout.name}, {str(dtype).removeprefix('torch.')}"
    return Check(name, lambda ranks: _check_step(ranks, workshop, layout, dtype, name), _HANG, optional=True)


def _check_alone(workshop: Workshop) -> Iterator[Line]:
    metrics = {} if workshop.alone is None else workshop.alone.metrics
    own: dict[str, float] = {name: metrics[name] for name in ("loss", "grad_norm") if name in metrics}
    found = all_gather_objects(own)
    workshop.is_ready = all(found)
    if not workshop.is_ready:
        # The rank that could not take it has said why.
        return
    # The median of all ranks is right as long as most of them are, rank 0 or not; of two ranks that differ both are named.
    usual = {name: float(np.nanmedian([each[name] for each in found])) for name in own}
    errors = {name: abs(value - usual[name]) / abs(usual[name]) for name, value in own.items()}
    bound = bounds_of(torch.float32, platform.CURRENT.device.type).loss
    remedy = (
        "this rank computes other numbers than most: its card, driver or libraries differ or are broken; leave it out"
    )
    yield by_error("the same step on every rank by itself", errors, bound, remedy=remedy)


def _check_step(ranks: Ranks, workshop: Workshop, layout: Layout, dtype: torch.dtype, name: str) -> Iterator[Line]:
    if not workshop.is_ready:
        yield Line(name, "skipped", NOT_READY)
        return
    ranks.at(name)
    with quietly():
        found = workshop.step(layout, dtype)
        destroy_groups()
    # Tensors are whole on rank 0 only.
    if ranks.rank == 0:
        assert workshop.alone is not None
        yield compared(name, found, workshop.alone, dtype)


def compared(name: str, found: Numbers, expected: Numbers, dtype: torch.dtype) -> Line:
    """A line on a step against another."""
    if found.trouble:
        return Line(name, "fail", found.trouble, _WRONG)
    bounds = bounds_of(dtype, platform.CURRENT.device.type)
    errors = step_errors(found, expected)
    # In units of the bounds, since values and gradients have different ones.
    allowed = {n: bounds.step if n in ("gradients", "weights", "grad_norm") else bounds.loss for n in errors}
    line = by_error(name, {n: e / allowed[n] for n, e in errors.items()}, 1.0, remedy=_WRONG)
    if line.status == "pass":
        detail = f"gradients within {errors['gradients']:.1e}, loss within {errors['loss']:.1e}"
    else:
        wrong = [n for n, e in errors.items() if not e <= allowed[n]]
        detail = ", ".join(f"{n} off by {errors[n]:.1e} (rounding: {allowed[n]:.0e})" for n in wrong)
    return dataclasses.replace(line, detail=detail, figures=errors)
