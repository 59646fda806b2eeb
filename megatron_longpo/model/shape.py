"""The shape of a model: read from a Hugging Face config at import and stored in every checkpoint."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from megatron_longpo.errors import CheckpointError, ConfigError
from megatron_longpo.runtime.reading import read_json
from megatron_longpo.schema import Range, check_ranges, convert_fields

FILE_NAME = "model.json"
SCHEMA_VERSION = 1

# No model comes near these numbers. A damaged or hostile file must not take memory or time for what it claims.
MAX_LAYERS = 4096
MAX_HEADS = 2**14
MAX_HEAD_SIZE = 2**14
MAX_HIDDEN_SIZE = 2**18
MAX_FFN_HIDDEN_SIZE = 2**21
MAX_VOCABULARY = 2**24
MAX_POSITIONS = 2**31
MAX_BYTES = 2**24

# Limits of a shape's numbers.
_LARGEST = {
    "num_layers": MAX_LAYERS,
    "hidden_size": MAX_HIDDEN_SIZE,
    "ffn_hidden_size": MAX_FFN_HIDDEN_SIZE,
    "num_attention_heads": MAX_HEADS,
    "num_query_groups": MAX_HEADS,
    "kv_channels": MAX_HEAD_SIZE,
    "vocab_size": MAX_VOCABULARY,
    "max_position_embeddings": MAX_POSITIONS,
}
# How far models may exceed the limits in this process.
_size_factor = 1.0

_FIX = "convert the model again"
_Positive = Annotated[float, Range(gt=0, lt=math.inf, fix=_FIX)]


def allow_model_sizes(factor: float) -> None:
    """Let models exceed the limits by a factor in this process; the commands call it with ``model_size_factor``."""
    global _size_factor
    _size_factor = factor


def largest_size(limit: int) -> int:
    """A limit of this module, with the factor that the user allows."""
    return int(limit * _size_factor)


@dataclass(frozen=True)
class ModelShape:
    """Architecture of a decoder, in Megatron-LM's terms.

    Attributes:
        family: name in ``families.FAMILIES``.
        ffn_hidden_size: width of the gated MLP.
        num_query_groups: number of key-value heads.
        kv_channels: head size.
        vocab_size: true vocabulary size, without padding.
        rotary_base: RoPE theta.
        max_position_embeddings: longest context that the model claims, in tokens.
        untie_embeddings_and_output_weights: whether the output layer has its own weight.
        qk_layernorm: whether queries and keys are normed per head before they are rotated.
        window_size: sliding window in tokens, the query itself included; None for no window.
        rotary_percent: fraction of a head's channels that are rotated.
        rotary_interleaved: whether Hugging Face's weights pair channel 2i with 2i + 1. Ours always pair i with i + R;
            conversion reorders the rows.
        rope_scaling: ``rope_type`` with its numbers (``model/rotary.py``); None for plain RoPE.
        tokenizer_hash: hash of the tokenizer's vocabulary; None if the checkpoint came without a tokenizer.
        weights_hash: hash of all weights in file order, taken at import; None for a trained checkpoint.
        base_model: name of the imported model.
        base_revision: its revision on the hub; None if the imported folder did not tell.
        dtype: dtype of the imported weights; export writes the same unless told otherwise.
    """

    family: str
    num_layers: Annotated[int, Range(ge=1, fix=_FIX)]
    hidden_size: Annotated[int, Range(ge=1, fix=_FIX)]
    ffn_hidden_size: Annotated[int, Range(ge=1, fix=_FIX)]
    num_attention_heads: Annotated[int, Range(ge=1, fix=_FIX)]
    num_query_groups: Annotated[int, Range(ge=1, fix=_FIX)]
    kv_channels: Annotated[int, Range(ge=1, fix=_FIX)]
    vocab_size: Annotated[int, Range(ge=1, fix=_FIX)]
    layernorm_epsilon: Annotated[float, Range(ge=0, lt=math.inf, fix=_FIX)]
    add_qkv_bias: bool
    untie_embeddings_and_output_weights: bool
    rotary_base: _Positive
    max_position_embeddings: Annotated[int, Range(ge=1, fix=_FIX)]
    init_method_std: Annotated[float, Range(ge=0, lt=math.inf, fix=_FIX)] = 0.02
    dtype: str = "float32"
    qk_layernorm: bool = False
    window_size: Annotated[int, Range(ge=1, fix=_FIX)] | None = None
    rotary_percent: Annotated[float, Range(gt=0, le=1, fix=_FIX)] = 1.0
    rotary_interleaved: bool = False
    rope_scaling: dict[str, Any] | None = None
    tokenizer_hash: str | None = None
    weights_hash: str | None = None
    base_model: str | None = None
    base_revision: str | None = None

    @property
    def query_width(self) -> int:
        """Width of all queries of a token."""
        return self.num_attention_heads * self.kv_channels

    @property
    def kv_width(self) -> int:
        """Width of all keys of a token, which is that of all its values."""
        return self.num_query_groups * self.kv_channels

    @property
    def layer_weights(self) -> int:
        """Weights of a layer's matrices: qkv and output projections, gate, up and down projections of the MLP.

        A token's forward takes as many multiply-adds.
        """
        attention = self.hidden_size * (2 * self.query_width + 2 * self.kv_width)
        return attention + 3 * self.hidden_size * self.ffn_hidden_size

    def row_cost(self, tokens: int) -> float:
        """Multiply-adds of a layer's forward for a causal row: its matrices and two products per query-key pair."""
        pairs = tokens * tokens / 2
        return tokens * self.layer_weights + 2 * pairs * self.query_width

    def step_flops(self, cost: float, tokens: float) -> float:
        """Floating-point operations of a training step, forward and backward, without what is recomputed.

        Args:
            cost: sum of ``row_cost`` over the rows.
            tokens: tokens whose log-probs are computed.
        """
        # Two operations per multiplication, and the backward takes twice the forward.
        return 6.0 * (self.num_layers * cost + self.hidden_size * self.vocab_size * tokens)

    def replace(self, **changes: Any) -> ModelShape:
        return dataclasses.replace(self, **changes)

    def write(self, folder: Path) -> None:
        content = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}
        (folder / FILE_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> ModelShape:
        """Read ``model.json`` of a checkpoint.

        Raises:
            CheckpointError: missing, not JSON, of another schema version, with missing or unknown keys, with a value of the wrong
                type or out of its range, or of a larger model than the folder's files can hold.
        """
        path = folder / FILE_NAME
        try:
            content = read_json(path, largest_size(MAX_BYTES))
        except FileNotFoundError:
            raise CheckpointError(
                f"{folder}: contains no {FILE_NAME}, so it is not a checkpoint of this project; convert a Hugging Face "
                "model with tools/convert_checkpoint.py import"
            ) from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error}); convert the model again") from None
        if not isinstance(content, dict) or content.pop("schema_version", None) != SCHEMA_VERSION:
            raise CheckpointError(f"{path}: schema_version is not {SCHEMA_VERSION}; convert the model again")
        values = convert_fields(cls, content, f"{path}: ", CheckpointError, "convert the model again")
        required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
        missing = [name for name in required if name not in values]
        if missing:
            raise CheckpointError(f"{path}: {', '.join(missing)} is missing; convert the model again")
        shape = cls(**values)
        shape.check(str(path))
        stored = sum(file.stat().st_size for file in folder.glob("*.distcp"))
        described = shape.num_layers * shape.layer_weights
        if stored and described > largest_size(stored):
            raise CheckpointError(
                f"{path}: describes at least {described:,} weights, but its .distcp files have {stored:,} bytes; they belong to "
                "different models; convert the model again, or raise model_size_factor"
            )
        return shape

    def check(self, source: str) -> None:
        """Check that all numbers are in their ranges, and that the heads can be divided into groups.

        Args:
            source: file that they are from, for the message.

        Raises:
            CheckpointError: the first that is not.
        """
        try:
            check_ranges(self)
        except ConfigError as error:
            raise CheckpointError(f"{source}: {error}") from None
        for name, limit in _LARGEST.items():
            if getattr(self, name) > largest_size(limit):
                raise CheckpointError(
                    f"{source}: {name}={getattr(self, name)} must be at most {largest_size(limit)}; convert the model again, or "
                    "raise model_size_factor"
                )
        if self.num_attention_heads % self.num_query_groups:
            raise CheckpointError(
                f"{source}: {self.num_query_groups} key-value heads do not divide {self.num_attention_heads} attention heads; is "
                "this the model's configuration?"
            )
