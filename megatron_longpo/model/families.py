"""Model families: the table of each one's tensors, and how its config.json is read and written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megatron_longpo.errors import CheckpointError, one_line
from megatron_longpo.model.entries import QKV, Entry, GateUp, Plain
from megatron_longpo.model.rotary import SCALING_KEYS, check_scaling
from megatron_longpo.model.shape import (
    MAX_FFN_HIDDEN_SIZE,
    MAX_HEAD_SIZE,
    MAX_HEADS,
    MAX_HIDDEN_SIZE,
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_VOCABULARY,
    ModelShape,
)


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        architecture: name in config.json's ``architectures``.
        model_type: config.json's ``model_type``.
        entries: all tensors except the output layer.
        qkv_bias: whether query, key and value have biases.
        qk_layernorm: whether queries and keys are normed per head.
        rotary_percent: fraction of a head's channels that are rotated if config.json does not say.
        rotary_interleaved: whether RoPE pairs neighbouring channels.
        window_key: config.json's key for the sliding window, if the family has one.
        understood: config.json keys that change the arithmetic, each with the values that are supported (the first is the
            default). Any other value is refused.
    """

    architecture: str
    model_type: str
    entries: tuple[Entry, ...]
    qkv_bias: bool = False
    qk_layernorm: bool = False
    rotary_percent: float = 1.0
    rotary_interleaved: bool = False
    window_key: str | None = None
    understood: tuple[tuple[str, tuple[Any, ...]], ...] = ()


_ATTENTION = (
    Plain("embedding.word_embeddings.weight", "model.embed_tokens.weight", dims="VH"),
    Plain(
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight", "model.layers.*.input_layernorm.weight", dims="H"
    ),
    QKV(
        "decoder.layers.self_attention.linear_qkv.weight",
        q="model.layers.*.self_attn.q_proj.weight",
        k="model.layers.*.self_attn.k_proj.weight",
        v="model.layers.*.self_attn.v_proj.weight",
    ),
    Plain("decoder.layers.self_attention.linear_proj.weight", "model.layers.*.self_attn.o_proj.weight", dims="HQ"),
    Plain(
        "decoder.layers.mlp.linear_fc1.layer_norm_weight", "model.layers.*.post_attention_layernorm.weight", dims="H"
    ),
)
_GATE_AND_UP = (
    GateUp(
        "decoder.layers.mlp.linear_fc1.weight",
        gate="model.layers.*.mlp.gate_proj.weight",
        up="model.layers.*.mlp.up_proj.weight",
    ),
)
# Already concatenated, like ours.
_GATE_UP = (Plain("decoder.layers.mlp.linear_fc1.weight", "model.layers.*.mlp.gate_up_proj.weight", dims="GH"),)
_LAST = (
    Plain("decoder.layers.mlp.linear_fc2.weight", "model.layers.*.mlp.down_proj.weight", dims="HF"),
    Plain("decoder.final_layernorm.weight", "model.norm.weight", dims="H"),
)
_COMMON = _ATTENTION + _GATE_AND_UP + _LAST
_QKV_BIAS = (
    QKV(
        "decoder.layers.self_attention.linear_qkv.bias",
        q="model.layers.*.self_attn.q_proj.bias",
        k="model.layers.*.self_attn.k_proj.bias",
        v="model.layers.*.self_attn.v_proj.bias",
        columns="",
    ),
)
_HEAD_NORMS = (
    Plain("decoder.layers.self_attention.q_layernorm.weight", "model.layers.*.self_attn.q_norm.weight", dims="D"),
    Plain("decoder.layers.self_attention.k_layernorm.weight", "model.layers.*.self_attn.k_norm.weight", dims="D"),
)
_OUTPUT = Plain("output_layer.weight", "lm_head.weight", dims="VH")

FAMILIES: dict[str, Family] = {
    # Llama 2, 3, 3.1 and 3.2, SmolLM2, LWM.
    "llama": Family(
        "LlamaForCausalLM",
        "llama",
        entries=_COMMON,
        understood=(("attention_bias", (False, None)), ("mlp_bias", (False, None)), ("pretraining_tp", (1, None))),
    ),
    # v0.1 with its sliding window, v0.2, v0.3, YaRN-Mistral.
    "mistral": Family("MistralForCausalLM", "mistral", entries=_COMMON, window_key="sliding_window"),
    # Qwen2 and Qwen2.5.
    "qwen2": Family(
        "Qwen2ForCausalLM",
        "qwen2",
        entries=_COMMON + _QKV_BIAS,
        qkv_bias=True,
        understood=(("use_sliding_window", (False, None)),),
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        "qwen3",
        entries=_COMMON + _HEAD_NORMS,
        qk_layernorm=True,
        understood=(("use_sliding_window", (False, None)), ("attention_bias", (False, None))),
    ),
    # GLM-4-9B and its 1M version, in the form that transformers supports natively.
    "glm": Family(
        "GlmForCausalLM",
        "glm",
        entries=_ATTENTION + _GATE_UP + _LAST + _QKV_BIAS,
        qkv_bias=True,
        rotary_percent=0.5,
        rotary_interleaved=True,
        understood=(("attention_bias", (True,)),),
    ),
}


def entries_of(shape: ModelShape) -> tuple[Entry, ...]:
    """List all tensors of a model, in file order."""
    entries = FAMILIES[shape.family].entries
    return (*entries, _OUTPUT) if shape.untie_embeddings_and_output_weights else entries


# Largest values of config.json's whole numbers.
_LARGEST = {
    "num_hidden_layers": MAX_LAYERS,
    "hidden_size": MAX_HIDDEN_SIZE,
    "intermediate_size": MAX_FFN_HIDDEN_SIZE,
    "num_attention_heads": MAX_HEADS,
    "num_key_value_heads": MAX_HEADS,
    "head_dim": MAX_HEAD_SIZE,
    "vocab_size": MAX_VOCABULARY,
    "max_position_embeddings": MAX_POSITIONS,
}


def check_numbers(config: dict[str, Any], source: str) -> None:
    """Check that the sizes in a config.json, of any family, are numbers between 1 and their limits.

    Raises:
        CheckpointError: the first that is not.
    """
    for key, largest in _LARGEST.items():
        value = config.get(key)
        if value is None:
            continue
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 1 <= value <= largest or value != int(value):
            raise CheckpointError(
                f"{source}: {key}={one_line(repr(value), 40)} must be a whole number from 1 to {largest}; download the "
                "model again"
            )


def shape_from_hf(config: dict[str, Any], source: str) -> ModelShape:
    """Read the shape of a model from its config.json.

    Raises:
        CheckpointError: the architecture is unknown, a key is missing, or a value is not supported.
    """
    architectures, model_type = config.get("architectures"), config.get("model_type")
    architectures = architectures if isinstance(architectures, list) else []
    family_name = next(
        (n for n, f in FAMILIES.items() if f.architecture in architectures or f.model_type == model_type),
        None,
    )
    # transformers goes by model_type: one that it does not know is for code of the model's own.
    if family_name is None or model_type not in (None, *(f.model_type for f in FAMILIES.values())):
        known = ", ".join(f.architecture for f in FAMILIES.values())
        raise CheckpointError(
            f"{source}: architectures={architectures} with model_type={config.get('model_type')!r} is unknown; known are "
            f"{known} (docs/adding_a_family.md)"
        )
    family = FAMILIES[family_name]
    for key, values in (*family.understood, ("hidden_act", ("silu",))):
        if config.get(key, values[0]) not in values:
            raise CheckpointError(
                f"{source}: {key}={config[key]!r} is not supported for {family.architecture}; supported: "
                f"{', '.join(map(repr, values))}"
            )
    check_numbers(config, source)
    theta, scaling, percent = _rope(config, family, source)
    window = config.get(family.window_key) if family.window_key else None
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise CheckpointError(f"{source}: {family.window_key}={window!r} must be a whole number of tokens, or null")

    def number(key: str, default: Any = None) -> Any:
        value = config.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < math.inf:
            raise CheckpointError(
                f"{source}: {key}={one_line(repr(value), 40)} must be a number; is this the model's config.json?"
            )
        return value

    heads = int(number("num_attention_heads"))
    hidden = int(number("hidden_size"))
    shape = ModelShape(
        family=family_name,
        num_layers=int(number("num_hidden_layers")),
        hidden_size=hidden,
        ffn_hidden_size=int(number("intermediate_size")),
        num_attention_heads=heads,
        num_query_groups=int(number("num_key_value_heads", heads)),
        kv_channels=int(number("head_dim", hidden // heads)),
        vocab_size=int(number("vocab_size")),
        layernorm_epsilon=float(number("rms_norm_eps", 1e-6)),
        add_qkv_bias=family.qkv_bias,
        untie_embeddings_and_output_weights=not config.get("tie_word_embeddings", False),
        rotary_base=theta,
        max_position_embeddings=int(number("max_position_embeddings")),
        init_method_std=float(number("initializer_range", 0.02)),
        qk_layernorm=family.qk_layernorm,
        window_size=window,
        rotary_percent=percent,
        rotary_interleaved=family.rotary_interleaved,
        rope_scaling=scaling,
    )
    shape.check(source)
    return shape


def _rope(config: dict[str, Any], family: Family, source: str) -> tuple[float, dict[str, Any] | None, float]:
    """Read RoPE theta, scaling and the fraction of rotated channels.

    transformers 5 stores them in ``rope_parameters``, and 4 in ``rope_theta``, ``rope_scaling`` and ``partial_rotary_factor``.
    """
    for key in ("rope_parameters", "rope_scaling"):
        if config.get(key) is not None and not isinstance(config[key], dict):
            raise CheckpointError(f"{source}: {key}={config[key]!r} must be a mapping, or null")
    parameters = config.get("rope_parameters") or {}
    scaling = {**(config.get("rope_scaling") or {}), **parameters}
    theta = parameters.get("rope_theta", config.get("rope_theta", 10000.0))
    percent = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", family.rotary_percent))
    for key, value in (("rope_theta", theta), ("partial_rotary_factor", percent)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise CheckpointError(f"{source}: {key}={value!r} must be a number above 0")
    # If a file does not name the original context, it means the longest one that it claims.
    scaling.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    return float(theta), check_scaling(scaling, source), float(percent)


def config_for_export(config: dict[str, Any], shape: ModelShape, dtype: str, source: str) -> dict[str, Any]:
    """Make the exported model's config.json: the source's, with its own RoPE, longest context and dtype.

    RoPE is written the way the source does it: ``rope_parameters`` (transformers 5), or ``rope_theta`` and ``rope_scaling``.

    Args:
        config: config.json of the imported model.
        shape: shape of the exported model.
        dtype: dtype of the exported weights.
        source: name of the imported model, for errors.
    """
    exported = _with_rope(config, shape, with_scaling=False)
    if not _means(exported, shape, source):
        exported = _with_rope(config, shape, with_scaling=True)
        assert _means(exported, shape, source)
    exported["dtype" if "dtype" in config else "torch_dtype"] = dtype
    return exported


def _means(config: dict[str, Any], shape: ModelShape, source: str) -> bool:
    found = shape_from_hf(config, source)
    return found.rotary_base == shape.rotary_base and found.rope_scaling == shape.rope_scaling


def _with_rope(config: dict[str, Any], shape: ModelShape, *, with_scaling: bool) -> dict[str, Any]:
    config = dict(config)
    scaling = {"rope_type": "default", **(shape.rope_scaling or {})} if with_scaling else None
    if isinstance(config.get("rope_parameters"), dict):
        kept = {k: v for k, v in config["rope_parameters"].items() if scaling is None or k not in SCALING_KEYS}
        config["rope_parameters"] = {**kept, "rope_theta": shape.rotary_base, **(scaling or {})}
        if scaling is not None:
            config.pop("rope_scaling", None)
    elif scaling is not None:
        # transformers before 4.43 calls it `type`.
        config["rope_scaling"] = {**scaling, "type": scaling["rope_type"]} if shape.rope_scaling else None
    if "rope_theta" in config or not isinstance(config.get("rope_parameters"), dict):
        config["rope_theta"] = shape.rotary_base
    config["max_position_embeddings"] = shape.max_position_embeddings
    return config
