"""Whether a checkpoint and a Hugging Face folder compute the same: both models run side by side, layer by layer.

Weights are loaded when their layer's turn comes and dropped after it, so that neither model is ever held whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_longpo.checkpoint.folders import resolve
from megatron_longpo.checkpoint.stream import DistributedReader, HuggingFaceWeights
from megatron_longpo.config import Config
from megatron_longpo.conversion.convert import Changes, layer_weights, read_hf_config, sides
from megatron_longpo.data.sequence import KeyBlock, QuerySpan
from megatron_longpo.errors import CheckpointError
from megatron_longpo.model import gpt
from megatron_longpo.model.attention import AttentionPlan
from megatron_longpo.model.families import FAMILIES, config_for_export, shape_from_hf
from megatron_longpo.model.rotary import rotary_of
from megatron_longpo.model.shape import ModelShape
from megatron_longpo.runtime import platform, process_groups
from megatron_longpo.runtime.collectives import all_gather_objects, raise_on_all_ranks, rank
from megatron_longpo.runtime.process_groups import Parallel


@dataclass(frozen=True)
class Agreement:
    """How far two models are apart.

    Attributes:
        places: what was compared in turn: ``layer 0`` ... and ``logits``.
        distances: largest difference at each, as a part of the largest value there.
        bound: what the distance of logits may be.
        tokens: of the rows that were run.
        same_choice: share of places whose most likely next token is the same.
    """

    places: list[str]
    distances: list[float]
    bound: float
    tokens: int
    same_choice: float

    @property
    def is_close(self) -> bool:
        return self.distances[-1] <= self.bound

    @property
    def first_beyond(self) -> str | None:
        """First place whose distance is beyond the bound."""
        return next((p for p, d in zip(self.places, self.distances, strict=True) if not d <= self.bound), None)


def compare_logits(
    checkpoint: str | Path,
    hf: str | Path,
    rows: Sequence[Sequence[int]],
    *,
    changes: Changes = Changes(),  # noqa: B008 - frozen
    first_position: int = 0,
    bound: float = 1e-4,
    whole: bool = False,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Agreement:
    """Run both models in fp32 on rows of tokens and compare what comes out of every layer, and the logits.

    Collective: the first process computes, all get the result.

    Args:
        checkpoint, hf: as for ``convert.compare``.
        rows: token ids.
        changes: as for ``convert.compare``.
        first_position: of each row's first token; beyond the model's context, to try its RoPE there.
        bound: of the logits' largest difference, as a part of the largest logit.
        whole: keep weights that were loaded, and so both models, in memory.
        progress: called with layers done and in all.

    Raises:
        CheckpointError: a side lacks a tensor, or a token is not in the vocabulary.
    """
    process_groups.start_processes(60)
    parallel = process_groups.set_up()
    found: Agreement | None = None
    with raise_on_all_ranks(Path(hf)):
        if rank() == 0:
            found = _compare(
                Path(hf), resolve(checkpoint), rows, changes, first_position, bound, whole, parallel, progress
            )
    (result, *_) = all_gather_objects(found)
    assert result is not None
    return result


def _compare(
    hf: Path,
    folder: Path,
    rows: Sequence[Sequence[int]],
    changes: Changes,
    first_position: int,
    bound: float,
    whole: bool,
    parallel: Parallel,
    progress: Callable[[int, int], None],
) -> Agreement:
    config = read_hf_config(hf)
    shape, theirs = sides(ModelShape.read(folder), shape_from_hf(config, str(hf / "config.json")), changes)
    for row in rows:
        if not row or min(row) < 0 or max(row) >= shape.vocab_size:
            raise CheckpointError(
                f"a row of {len(row)} tokens to verify with is empty or goes beyond the vocabulary of {shape.vocab_size}; "
                "give ids of the model's tokenizer"
            )
    # Weights that were cast on the way are compared as the narrower side has them.
    reader, source = DistributedReader(folder), HuggingFaceWeights(hf)
    narrow = min(
        (reader.dtype("embedding.word_embeddings.weight"), source.dtype("model.embed_tokens.weight")),
        key=lambda d: d.itemsize,
    )
    steps = (shape.num_layers + theirs.num_layers) * len(rows)
    done = 0

    def one_more() -> None:
        nonlocal done
        done += 1
        progress(done, steps)

    ours_out, theirs_out = _Layers(one_more), _Layers(one_more)
    ours = _ours(reader, shape, narrow, whole, ours_out, parallel)
    other = _theirs(hf, source, config, theirs, narrow, whole, theirs_out)
    distances: dict[str, float] = {}
    same, places = 0, 0
    for row in rows:
        with torch.no_grad():
            a, b = ours(row, first_position), other(row, first_position)
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
        places += len(row)
        pairs = [
            (f"layer {i}", x, y) for i, (x, y) in enumerate(zip(ours_out.taken(), theirs_out.taken(), strict=True))
        ]
        for name, x, y in [*pairs, ("logits", a, b)]:
            distance = float((x - y).abs().max() / y.abs().max().clamp_min(1e-30))
            distances[name] = max(distances.get(name, 0.0), float("inf") if distance != distance else distance)
    return Agreement(list(distances), list(distances.values()), bound, places, same / places)


class _Layers:
    """Outputs of the layers, in order."""

    def __init__(self, one_more: Callable[[], None]) -> None:
        self._outputs: list[Tensor] = []
        self._one_more = one_more

    def hook(self, _module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        self._outputs.append(hidden.detach().reshape(-1, hidden.shape[-1]).float())
        self._one_more()

    def taken(self) -> list[Tensor]:
        outputs, self._outputs = self._outputs, []
        return outputs


def _load_lazily(module: torch.nn.Module, load: Callable[[], Iterator[tuple[str, Tensor]]], whole: bool) -> None:
    """A module's weights, loaded before it runs and dropped after it. ``load`` gives names within the module."""
    empty = dict(module.named_parameters())
    present = [False]

    def before(*_: Any) -> None:
        if not present[0]:
            for name, value in load():
                _set_param(module, name, value.to(platform.CURRENT.device))
            left = [n for n, p in module.named_parameters() if p.is_meta]
            assert not left, f"weights that no table names: {left}"
            present[0] = True

    def after(*_: Any) -> None:
        if not whole:
            for name, parameter in empty.items():
                _set_param(module, name, parameter)
            present[0] = False

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


def _set_param(module: torch.nn.Module, name: str, value: Tensor) -> None:
    *path, last = name.split(".")
    for part in path:
        module = getattr(module, part)
    parameter = value if isinstance(value, torch.nn.Parameter) else torch.nn.Parameter(value, requires_grad=False)
    module._parameters[last] = parameter


def _ours(
    reader: DistributedReader, shape: ModelShape, narrow: torch.dtype, whole: bool, layers: _Layers, parallel: Parallel
) -> Callable[[Sequence[int], int], Tensor]:
    """The model of training, without any model parallelism, from tokens to logits."""
    with torch.device("meta"):
        (model,) = gpt.build_model(shape, Config(), parallel, reference_layers=True)
    model.eval()

    def values(layer: int | None, prefix: str) -> Iterator[tuple[str, Tensor]]:
        for name, value in layer_weights(reader, shape, layer, prefix):
            yield name.removeprefix(prefix), value.to(narrow).float()

    _load_lazily(model.embedding, lambda: values(None, "embedding."), whole)
    for number, layer in enumerate(model.decoder.layers):
        _load_lazily(layer, lambda n=number: values(n, f"decoder.layers.{n}."), whole)  # type: ignore[misc]
        layer.register_forward_hook(layers.hook)
    _load_lazily(model.decoder.final_layernorm, lambda: values(None, "decoder.final_layernorm."), whole)
    rotary = rotary_of(shape, shape.rotary_base)
    output = "output_layer." if shape.untie_embeddings_and_output_weights else "embedding.word_embeddings."

    def run(row: Sequence[int], first: int) -> Tensor:
        n = len(row)
        device = platform.CURRENT.device
        positions = torch.arange(first, first + n, device=device)
        groups = (QuerySpan(0, n, (KeyBlock(0, n, True),)),)
        plan = AttentionPlan.make(groups, None, window=shape.window_size, positions_S=np.arange(n))
        hidden = model.hidden_states(torch.tensor([row], device=device), positions[None], plan, rotary)
        (weight,) = [value for _, value in values(None, output)]
        return hidden[:, 0].cpu() @ weight.t()

    return run


def _theirs(
    hf: Path,
    source: HuggingFaceWeights,
    content: dict[str, Any],
    shape: ModelShape,
    narrow: torch.dtype,
    whole: bool,
    layers: _Layers,
) -> Callable[[Sequence[int], int], Tensor]:
    """transformers' model, from tokens to logits."""
    from transformers import AutoConfig, AutoModelForCausalLM

    path = str(hf / "config.json")
    if shape_from_hf(content, path) != shape:
        content = config_for_export(content, shape, "float32", path)
    kind = content.get("model_type") or FAMILIES[shape.family].model_type
    config = AutoConfig.for_model(**{**json.loads(json.dumps(content)), "model_type": kind})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    model.eval()
    # Its buffers come from the configuration.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(platform.CURRENT.device)

    def load_from_source(module: torch.nn.Module, prefix: str) -> None:
        def load() -> Iterator[tuple[str, Tensor]]:
            for name, _ in list(module.named_parameters()):
                stored = prefix + name
                if stored not in source.names():
                    stored = {"lm_head.weight": "model.embed_tokens.weight"}.get(stored, stored)
                if stored not in source.names():
                    raise CheckpointError(
                        f"{hf}: lacks {stored}, which transformers' model has; download the model again"
                    )
                yield name, source.read(stored).to(narrow).float()

        _load_lazily(module, load, whole)

    load_from_source(model.model.embed_tokens, "model.embed_tokens.")
    for number, layer in enumerate(model.model.layers):
        load_from_source(layer, f"model.layers.{number}.")
        layer.register_forward_hook(layers.hook)
    load_from_source(model.model.norm, "model.norm.")
    load_from_source(model.lm_head, "lm_head.")

    def run(row: Sequence[int], first: int) -> Tensor:
        device = platform.CURRENT.device
        positions = torch.arange(first, first + len(row), device=device)[None]
        logits: Tensor = model(
            input_ids=torch.tensor([row], device=device), position_ids=positions, use_cache=False
        ).logits
        return logits[0].cpu()

    return run
