"""What a step needs of memory, and what is computed again in its backward: ``recompute_granularity=auto``.

More than half of what a layer keeps is the MLP's first product (``mlp_up``). Making it again costs one product in nine of that
width: a tenth of all operations at a few thousand tokens, less and less of them as attention grows.
So it is made again where it costs no more than that (``CHEAP``). Beyond it, recomputing whole layers costs a third of
the linear layers' time and more of the attention's: that is done only as far as memory demands, as many layers of a stage
as are needed (``full``, method ``block``).

Shape legend: H = hidden size, F = MLP width, Q/K = query/key-value heads, D = head size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_longpo.config import Config, TrainingConfig, virtual_pipeline_size
from megatron_longpo.model.logprobs import default_chunk_bytes
from megatron_longpo.model.shape import ModelShape
from megatron_longpo.runtime import platform
from megatron_longpo.runtime.process_groups import Parallel

# What the estimate leaves out: the interpreter and its libraries, buffers of the exchanges, fragmentation.
_RESERVE_BYTES = 2**30
_USABLE = 0.9

# A share of a step's operations.
CHEAP = 0.1


@dataclass(frozen=True)
class Choice:
    """A way to train, with what it costs.

    Attributes:
        granularity, modules, layers: as ``recompute_granularity``, ``recompute_modules``, ``recompute_num_layers``.
        bytes_needed: estimate of the peak on this rank.
        extra: floating-point operations computed again, as a share of a step's.
    """

    granularity: str
    modules: tuple[str, ...]
    layers: int
    bytes_needed: int
    extra: float

    def applied_to(self, training: TrainingConfig) -> TrainingConfig:
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
        if self.granularity == "none":
            return "nothing"
        if self.granularity == "selective":
            return "the first products of MLPs"
        return f"{self.layers} layer(s) of each stage, of the others the first products of MLPs"


def choices(
    shape: ModelShape, config: Config, parallel: Parallel, *, tokens: int, pairs: int, microbatches: int, stage: int
) -> list[Choice]:
    """All ways to recompute, fewest operations first.

    Args:
        shape: of the model.
        config: of the run.
        parallel: degrees.
        tokens: places of the longest micro batch, over all its context-parallel ranks.
        pairs: query-key pairs of that micro batch.
        microbatches: of a step.
        stage: pipeline rank.
    """
    p = config.parallel
    virtual = virtual_pipeline_size(p, shape.num_layers) or 1
    chunk_layers = shape.num_layers // (parallel.pipeline_size * virtual)
    local = math.ceil(tokens / parallel.context_size)
    in_flight = min(_chunks_in_flight(parallel.pipeline_size, virtual, stage), microbatches * virtual)
    width = 2 if config.training.bf16 else 4
    entry, whole, without_mlp = (int(x * local * width) for x in _kept_numbers(shape, parallel))
    base = static_bytes(shape, config, parallel, stage) + _RESERVE_BYTES
    # A layer's backward holds its gradients beside what it kept; the last stage the logits of a chunk.
    base += 2 * whole + (config.model.logprob_chunk_bytes or default_chunk_bytes()) * 3 // 2
    linear, attention = _forward_operations(shape, tokens, pairs)
    up = 2 * 2 * shape.hidden_size * shape.ffn_hidden_size * tokens
    # Backward: twice the linear layers, five products for the attention's two.
    step = 3 * linear + 3.5 * attention
    # While a layer's MLP goes backward, what it makes again is there.
    found = [Choice("selective", ("mlp_up",), 0, base + in_flight * chunk_layers * without_mlp, up / step)]
    if up / step > CHEAP:
        found.append(Choice("none", (), 0, base + in_flight * chunk_layers * whole, 0.0))
    for layers in range(1, chunk_layers + 1):
        kept = layers * entry + (chunk_layers - layers) * without_mlp
        share = layers / chunk_layers
        extra = (share * (linear + attention) + (1 - share) * up) / step
        found.append(Choice("full", ("mlp_up",), layers, base + in_flight * kept, extra))
    return sorted(found, key=lambda c: c.extra)


def room(choice: Choice, available: int) -> float:
    """Bytes that a choice leaves of what is available; below 0 it does not fit."""
    return _USABLE * available - choice.bytes_needed


def choose(found: Sequence[Choice], rooms: Sequence[float]) -> Choice:
    """The cheapest choice that fits, or the one that is nearest to it where none does.

    Args:
        found: all choices, fewest operations first.
        rooms: of each, the least that any rank has left.
    """
    for choice, left in zip(found, rooms, strict=True):
        if left >= 0:
            return choice
    return found[max(range(len(found)), key=lambda i: rooms[i])]


def static_bytes(shape: ModelShape, config: Config, parallel: Parallel, stage: int) -> int:
    """Weights, gradients and optimizer states of a rank."""
    h, f = shape.hidden_size, shape.ffn_hidden_size
    q = shape.num_attention_heads * shape.kv_channels
    k = shape.num_query_groups * shape.kv_channels
    layer = (h * (2 * q + 2 * k) + 3 * h * f) // parallel.tensor_size + 2 * h
    vocabulary = shape.vocab_size * h // parallel.tensor_size
    first, last = stage == 0, stage == parallel.pipeline_size - 1
    both_are_one = first and last and not shape.untie_embeddings_and_output_weights
    parameters = shape.num_layers // parallel.pipeline_size * layer + vocabulary * (first + last - both_are_one)
    bf16 = config.training.bf16
    # Two states each, and a master in fp32 where the weights are not. RMSProp's second one is never written; on CUDA it is in
    # host memory (optimization.py).
    unused = 4 if config.optimizer.optimizer == "rmsprop" and platform.CURRENT.is_cuda else 0
    states = ((12 if bf16 else 8) - unused) * parameters
    if config.parallel.use_distributed_optimizer:
        states //= parallel.dp_cp_size
    resident = config.reference.reference == "online" and config.objective.objective != "sft"
    weights = (2 if bf16 else 4) * parameters * (2 if resident else 1)
    return weights + 4 * parameters + states


def _kept_numbers(shape: ModelShape, parallel: Parallel) -> tuple[float, float, float]:
    """Numbers a token keeps in a layer: its input alone, everything (model/layers.py), everything but the MLP's width."""
    t = parallel.tensor_size
    entry = shape.hidden_size / (t if parallel.sequence_parallel else 1)
    q = shape.num_attention_heads * shape.kv_channels / t
    k = shape.num_query_groups * shape.kv_channels / t
    attention = 2 * q + 2 * k
    if parallel.context_size > 1 and parallel.comm_type == "a2a":
        # The output is kept on both sides of the exchange, and key-value heads may be held several times over.
        copies = max(1.0, parallel.context_size * t / shape.num_query_groups)
        attention = 3 * q + 2 * k * copies
    without_mlp = 2 * entry + attention
    return entry, without_mlp + 2 * shape.ffn_hidden_size / t, without_mlp


def _forward_operations(shape: ModelShape, tokens: int, pairs: int) -> tuple[float, float]:
    """Floating-point operations of a forward in the linear layers of a layer and in its attention."""
    q = shape.num_attention_heads * shape.kv_channels
    k = shape.num_query_groups * shape.kv_channels
    linear = 2.0 * tokens * shape.hidden_size * (2 * q + 2 * k + 3 * shape.ffn_hidden_size)
    return linear, 4.0 * pairs * q


def _chunks_in_flight(pipeline: int, virtual: int, stage: int) -> int:
    """Most chunks of a stage whose backward is still to come (1F1B, arXiv 2104.04473, section 2.2)."""
    if virtual == 1:
        return pipeline - stage
    return (pipeline - stage - 1) * 2 + (virtual - 1) * pipeline + 1
