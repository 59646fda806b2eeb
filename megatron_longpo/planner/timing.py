"""Time of a training step by part, from the operations, the bytes and the exchanges of the trainer's own step.

What is counted is what ``megatron-longpo simulate`` counts of the real step (tests/unit/test_planner.py compares the two); how
fast it goes is the machine's (``machine.py``). A micro batch of a pipeline stage is computed without gaps, except for exchanges
that nothing hides; a pipeline's step is that of 1F1B, arXiv 2104.04473, section 2.2.

Shape legend: s = places on this context-parallel rank, r = rows of the hidden states on this rank (s / TP with sequence
parallelism), H = hidden size, Q/K = width of this rank's queries/keys, F = this rank's width of the MLP, V = its vocabulary.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from megatron_longpo.config import Config
from megatron_longpo.model.attention import head_groups_of
from megatron_longpo.model.fp8 import alignment
from megatron_longpo.model.gpt import padded_vocab_size
from megatron_longpo.model.shape import ModelShape
from megatron_longpo.planner.links import Group
from megatron_longpo.planner.machine import Machine
from megatron_longpo.planner.space import Candidate
from megatron_longpo.planner.workload import Rows, Workload
from megatron_longpo.runtime.balance import round_up
from megatron_longpo.training.activations import Activations
from megatron_longpo.training.batch import HEAD_GROUPS
from megatron_longpo.training.objective import spec_of
from megatron_longpo.training.optimization import fuses_weight_gradients

# Bytes per weight that the optimizer's update reads and writes: torch's Adam, or RMSProp as in training/optimization.py.
_UPDATE_BYTES = {"adam": 72, "rmsprop": 56}
# The same of what is around it: the copy of the gradients, clipping, and the copy back to bf16 weights; on the host, only the
# conversion of the new weights to bf16.
_AROUND_UPDATE_BYTES, _HOST_CONVERSION_BYTES = 26, 6
# Operators of a layer's forward and backward, and those that an exchange of context parallelism adds.
_FORWARD_OPERATORS, _BACKWARD_OPERATORS, _EXCHANGE_OPERATORS = 45, 90, 60

# Softmaxes and gradients of a logit that is made twice, as a share of one of a known gradient: its first pass is 20 of 34 bytes.
_TWICE = 1.6
# A forward's share of a layer's operators.
_FORWARD_SHARE = _FORWARD_OPERATORS / (_FORWARD_OPERATORS + _BACKWARD_OPERATORS)


@dataclass(frozen=True)
class Passes:
    """How often element-wise work goes over a tensor, reads and writes counted, in the forward and in the backward.

    Attributes:
        norm: over [r, H] for one norm.
        gate: over [s, F] for the gated activation.
    """

    norm: tuple[float, float]
    gate: tuple[float, float]


# On CUDA norms and gates are single kernels; on a CPU they are torch's plain operators.
PASSES = {
    "cuda": Passes(norm=(2, 5), gate=(3, 8)),
    "cpu": Passes(norm=(7, 23), gate=(5, 16)),
}

PARTS = (
    "linear",
    "attention",
    "log-probs",
    "recompute",
    "element-wise",
    "TP exchange",
    "CP exchange",
    "PP exchange",
    "DP exchange",
    "host copies",
    "bubble",
    "optimizer",
    "reference",
    "launches",
    "stragglers",
    "fresh memory",
)


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step by part.

    Attributes:
        parts: those of the slowest pipeline stage, and the bubble that it waits.
        stage: that stage.
    """

    parts: Mapping[str, float]
    stage: int

    @functools.cached_property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Layer:
    """Seconds of one layer and one micro batch on one rank.

    Attributes:
        linear, attention: forward and backward.
        up_again: the MLP's first product once more, its exchange not included.
        forward: a whole forward, as recomputation repeats it, exchanges included.
        elementwise: forward and backward.
        tensor_exchange, context_exchange: what nothing hides.
        operators: number of operators.
    """

    linear: float
    attention: float
    up_again: float
    forward: float
    elementwise: float
    tensor_exchange: float
    context_exchange: float
    operators: float


@dataclass
class TimeModel:
    """Times of a run's layouts on a machine.

    Attributes:
        machine: rates.
        shape: shape of the model.
        workload: samples.
    """

    machine: Machine
    shape: ModelShape
    workload: Workload
    _layers: dict[object, Layer] = field(default_factory=dict, repr=False)

    # A step -----------------------------------------------------------------------------------------

    def step(
        self,
        candidate: Candidate,
        *,
        up: bool,
        whole_layers: int,
        offloaded: int = 0,
        host_optimizer: bool = False,
        rows: Rows | None = None,
        stage: int | None = None,
    ) -> StepTime:
        """Time of a step.

        Args:
            candidate: the layout.
            up: whether the MLPs recompute their first product.
            whole_layers: layers of each virtual stage that are recomputed as a whole.
            offloaded: layers of each virtual stage whose activations wait in host memory.
            host_optimizer: whether the optimizer's states are in host memory, and updated there.
            rows: rows of a sample. Default: the mean of the workload.
            stage: pipeline stage whose parts are told. Default: the slowest.
        """
        rows = rows or self.workload.mean
        config, parallel, m = candidate.config, candidate.parallel, candidate.micro_batches
        layer = self._layer(candidate, rows)
        groups = Groups.of(candidate, self.machine)
        logprobs, logprob_elements, logprob_exchange = self._logprobs(candidate, rows, groups)
        send = self._send(candidate, rows, groups)
        last = len(candidate.split) - 1
        # Stages with as many layers take as long, but for the ends: the first has the embedding, the last the log-probs.
        kinds: dict[tuple[tuple[int, ...], bool, bool], list[int]] = collections.defaultdict(list)
        for rank, chunks in enumerate(candidate.split):
            kinds[chunks, rank == 0, rank == last].append(rank)
        copies = self._host_copies(candidate, rows, layer, up=up) if offloaded else 0.0
        embedding = 2 * self._tensor_exchange(candidate, Sizes.of(candidate, self.shape, rows), groups)
        table = self._table(candidate)
        stages = []
        for (chunks, is_first, is_last), ranks in kinds.items():
            n = sum(chunks)
            whole = sum(min(whole_layers, c) for c in chunks)
            parts = {
                "linear": n * layer.linear,
                "attention": n * layer.attention,
                "recompute": whole * layer.forward + (n - whole) * up * layer.up_again,
                "element-wise": n * layer.elementwise + is_last * logprob_elements + is_first * table,
                "TP exchange": n * layer.tensor_exchange + is_first * embedding + is_last * logprob_exchange,
                "CP exchange": n * layer.context_exchange,
                "log-probs": is_last * logprobs,
                "PP exchange": send * len(chunks),
                "host copies": copies * sum(max(0, min(offloaded, c - min(whole_layers, c) - 1)) for c in chunks),
            }
            if self.machine.fresh_gb_per_s is not None:
                held = self._activations(candidate, rows, is_first=is_first, is_last=is_last, on_cuda=False).peak(
                    max(chunks), whole_layers=min(whole_layers, max(chunks)), recompute_up=up
                )
                # As much as the activations are at most has been free since the micro batch before.
                fresh = len(chunks) * (held.saved + held.backward + held.logprobs)
                parts["fresh memory"] = fresh / (self.machine.fresh_gb_per_s * 1e9)
            busy = sum(parts.values())
            launches = (n + whole * _FORWARD_SHARE) * layer.operators * self.machine.operator_us * 1e-6
            # A GPU computes while the host goes ahead; on a CPU the two are one.
            parts["launches"] = max(0.0, launches - busy) if self.machine.device == "cuda" else launches
            stages.append((busy + parts["launches"], ranks, parts))
        slowest = max(seconds for seconds, _, _ in stages)
        own, ranks, parts = max(
            (kind for kind in stages if stage is None or stage in kind[1]), key=lambda kind: kind[0]
        )
        through = sum(seconds * len(ranks) for seconds, ranks, _ in stages)
        imbalance = self.workload.imbalance(
            self.shape,
            data=parallel.data_size,
            micro_batch_size=candidate.micro_batch_size,
            batch=config.training.global_batch_size,
        )
        found = {name: m * imbalance * seconds for name, seconds in parts.items()}
        # A stage waits while the pipeline fills and drains, and for the slowest one.
        found["bubble"] = imbalance * ((through - slowest) / len(candidate.split[0]) + m * (slowest - own))
        found["DP exchange"] = self._gradients(candidate, groups, sum(found.values()))
        found["optimizer"] = self._optimizer(candidate, on_host=host_optimizer)
        found["host copies"] += self._optimizer_copies(candidate) if host_optimizer else 0.0
        found["reference"] = self._online_reference(candidate, rows)
        found["stragglers"] = 0.0
        if parallel.world_size > 1:
            found["stragglers"] = self.machine.straggler_slowdown * sum(found.values())
        return StepTime({name: found.get(name, 0.0) for name in PARTS}, ranks[0] if stage is None else stage)

    # Parts ------------------------------------------------------------------------------------------

    def _layer(self, candidate: Candidate, rows: Rows) -> Layer:
        parallel, training = candidate.parallel, candidate.config.training
        key = (
            parallel.tensor_size,
            parallel.context_size,
            parallel.comm_type,
            parallel.sequence_parallel,
            training.micro_batch_size,
            training.bf16,
            rows,
        )
        if key not in self._layers:
            self._layers[key] = self._make_layer(candidate, rows)
        return self._layers[key]

    def _make_layer(self, candidate: Candidate, rows: Rows) -> Layer:
        shape, machine, sizes = self.shape, self.machine, Sizes.of(candidate, self.shape, rows)
        parallel, dtype, width = candidate.parallel, sizes.dtype, sizes.width
        groups = Groups.of(candidate, machine)
        s, r, hidden = sizes.places, sizes.rows, shape.hidden_size
        q, k, f = sizes.queries, sizes.keys, sizes.mlp

        def product(inputs: float, outputs: float) -> float:
            rate = machine.linear_flops_per_s(dtype, rows=s, width=min(inputs, outputs))
            return 2 * s * inputs * outputs / rate

        up = product(hidden, 2 * f)
        linear = product(hidden, q + 2 * k) + product(q, hidden) + up + product(f, hidden)
        pairs = self._pairs(candidate, rows)
        # Two products of the forward, five of the backward.
        work = 4 * pairs * shape.kv_channels
        attention_forward = work / machine.attention_flops_per_s(dtype, length=rows.longest, is_backward=False)
        attention_backward = 2.5 * work / machine.attention_flops_per_s(dtype, length=rows.longest, is_backward=True)

        memory, passes = machine.elementwise_bytes_per_s(dtype), PASSES[machine.device]
        copies, copies_backward = self._exchange_copies(candidate, sizes)
        # Two norms, two additions of the residual, rotation of queries and keys (seven passes), a copy of the values, the gate.
        forward_bytes = width * (r * hidden * (2 * passes.norm[0] + 6) + s * (7 * (q + k) + 2 * k + passes.gate[0] * f))
        backward_bytes = width * (
            r * hidden * (2 * passes.norm[1] + 6) + s * (7 * (q + k) + 2 * (q + 2 * k) + passes.gate[1] * f)
        )
        # Gradients of keys and values are summed in fp32; those of the weights are written, and added to the gradient buffer in
        # another pass, unless their product does both.
        backward_bytes += 16 * 2 * s * k * (parallel.context_size if sizes.gathers_keys else 1)
        if not self._fuses_gradients(candidate.config):
            each = 2 if candidate.config.parallel.grad_reduce_in_bf16 else 4
            backward_bytes += 2 * (each + width) * shape.layer_weights / parallel.tensor_size
        forward_elements = (forward_bytes + copies) / memory
        elements = forward_elements + (backward_bytes + copies_backward) / memory

        gather = self._tensor_exchange(candidate, sizes, groups)
        forward_exchange, backward_exchange = 4 * gather, (6 if sizes.gathers else 4) * gather
        if sizes.gathers and machine.device == "cuda":
            # The backward gathers inputs and scatters gradients beside the products of the weights' gradients.
            backward_exchange = 2 * gather + max(0.0, 4 * gather - linear)
        context_forward, context_backward = self._context_exchange(
            candidate, sizes, groups, attention_forward, attention_backward
        )
        operators = _FORWARD_OPERATORS + _BACKWARD_OPERATORS + _EXCHANGE_OPERATORS * (parallel.context_size > 1)
        return Layer(
            linear=3 * linear,
            attention=attention_forward + attention_backward,
            up_again=up + (gather if sizes.gathers else 0.0) + passes.gate[0] * s * f * width / memory,
            forward=linear + attention_forward + forward_elements + forward_exchange + context_forward,
            elementwise=elements,
            tensor_exchange=forward_exchange + backward_exchange,
            context_exchange=context_forward + context_backward,
            operators=operators,
        )

    def _fuses_gradients(self, config: Config) -> bool:
        """Whether the layers are megatron-core's, whose products add gradients of weights to their sums."""
        is_core = config.model.transformer_impl != "transformer_engine"
        return is_core and fuses_weight_gradients(config, torch.device(self.machine.device))

    def _pairs(self, candidate: Candidate, rows: Rows) -> float:
        """Query-key pairs of all this rank's heads."""
        parallel = candidate.parallel
        heads = self.shape.num_attention_heads / parallel.tensor_size
        pairs = candidate.micro_batch_size * rows.pairs * heads / parallel.context_size
        if parallel.context_size > 1 and parallel.comm_type == "allgather":
            pairs *= rows.imbalance(parallel.context_size)
        return pairs

    def _tensor_exchange(self, candidate: Candidate, sizes: Sizes, groups: Groups) -> float:
        """One exchange of hidden states over the tensor-parallel ranks: half an all-reduce, or what takes its place."""
        whole = sizes.places * self.shape.hidden_size * sizes.width
        if sizes.gathers:
            return groups.tensor.gather(whole)
        # Without sequence parallelism, two of the four are all-reduces and two are nothing.
        return groups.tensor.all_reduce(whole) / 2 if candidate.parallel.tensor_size > 1 else 0.0

    def _exchange_copies(self, candidate: Candidate, sizes: Sizes) -> tuple[float, float]:
        """Bytes of the copies that context parallelism makes before and after its exchanges."""
        parallel = candidate.parallel
        if parallel.context_size == 1:
            return 0.0, 0.0
        s, w, q, k = sizes.places, sizes.width, sizes.queries, sizes.keys
        if sizes.gathers_keys:
            everywhere = 2 * k * s * parallel.context_size
            return w * 2 * (2 * k * s + everywhere), w * 2 * (2 * k * s + everywhere) + 12 * everywhere
        moved = q + 2 * k * sizes.copies
        return w * s * (4 * moved + 4 * q), w * s * (4 * moved + 8 * q)

    def _context_exchange(
        self, candidate: Candidate, sizes: Sizes, groups: Groups, forward: float, backward: float
    ) -> tuple[float, float]:
        """What the attention of one layer does not hide of its exchanges, in the forward and in the backward.

        Heads go in groups: the first waits for its exchange, and the others' are under way while one is computed.
        """
        parallel = candidate.parallel
        if parallel.context_size == 1:
            return 0.0, 0.0
        s, w, q, k, group = sizes.places, sizes.width, sizes.queries, sizes.keys, groups.context
        if sizes.gathers_keys:
            pieces = min(HEAD_GROUPS, sizes.kv_heads)
            everywhere = 2 * k * s * parallel.context_size
            first = group.gather(w * everywhere, pieces)
            last, back = 0.0, group.gather(4 * everywhere, pieces)
        else:
            ranks = parallel.context_size
            heads = self.shape.num_attention_heads // parallel.tensor_size
            pieces = len(head_groups_of(heads // ranks, max(1, sizes.kv_heads // ranks), HEAD_GROUPS))
            moved = q + 2 * k * sizes.copies
            first, last = group.all_to_all(w * s * moved, pieces), group.all_to_all(w * s * q, pieces)
        if not sizes.gathers_keys:
            in_backward = (
                group.all_to_all(w * s * 2 * q, pieces),
                group.all_to_all(w * s * (q + 2 * k * sizes.copies), pieces),
            )
        else:
            in_backward = (first, back)
        return (
            self._exposed(first, last, forward, pieces),
            self._exposed(*in_backward, backward, pieces),
        )

    def _exposed(self, before: float, after: float, compute: float, pieces: int) -> float:
        if self.machine.device == "cpu":
            # The cores that compute also copy.
            return before + after
        exchange = before + after
        return exchange / pieces + max(0.0, (exchange - compute) * (1 - 1 / pieces))

    def _logprobs(self, candidate: Candidate, rows: Rows, groups: Groups) -> tuple[float, float, float]:
        """Products, element-wise work and exchanges of the log-probs of a micro batch, on the last stage."""
        sizes, shape, machine = Sizes.of(candidate, self.shape, rows), self.shape, self.machine
        each = candidate.micro_batch_size / candidate.parallel.context_size
        known, later = rows.known_losses * each, rows.later_losses * each
        # Three products where the gradient is known, four where logits are made twice.
        rate = machine.logprob_flops_per_s(sizes.dtype, rows=max(1.0, known + later), width=shape.hidden_size)
        products = 2 * (3 * known + 4 * later) * sizes.vocabulary * shape.hidden_size / rate
        elements = sizes.vocabulary * (known + _TWICE * later) / machine.logits_per_s(sizes.dtype)
        hidden = shape.hidden_size * sizes.width
        if sizes.gathers:
            exchange = groups.tensor.gather(hidden * (2 * known + 3 * later), 2)
        else:
            exchange = groups.tensor.all_reduce(hidden * sizes.places)
        return products, elements, exchange

    def _table(self, candidate: Candidate) -> float:
        """Seconds of the embedding's gradient of a micro batch: as large as the table, set to zero and added to the sums."""
        width, dtype = 2 if candidate.config.training.bf16 else 4, dtype_of(candidate.config)
        numbers = self._vocabulary(candidate) * self.shape.hidden_size
        return (2 * width + 8) * numbers / self.machine.elementwise_bytes_per_s(dtype)

    def _send(self, candidate: Candidate, rows: Rows, groups: Groups) -> float:
        """Hidden states to the next stage and their gradient back, for one virtual stage of one micro batch."""
        sizes = Sizes.of(candidate, self.shape, rows)
        return 2 * groups.pipeline.send(sizes.rows * self.shape.hidden_size * sizes.width)

    def _host_copies(self, candidate: Candidate, rows: Rows, layer: Layer, *, up: bool) -> float:
        """What computing a layer does not hide of copying another one's activations to the host and back."""
        activations = self._activations(candidate, rows, is_first=False, is_last=False, on_cuda=True)
        seconds = activations.kept(recompute_up=up) / (self.machine.host_link_gb_per_s * 1e9)
        whole = layer.linear + layer.attention + layer.elementwise + layer.tensor_exchange + layer.context_exchange
        return max(0.0, seconds - layer.forward) + max(0.0, seconds - (whole - layer.forward))

    def _activations(
        self, candidate: Candidate, rows: Rows, *, is_first: bool, is_last: bool, on_cuda: bool
    ) -> Activations:
        tokens = candidate.micro_batch_size * rows.places
        config, parallel = candidate.config, candidate.parallel
        return Activations(
            self.shape, config, parallel, tokens=tokens, is_first=is_first, is_last=is_last, on_cuda=on_cuda
        )

    def parameters(self, candidate: Candidate) -> float:
        """Weights of the largest rank."""
        shape, tensor = self.shape, candidate.parallel.tensor_size
        layers = [sum(chunks) for chunks in candidate.split]
        vocabulary = self._vocabulary(candidate) * shape.hidden_size
        ends = 1 if len(layers) > 1 or not shape.untie_embeddings_and_output_weights else 2
        return max(layers) * shape.layer_weights / tensor + ends * vocabulary

    def _vocabulary(self, candidate: Candidate) -> int:
        model, tensor = candidate.config.model, candidate.parallel.tensor_size
        return padded_vocab_size(self.shape.vocab_size, model.make_vocab_size_divisible_by, tensor) // tensor

    def _gradients(self, candidate: Candidate, groups: Groups, step: float) -> float:
        """Gradients summed over the data- and context-parallel ranks, new weights gathered from them, tied embeddings summed."""
        config, parallel = candidate.config, candidate.parallel
        weights = self.parameters(candidate)
        each = 2 if config.parallel.grad_reduce_in_bf16 else 4
        if config.parallel.use_distributed_optimizer:
            back = groups.shards.gather(weights * (2 if config.training.bf16 else 4))
            forth = groups.shards.gather(weights * each)
        else:
            back, forth = 0.0, groups.shards.all_reduce(weights * each)
        if config.parallel.overlap_grad_reduce and self.machine.device == "cuda":
            # Beside the backward of the last micro batch.
            forth = max(0.0, forth - 0.6 * step / candidate.micro_batches)
        tied = 0.0
        if parallel.pipeline_size > 1 and not self.shape.untie_embeddings_and_output_weights:
            ends = Group(2, groups.pipeline.stride * (parallel.pipeline_size - 1), self.machine)
            tied = ends.all_reduce(each * self._vocabulary(candidate) * self.shape.hidden_size)
        return back + forth + tied

    def _share(self, candidate: Candidate) -> float:
        """Weights of the largest rank that it updates."""
        config = candidate.config.parallel
        return self.parameters(candidate) / (candidate.parallel.dp_cp_size if config.use_distributed_optimizer else 1)

    def _optimizer(self, candidate: Candidate, *, on_host: bool) -> float:
        """Seconds of an update, and of setting the gradient buffer to zero."""
        config, share = candidate.config, self._share(candidate)
        there = config.optimizer.optimizer_offload_fraction * share if on_host else 0.0
        each = _UPDATE_BYTES[config.optimizer.optimizer]
        size = each * (share - there) + _AROUND_UPDATE_BYTES * share
        size += (2 if config.parallel.grad_reduce_in_bf16 else 4) * self.parameters(candidate)
        on_cores = there * (each + _HOST_CONVERSION_BYTES * config.training.bf16)
        return size / self.machine.optimizer_bytes_per_s + on_cores / self.machine.host_update_bytes_per_s

    def _optimizer_copies(self, candidate: Candidate) -> float:
        """Seconds that an update on the host waits for fp32 gradients to come and for weights to go back."""
        config = candidate.config
        there = config.optimizer.optimizer_offload_fraction * self._share(candidate)
        link = self.machine.host_link_gb_per_s * 1e9
        coming, going = 4 * there / link, (2 if config.training.bf16 else 4) * there / link
        if config.optimizer.overlap_cpu_optimizer_d2h_h2d:
            # Gradients come beside the update of other parameters; the copy back of converted weights waits for its end.
            update = there * _UPDATE_BYTES[config.optimizer.optimizer] / self.machine.host_update_bytes_per_s
            coming = max(0.0, coming - update)
        return coming + going

    # The reference ----------------------------------------------------------------------------------

    def _forward(self, candidate: Candidate, *, places: float, pairs: float, longest: float) -> float:
        """A forward of rows that are not cut over context-parallel ranks, through all stages."""
        shape, machine = self.shape, self.machine
        tensor, dtype = candidate.parallel.tensor_size, dtype_of(candidate.config)
        rate = machine.linear_flops_per_s(dtype, rows=places, width=shape.hidden_size / tensor)
        linear = 2 * places * shape.layer_weights / tensor / rate
        attention = 4 * pairs * shape.query_width / tensor
        attention /= machine.attention_flops_per_s(dtype, length=longest, is_backward=False)
        return shape.num_layers * (linear + attention)

    def _scored(self, candidate: Candidate, rows: Rows) -> float:
        """Seconds of scoring one sample with the reference, on the ranks that hold one model."""
        loss = candidate.config.objective
        which = spec_of(loss.objective, loss.loss_type).reference_rows
        if which is None:
            return 0.0
        if which == "short":
            return self._forward(
                candidate, places=rows.short_places, pairs=rows.short_pairs, longest=max(1, rows.short_places)
            )
        context = candidate.parallel.context_size
        return self._forward(candidate, places=rows.places / context, pairs=rows.pairs / context, longest=rows.longest)

    def reference_pass(self, candidate: Candidate, samples: int) -> float:
        """Seconds of scoring all samples once, before training begins (reference=cached)."""
        if candidate.config.reference.reference != "cached":
            return 0.0
        parallel, rows = candidate.parallel, self.workload.mean
        return samples * self._scored(candidate, rows) / self._reference_ranks(candidate) / parallel.pipeline_size

    def _reference_ranks(self, candidate: Candidate) -> int:
        loss, parallel = candidate.config.objective, candidate.parallel
        short = spec_of(loss.objective, loss.loss_type).reference_rows == "short"
        return parallel.data_size * (parallel.context_size if short else 1)

    def _online_reference(self, candidate: Candidate, rows: Rows) -> float:
        """Seconds per step of scoring with a reference in every step, the swap of its weights included."""
        reference = candidate.config.reference
        if reference.reference != "online" or not self._scored(candidate, rows):
            return 0.0
        batch, ranks = candidate.config.training.global_batch_size, self._reference_ranks(candidate)
        seconds = -(-batch // ranks) * self._scored(candidate, rows)
        if reference.reference_model == "swapped":
            each = 2 if candidate.config.training.bf16 else 4
            seconds += 2 * each * self.parameters(candidate) / (self.machine.host_link_gb_per_s * 1e9)
        return seconds


@dataclass(frozen=True)
class Sizes:
    """Sizes of a micro batch on one rank; see the shape legend.

    Attributes:
        width: bytes of a number.
        gathers: whether hidden states are cut over the tensor-parallel ranks.
        gathers_keys: whether context parallelism gathers keys and values.
        kv_heads: key-value heads of a tensor-parallel rank.
        copies: copies of each of them that an all-to-all makes.
    """

    places: float
    rows: float
    queries: float
    keys: float
    mlp: float
    vocabulary: float
    dtype: str
    width: int
    gathers: bool
    gathers_keys: bool
    kv_heads: int
    copies: float

    @classmethod
    def of(cls, candidate: Candidate, shape: ModelShape, rows: Rows) -> Sizes:
        config, parallel = candidate.config, candidate.parallel
        tensor, context = parallel.tensor_size, parallel.context_size
        gathers = parallel.sequence_parallel and tensor > 1
        cut = context * (tensor if gathers else 1) * alignment(config.training)
        places = round_up(candidate.micro_batch_size * rows.places, cut) // context
        kv_heads = max(1, shape.num_query_groups // tensor)
        gathers_keys = context > 1 and parallel.comm_type == "allgather"
        return cls(
            places=places,
            rows=places / tensor if gathers else places,
            queries=shape.query_width / tensor,
            keys=shape.kv_width / tensor,
            mlp=shape.ffn_hidden_size / tensor,
            vocabulary=shape.vocab_size / tensor,
            dtype=dtype_of(config),
            width=2 if config.training.bf16 else 4,
            gathers=gathers,
            gathers_keys=gathers_keys,
            kv_heads=kv_heads,
            copies=1.0 if gathers_keys else max(1.0, context / kv_heads),
        )


def dtype_of(config: Config) -> str:
    return "bfloat16" if config.training.bf16 else "float32"


@dataclass(frozen=True)
class Groups:
    """Groups of a layout in megatron-core's order: tensor, context, data, pipeline; ``shards`` are the dp_cp ranks."""

    tensor: Group
    context: Group
    shards: Group
    pipeline: Group

    @classmethod
    def of(cls, candidate: Candidate, machine: Machine) -> Groups:
        parallel = candidate.parallel
        tensor, both = parallel.tensor_size, parallel.context_size * parallel.data_size
        return cls(
            tensor=Group(tensor, 1, machine),
            context=Group(parallel.context_size, tensor, machine),
            shards=Group(both, tensor, machine),
            pipeline=Group(parallel.pipeline_size, tensor * both, machine),
        )
