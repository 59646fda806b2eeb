"""What a step of one rank holds beside weights, gradients and optimizer: an estimate of the peak, term by term.

Each term is a tensor of ``model/layers.py``, ``model/attention.py``, ``model/blocks.py`` or ``model/logprobs.py``. The peak is in
one of a few moments: the backward of an MLP or of an attention with everything saved, that of a layer which is recomputed as a
whole, that of the embedding, or the log-probs. tests/unit/test_simulation.py compares the estimate with simulated steps; it must
not be below them.

Shape legend: s = places on this context-parallel rank, r = rows of the hidden states on this rank (s / TP with sequence
parallelism), H = hidden size, Q/K = width of this rank's queries/keys, F = this rank's width of the MLP, D = head size.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

import torch

from megatron_longpo.config import Config
from megatron_longpo.model.attention import head_groups_of
from megatron_longpo.model.fp8 import alignment
from megatron_longpo.model.gpt import padded_vocab_size
from megatron_longpo.model.logprobs import ROUNDED, chunk_tokens, default_chunk_bytes
from megatron_longpo.model.shape import ModelShape
from megatron_longpo.runtime.balance import round_up
from megatron_longpo.runtime.process_groups import Parallel
from megatron_longpo.training.batch import HEAD_GROUPS


@dataclass(frozen=True)
class PeakBytes:
    """Bytes of activations at the moment that has most of them.

    Attributes:
        saved: what forwards saved for their backward, what one of them recomputed included.
        backward: what the backward of one MLP or one attention holds besides.
        logprobs: what the log-probs hold, if that is the moment.
        buffers: tables, indices, buffers of exchanges.
        update: what the optimizer's update makes for itself, if that is the moment; then there are no activations.
        records: what two computations of a micro batch leave to be compared (check_rerun_interval).
    """

    saved: int = 0
    backward: int = 0
    logprobs: int = 0
    buffers: int = 0
    update: int = 0
    records: int = 0

    @property
    def total(self) -> int:
        return self.saved + self.backward + self.logprobs + self.buffers + self.update + self.records


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro batch on one rank.

    Attributes:
        shape: shape of the model.
        config: configuration of the run.
        parallel: degrees.
        tokens: places of the micro batch, over all its context-parallel ranks.
        is_first: whether the rank is in the first stage, which has the embedding.
        is_last: whether the rank is in the last stage, which computes log-probs.
        on_cuda: whether the run is on GPUs.
    """

    shape: ModelShape
    config: Config
    parallel: Parallel
    tokens: int
    is_first: bool
    is_last: bool
    on_cuda: bool

    # Sizes ------------------------------------------------------------------------------------------

    @cached_property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.config.training.bf16 else torch.float32

    @property
    def _width(self) -> int:
        return self._dtype.itemsize

    @property
    def _gathers(self) -> bool:
        """Whether hidden states are cut over the tensor-parallel ranks and gathered for products."""
        return self.parallel.sequence_parallel and self.parallel.tensor_size > 1

    @cached_property
    def _places(self) -> int:
        cut = self.parallel.context_size * (self.parallel.tensor_size if self.parallel.sequence_parallel else 1)
        cut *= alignment(self.config.training)
        return round_up(self.tokens, cut) // self.parallel.context_size

    @cached_property
    def _rows(self) -> int:
        return self._places // self.parallel.tensor_size if self._gathers else self._places

    @property
    def _is_ulysses(self) -> bool:
        return self.parallel.context_size > 1 and self.parallel.comm_type == "a2a"

    @property
    def _query_heads(self) -> int:
        return self.shape.num_attention_heads // self.parallel.tensor_size

    @cached_property
    def _kv_heads(self) -> int:
        return max(1, self.shape.num_query_groups // self.parallel.tensor_size)

    @cached_property
    def _copies(self) -> float:
        """Copies of each key-value head that an exchange makes."""
        return max(1.0, self.parallel.context_size / self._kv_heads) if self._is_ulysses else 1.0

    @cached_property
    def _hidden(self) -> int:
        """Hidden states of this rank's rows: a layer's input."""
        return self._rows * self.shape.hidden_size * self._width

    @cached_property
    def _whole_hidden(self) -> int:
        """Hidden states of all places, as products see them."""
        return self._places * self.shape.hidden_size * self._width

    @cached_property
    def _queries(self) -> int:
        return self._places * self._query_heads * self.shape.kv_channels * self._width

    @cached_property
    def _keys(self) -> int:
        """Keys, copies included; values are as large."""
        return int(self._places * self._kv_heads * self._copies * self.shape.kv_channels * self._width)

    @cached_property
    def _mlp(self) -> int:
        """The MLP's activated tensor; its first product is twice as large."""
        return self._places * self.shape.ffn_hidden_size // self.parallel.tensor_size * self._width

    @property
    def _is_fp8(self) -> bool:
        return self.config.training.fp8_format is not None

    @property
    def _fp8_weights(self) -> int:
        """FP8 copies of a layer's weights, which its forward keeps for the backward: by rows and by columns, a byte each.
        Blackwell needs only one of them."""
        return 2 * self.shape.layer_weights // self.parallel.tensor_size if self._is_fp8 else 0

    def compared_values(self, layers: int) -> int:
        """Values that modules give in the forward and the backward of some layers, the embedding and the output (rerun.py).

        Of a layer, the norms, the sums and what is built of them give its hidden states nine times, and the products and norms of
        attention its queries and keys three times each; a layer that is recomputed gives what the forward gives once more.
        """
        attention = self._query_heads + self._kv_heads
        layer = 9 * self._rows * self.shape.hidden_size + self._places * (
            3 * attention * self.shape.kv_channels + 2 * self.shape.ffn_hidden_size // self.parallel.tensor_size
        )
        times = 3 if self.config.training.recompute_granularity == "full" else 2
        return times * layers * layer + 2 * self._places * (5 * self.shape.hidden_size + 1)

    # What is saved ----------------------------------------------------------------------------------

    @property
    def layer_input(self) -> int:
        """Saved of a layer that is recomputed as a whole."""
        return self._hidden

    @cached_property
    def without_mlp(self) -> int:
        """Saved of a layer whose MLP's first product is recomputed: the inputs of its two halves with a number per row of their
        norms, queries, keys, values, output and log-sum-exp."""
        saved = 2 * self._hidden + 2 * 4 * self._rows + self._queries + 2 * self._keys + self._queries
        saved += 4 * self._places * self._query_heads
        if self.shape.qk_layernorm:
            # Norms of heads save their inputs and a number per head.
            saved += self._queries + int(self._keys / self._copies)
            saved += 4 * self._places * (self._query_heads + self._kv_heads)
        return saved + self._fp8_weights

    @property
    def everything(self) -> int:
        """Saved of a layer of which nothing is recomputed."""
        return self.without_mlp + 2 * self._mlp

    def kept(self, *, recompute_up: bool) -> int:
        """Saved of a layer that is not recomputed as a whole."""
        return self.without_mlp if recompute_up else self.everything

    # What passes ------------------------------------------------------------------------------------

    def _mlp_backward(self, *, recomputed: bool) -> int:
        """Most that the backward of an MLP holds beyond what its layer saved."""
        both = 2 * self._mlp
        weight = self.shape.hidden_size * self.shape.ffn_hidden_size // self.parallel.tensor_size * self._width
        gathered = self._whole_hidden if self._gathers else 0
        again = both if recomputed else 0
        # The activated tensor and its gradient, the gradient that came and its gathered copy, the weight's gradient.
        second = again + 2 * self._mlp + self._hidden + gathered + weight
        # Its gradient, and that of the first product.
        gate = again + self._mlp + both + self._hidden
        # The first product is no longer needed: its gradient, the norm's output and its gradient, the weight's.
        first = both - (0 if recomputed else both) + self._hidden + 2 * self._whole_hidden + 2 * weight
        if self._is_fp8:
            # Of a product's input and of its output's gradient, FP8 copies by rows and by columns: as many bytes as they have.
            second += self._mlp + self._whole_hidden
            first += both + self._whole_hidden
        return max(second, gate, first)

    @cached_property
    def _attention_backward(self) -> int:
        """Most that the backward of an attention holds beyond what its layer saved."""
        q, k, fp32 = self._queries, self._keys, 4 / self._width
        # The kernel's gradients of keys and values per query head.
        expanded = 2 * q if self.shape.num_query_groups < self.shape.num_attention_heads else 0
        if self._is_ulysses:
            return self._ulysses_backward(expanded)
        pieces = min(HEAD_GROUPS, self._kv_heads) if self.parallel.context_size > 1 else 1
        # Of one piece: gradient of the queries twice, those of keys and values in fp32 and as the kernel gives them, and the
        # kernel's fp32 sums and its keys' and values' gradients per query head.
        kernel = 2 * q + 2 * k * fp32 + 2 * k + q * fp32 + expanded
        if self.parallel.context_size > 1:
            # When the last piece is computed: keys and values of all ranks, their gradients in fp32, those of the other pieces on
            # their way; what comes back of these, and what it is put into; then the kernel's own, or their gradients together and
            # in the ranks' order.
            everywhere = k * self.parallel.context_size
            sums, mine = 2 * everywhere * fp32, 2 * k + 2 * k * fp32 * (1 - 1 / pieces)
            expanded *= self.parallel.context_size
            of_kernel = (2 * q + q * fp32 + expanded + 2 * everywhere) / pieces
            held = self._hidden + 2 * q + 2 * everywhere / pieces + sums + mine
            return int(held + max(of_kernel, 2 * sums / pieces))
        return int(self._hidden + q + kernel)

    def _ulysses_backward(self, expanded: int) -> int:
        q, k, fp32 = self._queries, self._keys, 4 / self._width
        ranks = self.parallel.context_size
        groups = head_groups_of(self._query_heads // ranks, max(1, self._kv_heads // ranks), HEAD_GROUPS)
        part = 1 / len(groups)
        # Keys of one group, of which there may be several with the same ones: their gradients are added up in fp32.
        keys = k / len({group.keys.start for group in groups})
        sums = 2 * keys * fp32 * (1 if groups[0].is_last else 2)
        kernel = (2 * q + q * fp32 + expanded) * part + sums + 2 * keys
        # Output and gradient, sent and received, of the groups that are not computed yet; gradients on their way back of those
        # that are; output and gradient of one group by heads.
        coming, returning = 4 * q * (1 - part), (2 * q + 4 * k) * (1 - part)
        moments = (
            4 * q + 2 * q * part,
            max(coming, returning) + 2 * q * part + kernel,
            2 * (q + 2 * k) + q + 2 * k,
        )
        return int(self._hidden + q + max(moments))

    @cached_property
    def _vocabulary(self) -> int:
        """This rank's rows of the embedding and of the output weight."""
        tensor, divisor = self.parallel.tensor_size, self.config.model.make_vocab_size_divisible_by
        return padded_vocab_size(self.shape.vocab_size, divisor, tensor) // tensor

    @cached_property
    def _embedding_backward(self) -> int:
        """What the embedding's backward holds: its output's gradient, and that of the table, which is as large as the table.

        Where a 16-bit gradient is added to fp32 sums, torch's sum on a CPU first makes a copy of it in fp32 (seen in 2.13).
        """
        is_widened = not self.on_cuda and self._width < 4 and not self.config.parallel.grad_reduce_in_bf16
        table = self._vocabulary * self.shape.hidden_size * (self._width + 4 * is_widened)
        return table + self._hidden + (self._whole_hidden if self._gathers else 0)

    @cached_property
    def _logprobs(self) -> int:
        """What the log-probs hold: a chunk's logits and hidden states, and the last hidden states with their gradient."""
        shape, width, padded = self.shape, self._width, self._vocabulary
        budget = self.config.model.logprob_chunk_bytes or default_chunk_bytes(on_cuda=self.on_cuda)
        chunk = min(chunk_tokens(padded, budget, self._dtype, shape.hidden_size * self._gathers), self._places)
        logits = chunk * padded * (4 + (width if width < 4 else 0))
        states = chunk * shape.hidden_size * width * (4 if self._gathers else 2)
        # On a CPU 16-bit gradients of the weight are rounded by blocks, of which torch's sum makes a copy in fp32.
        rounded = min(ROUNDED, padded * shape.hidden_size) if width < 4 and not self.on_cuda else 0
        return logits + states + 2 * self._hidden + (width + 4) * rounded

    # The peak ---------------------------------------------------------------------------------------

    def peak(
        self,
        layers: int,
        *,
        whole_layers: int,
        recompute_up: bool,
        in_flight: int = 1,
        received: int = 0,
        offloaded: int = 0,
    ) -> PeakBytes:
        """Most bytes of activations in a step.

        Args:
            layers: layers of a model chunk.
            whole_layers: how many of them, from the first, are recomputed as a whole.
            recompute_up: whether the others recompute their MLP's first product.
            in_flight: forwards of model chunks whose backward is outstanding when most of them are.
            received: those of them whose input came from another stage.
            offloaded: how many of the layers that are not recomputed as a whole wait in host memory.
        """
        kept = self.kept(recompute_up=recompute_up)
        saving = layers - whole_layers
        waiting = whole_layers * self.layer_input + (saving - offloaded) * kept
        # Of offloaded layers, the one that is computed and the one before it are on the device; in the backward, the one after.
        chunk = waiting if not offloaded else max(waiting, whole_layers * self.layer_input + min(2, saving) * kept)
        # By the time of an attention's backward, what its MLP saved is gone.
        mlp_saved = self._hidden + (0 if recompute_up else 2 * self._mlp)
        # The last norm saves its input, until its backward, which comes before that of any layer.
        last_input = self._hidden if self.is_last else 0
        moments = [PeakBytes(saved=chunk + last_input)]
        # With activations in host memory a tensor of that size is there in the layers' backward as well. Which one is not known:
        # without it Mistral-7B was 0.2% below the simulated peak with 6 of 8 layers there, and 1.2% on the first stage of a
        # pipeline. What a stage has received is as large, and counted already.
        beside = self._hidden if offloaded and (self.is_last or not received) else 0
        if whole_layers < layers:
            moments += [
                PeakBytes(saved=chunk + beside, backward=self._mlp_backward(recomputed=recompute_up)),
                PeakBytes(saved=chunk + beside - mlp_saved, backward=self._attention_backward),
            ]
        if whole_layers:
            again = whole_layers * self.layer_input + self.everything
            moments += [
                PeakBytes(saved=again, backward=self._mlp_backward(recomputed=False)),
                PeakBytes(saved=again - self._hidden - 2 * self._mlp, backward=self._attention_backward),
            ]
        if self.is_first:
            moments.append(PeakBytes(backward=self._embedding_backward))
        if self.is_last:
            # The log-probs come when the offloaded layers have gone and none has come back.
            moments.append(PeakBytes(saved=waiting + last_input, logprobs=self._logprobs))
        largest = max(moments, key=lambda m: m.total)
        # Tables of the rotary embedding, of each forward in flight; indices; the buffer of megatron-core's gathers; neighbouring
        # stages' tensors.
        tables = self._places * self.shape.kv_channels * self._width
        always = in_flight * tables + 320 * self._places + 2**23
        always += self._whole_hidden if self._gathers else 0
        if received:
            # Interleaved, each virtual stage has a tensor on its way besides. The first stage receives gradients only, which are
            # those that its backward starts from.
            always += (2 + (self.parallel.virtual_stages or 0)) * self._hidden
            # The schedule holds what was received until its backward, though the first layer's copy of it waits in host memory.
            always += received * self._hidden if offloaded else 0
        return dataclasses.replace(largest, saved=largest.saved + (in_flight - 1) * waiting, buffers=int(always))
