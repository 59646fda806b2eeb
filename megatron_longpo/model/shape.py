"""The shape of a model: read from a Hugging Face config at import and stored in every checkpoint."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_longpo.errors import CheckpointError
from megatron_longpo.schema import convert_fields

FILE_NAME = "model.json"
SCHEMA_VERSION = 1


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
        dtype: dtype of the imported weights; export writes the same unless told otherwise.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    layernorm_epsilon: float
    add_qkv_bias: bool
    untie_embeddings_and_output_weights: bool
    rotary_base: float
    max_position_embeddings: int
    init_method_std: float = 0.02
    dtype: str = "float32"
    qk_layernorm: bool = False
    window_size: int | None = None
    rotary_percent: float = 1.0
    rotary_interleaved: bool = False
    rope_scaling: dict[str, Any] | None = None
    tokenizer_hash: str | None = None
    weights_hash: str | None = None
    base_model: str | None = None

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

    def replace(self, **changes: Any) -> ModelShape:
        return dataclasses.replace(self, **changes)

    def write(self, folder: Path) -> None:
        content = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}
        (folder / FILE_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> ModelShape:
        """Read ``model.json`` of a checkpoint.

        Raises:
            CheckpointError: missing, not JSON, of another schema version, with missing or unknown keys, or with a value of
                the wrong type.
        """
        path = folder / FILE_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
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
        return cls(**values)
