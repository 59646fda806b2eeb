"""Comparison of logits: a checkpoint and a Hugging Face folder are run side by side, layer by layer.

Weights are loaded before their layer runs and dropped after it, so that neither model is ever held as a whole.
"""

from __future__ import annotations

import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_longpo.checkpoint.distributed import DistributedReader
from megatron_longpo.checkpoint.folders import resolve
from megatron_longpo.checkpoint.huggingface import HuggingFaceWeights
from megatron_longpo.config import Config
from megatron_longpo.conversion.changes import NO_CHANGES, Changes
from megatron_longpo.conversion.comparison import Sides, unequal_fields
from megatron_longpo.conversion.fused import layer_weights
from megatron_longpo.data.sequence import KeyBlock, QuerySpan
from megatron_longpo.errors import CheckpointError, one_line
from megatron_longpo.model import gpt
from megatron_longpo.model.attention import AttentionPlan
from megatron_longpo.model.families import FAMILIES, config_for_export, shape_from_hf
from megatron_longpo.model.rotary import rotary_of
from megatron_longpo.model.shape import ModelShape
from megatron_longpo.runtime import platform, process_groups
from megatron_longpo.runtime.collectives import all_gather_objects, raise_on_all_ranks, rank
from megatron_longpo.runtime.process_groups import Parallel
from megatron_longpo.runtime.progress import OnProgress, ignore_progress

_TIMEOUT_MINUTES = 60
# Only rounding differs between the two models in fp32.
BOUND = 1e-4
# Longest sliding window that a row is run past; a longer one is compared as a setting only.
LONGEST_WINDOW = 8192


@dataclass(frozen=True)
class Agreement:
    """How far two models are apart.

    Attributes:
        places: names of what was compared, in order: ``layer 0`` ... and ``logits``.
        distances: largest difference at each, relative to the largest value there.
        bound: largest distance allowed for the logits.
        tokens: number of tokens in the rows that were run.
        same_choice: fraction of the positions where both models have the same most likely next token.
        starts: positions of the rows' first tokens that were tried.
        windows: sliding windows that a row was longer than, and the largest distance of the first layer's output there.
    """

    places: list[str]
    distances: list[float]
    bound: float
    tokens: int
    same_choice: float
    starts: list[int]
    windows: dict[int, float]

    @property
    def is_close(self) -> bool:
        return all(distance <= self.bound for distance in (self.distances[-1], *self.windows.values()))

    @property
    def first_beyond(self) -> str | None:
        """First place whose distance exceeds the bound."""
        places = [*zip(self.places, self.distances, strict=True)]
        places += [(f"layer 0 past the window of {window}", distance) for window, distance in self.windows.items()]
        # A NaN distance exceeds it too.
        return next((p for p, d in places if not d <= self.bound), None)


def compare_logits(
    checkpoint: str | Path,
    hf: str | Path,
    rows: Sequence[Sequence[int]],
    *,
    changes: Changes = NO_CHANGES,
    first_position: int = 0,
    bound: float = BOUND,
    whole: bool = False,
    beyond: bool = False,
    progress: OnProgress = ignore_progress,
) -> Agreement:
    """Run both models in fp32 on rows of tokens; compare the output of every layer, and the logits.

    Collective: the first process computes, and all get the result.

    Args:
        checkpoint, hf: as for ``comparison.compare``.
        rows: token ids.
        changes: as for ``comparison.compare``.
        first_position: position of each row's first token; beyond the model's context it tests its RoPE there.
        bound: largest difference allowed between the logits, relative to the largest logit.
        whole: keep loaded weights, and so both models, in memory.
        beyond: also try the rows across the end of every context that either side names, and in the first layer rows longer than
            each sliding window of at most ``LONGEST_WINDOW`` tokens.
        progress: called with the layers run since the last call, and the total.

    Raises:
        CheckpointError: a side lacks a tensor, or a token is not in the vocabulary.
    """
    with process_groups.joined(_TIMEOUT_MINUTES):
        parallel = process_groups.set_up()
        agreement: Agreement | None = None
        with raise_on_all_ranks(Path(hf)):
            if rank() == 0:
                folder = resolve(checkpoint)
                sides = Sides.read(folder, Path(hf), changes)
                _check_rows(rows, sides.ours.vocab_size)
                reader, source = DistributedReader(folder), HuggingFaceWeights(Path(hf))
                # Weights that conversion cast are compared as the narrower side has them.
                narrow = min(
                    (reader.dtype("embedding.word_embeddings.weight"), source.dtype("model.embed_tokens.weight")),
                    key=lambda dtype: dtype.itemsize,
                )
                starts, windows = [first_position], list[int]()
                if beyond:
                    length = max(map(len, rows))
                    starts += [s for s in _starts_beyond(sides, length) if s != first_position]
                    windows = sorted({w for w in _windows(sides) if w <= LONGEST_WINDOW})
                total = (sides.ours.num_layers + sides.theirs.num_layers) * len(rows) + 2 * len(windows)
                loading = _Loading(dtype=narrow, keep=whole, on_layer=partial(progress, 1, total=total))
                ours = _OurModel(reader, sides, parallel, loading)
                theirs = _TheirModel(source, sides, loading)
                agreement = _run_both(ours, theirs, rows, starts=starts, windows=windows, bound=bound)
        (result, *_) = all_gather_objects(agreement)
    assert result is not None
    return result


def _starts_beyond(sides: Sides, length: int) -> list[int]:
    """Positions where a row of this length crosses the end of a context, original or claimed, of either side."""
    contexts = {shape.max_position_embeddings for shape in (sides.ours, sides.theirs)}
    for shape in (sides.ours, sides.theirs):
        contexts |= {v for k, v in (shape.rope_scaling or {}).items() if k == "original_max_position_embeddings"}
    return sorted({max(0, int(context) - length // 2) for context in contexts})


def _windows(sides: Sides) -> set[int]:
    return {shape.window_size for shape in (sides.ours, sides.theirs) if shape.window_size is not None}


def _check_rows(rows: Sequence[Sequence[int]], vocab_size: int) -> None:
    for row in rows:
        if not row or min(row) < 0 or max(row) >= vocab_size:
            raise CheckpointError(
                f"a row of {len(row)} tokens to compare logits on is empty or has an id beyond the vocabulary of {vocab_size}; "
                "give ids of the model's tokenizer"
            )


def _run_both(
    ours: _OurModel,
    theirs: _TheirModel,
    rows: Sequence[Sequence[int]],
    *,
    starts: Sequence[int],
    windows: Sequence[int],
    bound: float,
) -> Agreement:
    distances: dict[str, float] = {}
    same = tokens = 0
    for row in rows:
        with torch.no_grad():
            a_PSV, b_PSV = ours.logits(row, starts), theirs.logits(row, starts)
        same += int((a_PSV.argmax(-1) == b_PSV.argmax(-1)).sum())
        tokens += len(row)
        layers = zip(ours.take_outputs(), theirs.take_outputs(), strict=True)
        named = [(f"layer {i}", x, y) for i, (x, y) in enumerate(layers)]
        named += [("logits", a, b) for a, b in zip(a_PSV, b_PSV, strict=True)]
        for name, x, y in named:
            distances[name] = max(distances.get(name, 0.0), _distance(x, y))
    past = {}
    for window in windows:
        # The tokens again and again: only who sees whom matters here.
        row = [rows[0][i % len(rows[0])] for i in range(window + len(rows[0]))]
        with torch.no_grad():
            past[window] = _distance(ours.first_layer(row), theirs.first_layer(row))
    return Agreement(
        places=list(distances),
        distances=list(distances.values()),
        bound=bound,
        tokens=tokens,
        same_choice=same / (tokens * len(starts)),
        starts=list(starts),
        windows=past,
    )


def _distance(x: Tensor, y: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    distance = float((x - y).abs().max() / y.abs().max().clamp_min(torch.finfo(y.dtype).tiny))
    return float("inf") if np.isnan(distance) else distance


class _FirstLayerDoneError(Exception):
    """Ends a forward after its first layer."""


@dataclass(frozen=True)
class _Loading:
    """How the weights of both models are loaded.

    Attributes:
        dtype: dtype that weights are rounded to before they are used in fp32.
        keep: keep weights after their module has run.
        on_layer: called after each layer.
    """

    dtype: torch.dtype
    keep: bool
    on_layer: Callable[[], object]


class _LazyModel(ABC):
    """A model in fp32 that is built without weights; they are loaded when they are needed."""

    def __init__(self, loading: _Loading) -> None:
        self._loading = loading
        self._outputs: list[Tensor] = []
        self._is_first_only = False

    @abstractmethod
    def logits(self, row: Sequence[int], starts: Sequence[int]) -> Tensor:
        """Logits of a row of tokens, [starts, tokens, vocabulary], on the CPU.

        Args:
            row: token ids.
            starts: positions of the row's first token; the row is run once for each.
        """

    def first_layer(self, row: Sequence[int]) -> Tensor:
        """Output [tokens, hidden size] of the first layer; the others do not run."""
        self._is_first_only = True
        with contextlib.suppress(_FirstLayerDoneError):
            self.logits(row, [0])
        self._is_first_only = False
        (output,) = self.take_outputs()
        return output

    def take_outputs(self) -> list[Tensor]:
        """Outputs [tokens, hidden size] of the layers since the last call, in order."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def _watch(self, layer: torch.nn.Module) -> None:
        """Record the outputs of a layer."""

        def hook(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            self._outputs.append(hidden.detach().reshape(-1, hidden.shape[-1]).float())
            self._loading.on_layer()
            if self._is_first_only:
                raise _FirstLayerDoneError

        layer.register_forward_hook(hook)

    def _load_lazily(self, module: torch.nn.Module, load: Callable[[], Iterator[tuple[str, Tensor]]]) -> None:
        """Load a module's weights before it runs, and drop them after it.

        Args:
            module: a module with empty weights (on the meta device).
            load: function that yields its weights, by their names within the module.
        """
        empty = dict(module.named_parameters())
        is_loaded = False

        def before(*_: Any) -> None:
            nonlocal is_loaded
            if is_loaded:
                return
            for name, value in load():
                value = value.to(self._loading.dtype).float().to(platform.CURRENT.device)
                _set_param(module, name, torch.nn.Parameter(value, requires_grad=False))
            left = [name for name, parameter in module.named_parameters() if parameter.is_meta]
            assert not left, f"weights that are in no table: {left}"
            is_loaded = True

        def after(*_: Any) -> None:
            nonlocal is_loaded
            if not self._loading.keep:
                for name, parameter in empty.items():
                    _set_param(module, name, parameter)
                is_loaded = False

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)


def _check_reading(read: dict[str, Any], shape: ModelShape, path: str) -> None:
    """Check that transformers reads a configuration as we do, defaults of keys that are missing included.

    Raises:
        CheckpointError: the first field that it reads otherwise.
    """
    theirs = shape_from_hf({**read, "architectures": [FAMILIES[shape.family].architecture]}, path)
    for name in unequal_fields(shape, theirs):
        raise CheckpointError(
            f"{path}: transformers reads {name} as {getattr(theirs, name)}, but this program as {getattr(shape, name)}; write it "
            "into config.json, and report this"
        )


def _set_param(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> None:
    *path, last = name.split(".")
    for part in path:
        module = getattr(module, part)
    module._parameters[last] = parameter


class _OurModel(_LazyModel):
    """The model of training, without any model parallelism."""

    def __init__(self, reader: DistributedReader, sides: Sides, parallel: Parallel, loading: _Loading) -> None:
        super().__init__(loading)
        self._reader, self._shape = reader, sides.ours
        with torch.device("meta"):
            (self._model,) = gpt.build_model(self._shape, Config(), parallel, reference_layers=True)
        self._model.eval()
        self._rotary = rotary_of(self._shape, self._shape.rotary_base)
        decoder = self._model.decoder
        self._load_lazily(self._model.embedding, partial(self._weights, None, "embedding."))
        for number, layer in enumerate(decoder.layers):
            self._load_lazily(layer, partial(self._weights, number, f"decoder.layers.{number}."))
            self._watch(layer)
        self._load_lazily(decoder.final_layernorm, partial(self._weights, None, "decoder.final_layernorm."))

    def _weights(self, layer: int | None, prefix: str) -> Iterator[tuple[str, Tensor]]:
        for name, value in layer_weights(self._reader, self._shape, layer, prefix):
            yield name.removeprefix(prefix), value

    def logits(self, row: Sequence[int], starts: Sequence[int]) -> Tensor:
        n, count, device = len(row), len(starts), platform.CURRENT.device
        # All rows in one sequence, without seeing each other.
        positions = (torch.tensor(starts)[:, None] + torch.arange(n)).flatten().to(device)
        spans = tuple(QuerySpan(i * n, (i + 1) * n, (KeyBlock(i * n, (i + 1) * n, True),)) for i in range(count))
        plan = AttentionPlan.make(spans, None, window=self._shape.window_size, positions_S=np.tile(np.arange(n), count))
        tokens = torch.tensor([list(row) * count], device=device)
        hidden = self._model.hidden_states(tokens, positions[None], plan, self._rotary)
        is_untied = self._shape.untie_embeddings_and_output_weights
        prefix = "output_layer." if is_untied else "embedding.word_embeddings."
        ((_, weight),) = self._weights(None, prefix)
        return (hidden[:, 0].cpu() @ weight.to(self._loading.dtype).float().t()).unflatten(0, (count, n))


class _TheirModel(_LazyModel):
    """transformers' model."""

    def __init__(self, source: HuggingFaceWeights, sides: Sides, loading: _Loading) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        super().__init__(loading)
        self._source = source
        path = str(source.folder / "config.json")
        content, shape = sides.config, sides.theirs
        if shape_from_hf(content, path) != shape:
            content = config_for_export(content, shape, "float32", path)
        kind = content.get("model_type") or FAMILIES[shape.family].model_type
        # A deep copy, because transformers changes nested values.
        try:
            config = AutoConfig.for_model(**{**json.loads(json.dumps(content)), "model_type": kind})
            with torch.device("meta"):
                self._model = AutoModelForCausalLM.from_config(
                    # Not eager, which would hold all scores of a row that is longer than a window.
                    config,
                    attn_implementation="sdpa",
                    dtype=torch.float32,
                    trust_remote_code=False,
                )
        except Exception as error:  # whatever is wrong with a configuration comes up somewhere in transformers
            raise CheckpointError(
                f"{path}: transformers cannot build its model ({type(error).__name__}: {one_line(error)}); download the model "
                "again, or give --no-logits to compare the weights only"
            ) from None
        _check_reading(config.to_dict(), shape, path)
        self._model.eval()
        base = self._model.model
        # Its buffers are computed from the configuration, so they must not stay on the meta device.
        base.rotary_emb = type(base.rotary_emb)(config=self._model.config).to(platform.CURRENT.device)
        self._load_from_source(base.embed_tokens, "model.embed_tokens.")
        for number, layer in enumerate(base.layers):
            self._load_from_source(layer, f"model.layers.{number}.")
            self._watch(layer)
        self._load_from_source(base.norm, "model.norm.")
        self._load_from_source(self._model.lm_head, "lm_head.")

    def _load_from_source(self, module: torch.nn.Module, prefix: str) -> None:
        names = [name for name, _ in module.named_parameters()]
        self._load_lazily(module, partial(self._weights, names, prefix))

    def _weights(self, names: Sequence[str], prefix: str) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            stored = prefix + name
            if stored == "lm_head.weight" and stored not in self._source.names():
                # Tied.
                stored = "model.embed_tokens.weight"
            if stored not in self._source.names():
                raise CheckpointError(
                    f"{self._source.folder}: lacks {stored}, which transformers' model has; download the model again"
                )
            yield name, self._source.read(stored)

    def logits(self, row: Sequence[int], starts: Sequence[int]) -> Tensor:
        device = platform.CURRENT.device
        positions = (torch.tensor(starts)[:, None] + torch.arange(len(row))).to(device)
        tokens = torch.tensor([list(row)] * len(starts), device=device)
        output = self._model(input_ids=tokens, position_ids=positions, use_cache=False)
        logits: Tensor = output.logits.cpu()
        return logits
