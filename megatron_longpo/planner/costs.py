"""What a whole run takes: hours and money, from pairs to evaluation as far as they are asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_longpo.model.shape import ModelShape
from megatron_longpo.planner.failures import Saving, best_saving
from megatron_longpo.planner.machine import Machine
from megatron_longpo.planner.search import Plan, Search
from megatron_longpo.planner.timing import dtype_of
from megatron_longpo.training.preflight import checkpoint_bytes

# Tokens that the model writes per chunk beside its answers: questions.
_QUESTION_TOKENS = 200
# Share of a GPU's memory that an engine gives to weights and cached keys and values (vLLM's gpu_memory_utilization).
_ENGINE_SHARE = 0.9


@dataclass(frozen=True)
class Inference:
    """Prompts that are answered before or after training.

    Attributes:
        prompts: their number.
        prompt_tokens: tokens of each.
        answer_tokens: tokens that are written for each.
    """

    prompts: int
    prompt_tokens: int
    answer_tokens: int


@dataclass(frozen=True)
class RunCost:
    """Seconds of a run by part.

    Attributes:
        steps: optimizer steps.
        seconds: part -> seconds.
        saving: when to save, and what is lost to saving and failures.
        save_interval: the same in steps.
        gpus: number of GPUs.
        dollars_per_gpu_hour: price, or None.
    """

    steps: int
    seconds: dict[str, float]
    saving: Saving
    save_interval: int | None
    gpus: int
    dollars_per_gpu_hour: float | None

    @property
    def hours(self) -> float:
        return sum(self.seconds.values()) / 3600

    @property
    def dollars(self) -> float | None:
        return None if self.dollars_per_gpu_hour is None else self.hours * self.gpus * self.dollars_per_gpu_hour


def cost_of(
    plan: Plan,
    search: Search,
    *,
    samples: int,
    generation: tuple[Inference, ...] = (),
    evaluation: tuple[Inference, ...] = (),
    dollars_per_gpu_hour: float | None = None,
) -> RunCost:
    """What a run takes by a plan.

    Args:
        plan: the layout.
        search: what was planned.
        samples: samples of an epoch.
        generation, evaluation: prompts that are answered before and after; none if they are not to be counted.
        dollars_per_gpu_hour: price.
    """
    training, machine, gpus = plan.config.training, search.machine, search.world_size
    epoch = samples / training.global_batch_size
    steps = training.train_iters or max(1, math.floor(training.train_epochs * epoch))
    nodes = math.ceil(gpus / machine.gpus_per_node)
    save = checkpoint_bytes(search.shape, plan.config) / (nodes * machine.disk_gb_per_s * 1e9)
    saving = best_saving(
        save=save,
        gpu_hours_between_failures=machine.gpu_hours_between_failures,
        gpus=gpus,
        restart=60 * machine.restart_minutes,
        shortest=plan.seconds,
    )
    train = steps * plan.seconds
    seconds = {
        "generation": sum(infer(i, search.shape, machine, gpus, dtype_of(plan.config)) for i in generation),
        "reference pass": search.times.reference_pass(plan.candidate, samples),
        "training": train,
        # At least the last step is saved.
        "checkpoints and failures": max(save, train * saving.lost_share),
        "evaluation": sum(infer(i, search.shape, machine, gpus, dtype_of(plan.config)) for i in evaluation),
    }
    interval = None
    if saving.interval < train:
        interval = max(1, round(saving.interval / plan.seconds))
    return RunCost(steps, seconds, saving, interval, gpus, dollars_per_gpu_hour)


def infer(work: Inference, shape: ModelShape, machine: Machine, gpus: int, dtype: str) -> float:
    """Seconds of answering prompts on all GPUs, by an engine that batches them as memory allows.

    A prompt is computed like a forward. A token that is written reads all weights once per batch and the keys and values of each
    row: memory bandwidth is what it takes.
    """
    if not work.prompts:
        return 0.0
    width = 2 if dtype == "bfloat16" else 4
    heads = 2 if shape.untie_embeddings_and_output_weights else 1
    weights = shape.num_layers * shape.layer_weights + heads * shape.vocab_size * shape.hidden_size
    length = work.prompt_tokens + work.answer_tokens
    seen = min(length, shape.window_size or length)
    row_bytes = 2 * width * shape.num_layers * shape.kv_width * seen
    room = _ENGINE_SHARE * machine.memory_bytes
    # The fewest GPUs that hold the weights and one row.
    each = 1
    while each < gpus and each * room < weights * width + row_bytes:
        each *= 2
    replicas = max(1, gpus // each)
    prompts = math.ceil(work.prompts / replicas)
    batch = max(1, min(prompts, int((each * room - weights * width) / row_bytes)))
    products = 2.0 * weights * work.prompt_tokens
    products /= machine.linear_flops_per_s(dtype, rows=work.prompt_tokens, width=shape.hidden_size)
    pairs = work.prompt_tokens * seen - seen * seen / 2
    attention = 4 * pairs * shape.query_width * shape.num_layers
    attention /= machine.attention_flops_per_s(dtype, length=seen, is_backward=False)
    reading = (weights * width / batch + row_bytes) / machine.memory_bytes_per_s
    return prompts * (products + attention + work.answer_tokens * reading) / each


def pairs_of(samples: int, *, length: int, short: int, answer: int, turns: int) -> tuple[Inference, ...]:
    """Prompts of generating pairs: questions and short answers on each turn's chunk, long answers on the document."""
    return (
        Inference(samples * turns, short, _QUESTION_TOKENS),
        Inference(samples * turns, short, answer),
        Inference(samples * turns, length, answer),
    )
