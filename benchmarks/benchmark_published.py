"""Published and measured throughputs beside the planner's: a table in Markdown, of which docs/planner.md shows the result.

    python benchmarks/benchmark_published.py

It takes a few seconds of CPU. No constant of a machine was fitted to the published figures; those of Hopper cards were fitted to
our own steps on one H200, which are listed as well.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_longpo.config import from_dict
from megatron_longpo.model.shape import ModelShape
from megatron_longpo.planner.links import Group
from megatron_longpo.planner.machine import Machine, load_machine
from megatron_longpo.planner.search import Plan, Search
from megatron_longpo.planner.workload import made_up
from megatron_longpo.runtime.tables import markdown_table

_UP = {"recompute_granularity": "selective", "recompute_modules": ["mlp_up"]}
_ALL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_modules": ["mlp_up"]}
_NONE = {"recompute_granularity": "none"}
# Gradients of weights that take a pass of their own after the product: FSDP copies them into the buffer that it reduces.
_ADDED = {"gradient_accumulation_fusion": False}


@dataclass(frozen=True)
class Figure:
    """A figure of a step beside ours.

    Attributes:
        what: model, GPUs, length.
        unit: of both.
        published: theirs, or what was measured.
        ours: the planner's.
    """

    what: str
    unit: str
    published: float
    ours: float

    @property
    def error(self) -> float:
        """Our throughput over theirs, minus 1, whether the figure is a time or a rate."""
        return self.ours / self.published - 1 if self.unit != "s" else self.published / self.ours - 1


# --------------------------------------------------------------------------------------------------
# The authors' step
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AuthorsStep:
    """The step of the authors' released code on Mistral-7B: ZeRO-3, and the whole world as one Ulysses group.

    Chosen and rejected are separate rows of the same length, each layer is computed again in the backward, norms and gates are
    plain operators, and the reference scores its short rows in every step. Gathers of weights and exchanges of heads wait: the
    code overlaps neither.

    Attributes:
        machine: GPUs.
        gpus: their number.
        turns, chunk: turns of a sample, and tokens of their chunks.
    """

    machine: Machine
    gpus: int
    turns: int = 4
    chunk: int = 24000

    layers, hidden, mlp, query, key, vocabulary = 32, 4096, 14336, 4096, 1024, 32000
    # Passes of torch's plain operators over a norm's and a gate's tensor, in the forward and in the backward, and bytes per logit
    # of the float logits and of the cross entropies.
    norm, gate, logit_bytes = (7, 23), (5, 16), 40

    @property
    def layer_weights(self) -> int:
        return self.hidden * (2 * self.query + 2 * self.key) + 3 * self.hidden * self.mlp

    @property
    def group(self) -> Group:
        return Group(self.gpus, 1, self.machine)

    def seconds(self, length: float) -> float:
        """Seconds of one sample, whose long rows have ``length`` tokens."""
        rows, places = 2, length / self.gpus
        policy = rows * (2 * self._forward(places, length) + self._backward(places, length))
        head = 3 * self._product(places, self.hidden, self.vocabulary)
        logits = places * self.vocabulary * self.logit_bytes / self.machine.memory_bytes_per_s
        reference = self._forward(self.chunk / self.gpus, self.chunk) + self._gather()
        # Weights are gathered for the forward, its repetition and the backward, and gradients scattered, for both rows at once.
        seconds = policy + rows * (head + logits) + 4 * self._gather() + 2 * self.turns * reference
        return seconds * (1 + self.machine.straggler_slowdown)

    def _product(self, places: float, inputs: float, outputs: float) -> float:
        rate = self.machine.linear_flops_per_s("bfloat16", rows=places, width=min(inputs, outputs))
        return 2 * places * inputs * outputs / rate

    def _linear(self, places: float) -> float:
        rate = self.machine.linear_flops_per_s("bfloat16", rows=places, width=self.hidden)
        return 2 * places * self.layer_weights / rate

    def _attention(self, length: float, *, is_backward: bool) -> float:
        """Of one layer: half of all pairs, this rank's heads; two products of the forward, five of the backward."""
        rate = self.machine.attention_flops_per_s("bfloat16", length=length, is_backward=is_backward)
        return (5.0 if is_backward else 2.0) * length * length * self.query / self.gpus / rate

    def _exchange(self, places: float) -> float:
        """Queries, keys, values and output of one layer; key-value heads are repeated where there are fewer of them than GPUs."""
        copies = max(1.0, self.gpus / 8)
        return self.group.all_to_all(2 * places * (2 * self.query + 2 * self.key * copies), 4)

    def _elementwise(self, places: float, norm: int, gate: int) -> float:
        numbers = self.hidden * (2 * norm + 6) + 8 * (self.query + self.key) + gate * self.mlp
        return 2 * places * numbers / self.machine.memory_bytes_per_s

    def _forward(self, places: float, length: float) -> float:
        layer = self._linear(places) + self._attention(length, is_backward=False) + self._exchange(places)
        return self.layers * (layer + self._elementwise(places, self.norm[0], self.gate[0]))

    def _backward(self, places: float, length: float) -> float:
        layer = 2 * self._linear(places) + self._attention(length, is_backward=True) + self._exchange(places)
        return self.layers * (layer + self._elementwise(places, self.norm[1], self.gate[1]))

    def _gather(self) -> float:
        weights = self.layers * self.layer_weights + 2 * self.vocabulary * self.hidden
        return self.group.gather(2 * weights, 2 * self.layers)

    def tokens_per_s(self, target: int, shortest: int | None = 65536) -> float:
        """Tokens of the chosen rows per second, over documents with lengths evenly from ``shortest`` to the target: those of the
        paper are longer than 64K tokens and shorter than the target. None: all have the target's length."""
        lengths = [target] if shortest is None else lengths_to(target, shortest)
        return sum(lengths) / sum(map(self.seconds, lengths))


def lengths_to(target: int, shortest: int = 65536) -> list[int]:
    """Lengths of documents, evenly from the shortest to the target; for both sides of the comparison."""
    return [int(length) for length in np.linspace(shortest, target, 17)]


# GPUs, target length, tokens per second: arXiv 2502.13922.
AUTHORS = ((8, 131072, 4401), (16, 262144, 4120), (16, 524288, 2744))


def authors(machine: Machine | None = None, *, shortest: int | None = 65536) -> list[Figure]:
    """The authors' throughputs beside the model of their step."""
    machine = machine or load_machine("a800-80g")
    return [
        Figure(
            f"Mistral-7B, {length:,} tokens, {gpus} x A800-80G",
            "tokens/s",
            published,
            AuthorsStep(machine, gpus).tokens_per_s(length, shortest),
        )
        for gpus, length, published in AUTHORS
    ]


def ours_on_their_cards() -> list[float]:
    """Tokens of the chosen rows per second of our best plan for each of the authors' runs, over the same lengths."""
    found = []
    for gpus, target, _ in AUTHORS:
        search = _search("mistral", "a800-80g", gpus, target, 8, {}, {"bf16": True}, "longpo", turns=4, short=24000)
        plan = search.best(1)[0]
        lengths = lengths_to(target)
        seconds = []
        for length in lengths:
            rows = made_up(search.config, search.shape, length=length, answer=512, turns=4, short=24000, samples=None)
            times = dataclasses.replace(search, workload=rows)
            seconds.append(times.plan(plan.candidate, plan.recompute).seconds / 8)
        # The reference is scored once, with a forward of the short rows.
        seconds = [s + search.times.reference_pass(plan.candidate, 1) for s in seconds]
        found.append(sum(lengths) / sum(seconds))
    return found


def sensitivity() -> Iterator[tuple[str, list[float]]]:
    """Errors against the authors' figures if one of the two most uncertain constants is another."""
    machine = load_machine("a800-80g")
    for factor in (0.85, 1.0, 1.15):
        changed = dataclasses.replace(
            machine,
            attention_forward_efficiency=_scaled(machine.attention_forward_efficiency, factor),
            attention_backward_efficiency=_scaled(machine.attention_backward_efficiency, factor),
        )
        yield f"attention kernels {factor:.2f} times as fast", [f.error for f in authors(changed)]
    for name, shortest in (("64K", 65536), ("half the target", None)):
        if shortest is None:
            figures = [authors(machine, shortest=length // 2)[i] for i, (_, length, _) in enumerate(AUTHORS)]
        else:
            figures = authors(machine, shortest=shortest)
        yield f"documents from {name} to the target", [f.error for f in figures]
    yield "all documents of the target's length", [f.error for f in authors(machine, shortest=None)]
    for rate in (5.6, 11.2, 22.5):
        changed = dataclasses.replace(machine, network_gb_per_s=rate)
        yield f"network of {rate:g} GB/s per GPU", [f.error for f in authors(changed)]


def _scaled(curves: dict[str, Any], factor: float) -> dict[str, Any]:
    return {dtype: tuple((size, share * factor) for size, share in curve) for dtype, curve in curves.items()}


# --------------------------------------------------------------------------------------------------
# Others'
# --------------------------------------------------------------------------------------------------

# Layers, hidden size, width of the MLP, heads, key-value heads, vocabulary, whether embeddings are tied.
_SHAPES = {
    "mistral": (32, 4096, 14336, 32, 8, 32000, False),
    "mistral, 8 layers": (8, 4096, 14336, 32, 8, 32000, False),
    "llama-2-7b": (32, 4096, 11008, 32, 32, 32000, False),
    "llama-3.1-8b": (32, 4096, 14336, 32, 8, 128256, False),
    "llama-3.1-405b": (126, 16384, 53248, 128, 8, 128256, False),
    # GPT's MLP has two matrices of four times the hidden size; ours has three, of 8 / 3.
    "gpt-22b": (48, 6144, 16384, 64, 64, 51200, True),
    "gpt-175b": (96, 12288, 32768, 96, 96, 51200, True),
    "gpt-530b": (105, 20480, 54616, 128, 128, 51200, True),
    "gpt-1t": (128, 25600, 68264, 160, 160, 51200, True),
}


def _shape(name: str) -> ModelShape:
    layers, hidden, mlp, heads, kv_heads, vocabulary, tied = _SHAPES[name]
    return ModelShape(
        family="llama",
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=mlp,
        num_attention_heads=heads,
        num_query_groups=kv_heads,
        kv_channels=hidden // heads,
        vocab_size=vocabulary,
        layernorm_epsilon=1e-5,
        add_qkv_bias=False,
        untie_embeddings_and_output_weights=not tied,
        rotary_base=1e6,
        max_position_embeddings=2**21,
        dtype="bfloat16",
        weights_hash="published",
    )


def _search(
    model: str,
    machine: str | Machine,
    gpus: int,
    length: int,
    batch: int,
    parallel: dict[str, Any],
    training: dict[str, Any],
    objective: str = "sft",
    *,
    optimizer: str = "rmsprop",
    turns: int = 1,
    short: int = 1024,
) -> Search:
    config = from_dict(
        {
            "parallel": {**parallel},
            "training": {"global_batch_size": batch, "bf16": True, **training},
            "objective": {"objective": objective},
            "optimizer": {"optimizer": optimizer},
        },
        model,
    )
    shape = _shape(model)
    # Enough for four turns; with one turn, an answer that does not matter.
    answer = min(512, length // 8)
    workload = made_up(config, shape, length=length, answer=answer, turns=turns, short=short, samples=None)
    return Search(config, shape, load_machine(machine) if isinstance(machine, str) else machine, gpus, workload)


def _plan(*args: Any, **kwargs: Any) -> Plan:
    return _search(*args, **kwargs).as_configured()


def _flops_per_token(model: str, length: int, *, causal: bool) -> float:
    """Operations that count as the model's: six per weight, and those of attention, all pairs or only visible ones."""
    shape = _shape(model)
    weights = shape.num_layers * shape.layer_weights + shape.vocab_size * shape.hidden_size
    return 6 * weights + (6 if causal else 12) * shape.num_layers * shape.query_width * length


def h200() -> Iterator[Figure]:
    """Our own steps on one H200, docs/gpu.md: from before gradients of weights were added inside their products."""
    for length, training, optimizer, measured in (
        (31764, _NONE, "rmsprop", 1.13),
        (31764, _NONE, "adam", 1.16),
        (31764, _UP, "rmsprop", 1.21),
        (31764, _ALL, "rmsprop", 1.48),
        (126991, _UP, "rmsprop", 9.95),
        (126991, _ALL, "rmsprop", 12.05),
    ):
        plan = _plan("mistral, 8 layers", "h200", 1, length, 1, _ADDED, training, "longpo", optimizer=optimizer)
        recomputed = {"none": "nothing", "selective": "the MLPs' first products", "full": "whole layers"}
        granularity = recomputed[training["recompute_granularity"]]
        what = f"8 layers of Mistral-7B, {length:,} tokens, {optimizer}, recomputing {granularity}"
        yield Figure(what, "s", measured, plan.seconds)


def megatron() -> Iterator[Figure]:
    """Megatron-LM on A100-80G with 2048 tokens: arXiv 2205.05198, table 5, sequence parallelism and selective recomputation."""
    for model, gpus, pipeline, virtual, micro, batch, published in (
        ("gpt-22b", 8, 1, 1, 4, 4, 1.10),
        ("gpt-175b", 64, 8, 3, 1, 64, 13.75),
        ("gpt-530b", 280, 35, 3, 1, 280, 37.83),
        ("gpt-1t", 512, 64, 1, 1, 512, 71.49),
    ):
        parallel: dict[str, Any] = {
            "tensor_model_parallel_size": 8,
            "sequence_parallel": True,
            "pipeline_model_parallel_size": pipeline,
        }
        if virtual > 1:
            parallel["virtual_pipeline_model_parallel_size"] = virtual
        plan = _plan(
            model, "a100-80g", gpus, 2048, batch, parallel, {**_NONE, "micro_batch_size": micro}, optimizer="adam"
        )
        yield Figure(f"{model.upper()}, 2,048 tokens, {gpus} x A100-80G", "s", published, plan.seconds)


def llama3() -> Iterator[Figure]:
    """Llama 3.1 405B on H100: arXiv 2407.21783, table 4. Its number of virtual stages is not published; two layers each here."""
    for gpus, context, data, length, batch, published in (
        (8192, 1, 64, 8192, 32, 430),
        (16384, 1, 128, 8192, 16, 400),
        (16384, 16, 8, 131072, 16, 380),
    ):
        parallel = {
            "tensor_model_parallel_size": 8,
            "sequence_parallel": True,
            "pipeline_model_parallel_size": 16,
            "virtual_pipeline_model_parallel_size": 4,
            "account_for_embedding_in_pipeline_split": True,
            "account_for_loss_in_pipeline_split": True,
            "context_parallel_size": context,
            "cp_comm_type": "allgather" if context > 1 else "auto",
            "use_distributed_optimizer": True,
            "overlap_grad_reduce": True,
        }
        plan = _plan("llama-3.1-405b", "h100-sxm", gpus, length, data * batch, parallel, _NONE, optimizer="adam")
        # A step of so many GPUs counts visible pairs only: with all of them the longest would exceed what 8K reaches.
        work = _flops_per_token("llama-3.1-405b", length, causal=True) * length * data * batch
        yield Figure(
            f"Llama-3.1-405B, {length:,} tokens, {gpus:,} x H100",
            "TFLOP/s",
            published,
            work / plan.seconds / gpus / 1e12,
        )


def torchtitan() -> Iterator[Figure]:
    """torchtitan: benchmarks/llama3_h100_202412_torchtitan.md, tables 1 and 3, bf16 with torch.compile.

    Its H100 have HBM2e with 2.4 TB/s and a limit of 500 instead of 700 W; power grows with the cube of the clock.
    """
    h100 = load_machine("h100-sxm")
    slower = {dtype: peak * (500 / 700) ** (1 / 3) for dtype, peak in h100.peak_tflops.items()}
    machine = dataclasses.replace(h100, peak_tflops=slower, memory_gb_per_s=2400)
    for gpus, batch, published in ((8, 16, 6667), (128, 256, 6514)):
        plan = _plan(
            "llama-3.1-8b",
            machine,
            gpus,
            8192,
            batch,
            {**_ADDED, "use_distributed_optimizer": True, "overlap_grad_reduce": True},
            {**_UP, "micro_batch_size": 2},
            optimizer="adam",
        )
        yield Figure(
            f"Llama-3.1-8B, 8,192 tokens, {gpus} x H100 of 500 W",
            "tokens/s per GPU",
            published,
            batch * 8192 / plan.seconds / gpus,
        )


def nemo() -> Iterator[Figure]:
    """NeMo on H100 with context parallelism, FP8 products: its guide 24.12, "Long Sequence Performance", 4M tokens per step.

    The machine has FP8's products (1979 TFLOP/s, of which mamf-finder reached 0.71, and Hopper's own steps 0.82 of that), and
    FlashAttention 2 as docs/gpu.md measured it, since that was what context parallelism ran then. All pairs count, as in its
    formulas of that time.
    """
    h100 = load_machine("h100-sxm")
    fast = 1979 / 989 * 0.709 * 0.82
    machine = dataclasses.replace(
        h100,
        linear_efficiency={
            **h100.linear_efficiency,
            "bfloat16": tuple((rows, fast / (1 + 590 / rows)) for rows in (16, 64, 256, 1024, 4096, 16384)),
        },
        attention_forward_efficiency={
            **h100.attention_forward_efficiency,
            "bfloat16": ((512.0, 191 / 989), (2048.0, 298 / 989), (16384.0, 345 / 989), (131072.0, 339 / 989)),
        },
        attention_backward_efficiency={
            **h100.attention_backward_efficiency,
            "bfloat16": ((512.0, 150 / 989), (2048.0, 250 / 989), (16384.0, 308 / 989), (131072.0, 324 / 989)),
        },
    )
    for thousands, tensor, pipeline, data, context, published in (
        (8, 1, 2, 4, 1, 730),
        (16, 2, 1, 8, 1, 660),
        (32, 2, 1, 8, 2, 610),
        (64, 4, 1, 8, 2, 574),
        (128, 4, 1, 8, 4, 555),
        (256, 4, 1, 8, 8, 549),
        (512, 8, 1, 4, 16, 549),
        (1024, 8, 1, 4, 32, 536),
    ):
        length, gpus = 1024 * thousands, tensor * pipeline * data * context
        batch = max(data, 4096 // thousands)
        parallel = {
            "tensor_model_parallel_size": tensor,
            "sequence_parallel": tensor > 1,
            "pipeline_model_parallel_size": pipeline,
            "context_parallel_size": context,
            "cp_comm_type": "allgather" if context > 1 else "auto",
            "use_distributed_optimizer": True,
            "overlap_grad_reduce": True,
        }
        plan = _plan("llama-2-7b", machine, gpus, length, batch, parallel, _NONE, optimizer="adam")
        work = _flops_per_token("llama-2-7b", length, causal=False) * length * batch
        yield Figure(
            f"Llama-2-7B, FP8, {length:,} tokens, {gpus} x H100",
            "TFLOP/s",
            published,
            work / plan.seconds / gpus / 1e12,
        )


@functools.cache
def others() -> dict[str, list[Figure]]:
    """All figures that are not the authors', by their source."""
    return {
        "this project on one H200": list(h200()),
        "Megatron-LM": list(megatron()),
        "Llama 3": list(llama3()),
        "torchtitan": list(torchtitan()),
        "NeMo": list(nemo()),
    }


def main() -> None:
    """Print the tables."""
    figures, best = authors(), ours_on_their_cards()
    rows = [
        [f.what, f"{f.published:,.0f}", f"{f.ours:,.0f}", f"{f.error:+.0%}", f"{mine:,.0f}"]
        for f, mine in zip(figures, best, strict=True)
    ]
    lines = markdown_table(["run", "published", "model of their step", "", "ours on the same cards"], rows)
    lines += [
        "",
        *markdown_table(["if", "128K", "256K", "512K"], [[n, *(f"{e:+.0%}" for e in es)] for n, es in sensitivity()]),
    ]
    table = [
        [source, f.what, f.unit, f"{f.published:,.4g}", f"{f.ours:,.4g}", f"{f.error:+.0%}"]
        for source, group in others().items()
        for f in group
    ]
    lines += ["", *markdown_table(["source", "step", "unit", "published", "planner", "throughput"], table)]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
