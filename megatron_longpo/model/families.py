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
    largest_size,
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
        defaults: what transformers' configuration class of the family takes for keys that config.json lacks, where it is not
            what ``_DEFAULTS`` says. A key that is null is not lacking.
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
    defaults: tuple[tuple[str, Any], ...] = ()

    def default(self, key: str) -> Any:
        """What a config.json of this family means that lacks a key; None: nothing, or a value that follows from others."""
        return {**_DEFAULTS, **dict(self.defaults)}.get(key)


# Those of transformers 5.23 and 4.57. num_key_value_heads and head_dim follow from other keys where no family says otherwise;
# a model without the sizes themselves is refused.
_DEFAULTS: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}
# Keys whose family defaults export writes out, so that no reader's own defaults matter.
_WRITTEN_OUT = (
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings"),
    "sliding_window",
)


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
        defaults=(("max_position_embeddings", 2048),),
    ),
    # v0.1 with its sliding window, v0.2, v0.3, YaRN-Mistral.
    "mistral": Family(
        "MistralForCausalLM",
        "mistral",
        entries=_COMMON,
        window_key="sliding_window",
        defaults=(("num_key_value_heads", 8), ("max_position_embeddings", 131072), ("sliding_window", 4096)),
    ),
    # Qwen2 and Qwen2.5.
    "qwen2": Family(
        "Qwen2ForCausalLM",
        "qwen2",
        entries=_COMMON + _QKV_BIAS,
        qkv_bias=True,
        understood=(("use_sliding_window", (False, None)),),
        defaults=(("num_key_value_heads", 32), ("max_position_embeddings", 32768)),
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        "qwen3",
        entries=_COMMON + _HEAD_NORMS,
        qk_layernorm=True,
        understood=(("use_sliding_window", (False, None)), ("attention_bias", (False, None))),
        defaults=(("num_key_value_heads", 32), ("head_dim", 128), ("max_position_embeddings", 32768)),
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
        defaults=(
            ("num_key_value_heads", 2),
            ("head_dim", 128),
            ("max_position_embeddings", 131072),
            ("rms_norm_eps", 1.5625e-07),
        ),
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
        most = largest_size(largest)
        if not is_number or not 1 <= value <= most or value != int(value):
            raise CheckpointError(
                f"{source}: {key}={one_line(repr(value), 40)} must be a whole number from 1 to {most}; download the "
                "model again, or raise model_size_factor"
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
    _check_layer_types(config, source)
    _check_quantization(config, source)
    theta, scaling, percent = _rope(config, family, source)
    window = config.get(family.window_key, family.default(family.window_key)) if family.window_key else None
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise CheckpointError(f"{source}: {family.window_key}={window!r} must be a whole number of tokens, or null")
    is_tied = config.get("tie_word_embeddings", family.default("tie_word_embeddings"))
    if not isinstance(is_tied, bool):
        raise CheckpointError(f"{source}: tie_word_embeddings={one_line(repr(is_tied), 40)} must be true or false")

    def number(key: str, derived: Any = None) -> Any:
        value = config.get(key, family.default(key))
        if value is None:
            value = derived
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
        layernorm_epsilon=float(number("rms_norm_eps")),
        add_qkv_bias=family.qkv_bias,
        untie_embeddings_and_output_weights=not is_tied,
        rotary_base=theta,
        max_position_embeddings=int(number("max_position_embeddings")),
        init_method_std=float(number("initializer_range")),
        qk_layernorm=family.qk_layernorm,
        window_size=window,
        rotary_percent=percent,
        rotary_interleaved=family.rotary_interleaved,
        rope_scaling=scaling,
    )
    shape.check(source)
    return shape


def _check_layer_types(config: dict[str, Any], source: str) -> None:
    """Refuse layers with a window of their own: transformers' Qwen classes take them from ``layer_types``."""
    kinds = config.get("layer_types") or ()
    other = [kind for kind in kinds if kind != "full_attention"] if isinstance(kinds, list) else [kinds] * bool(kinds)
    if other:
        raise CheckpointError(
            f"{source}: layer_types has {one_line(repr(other[0]), 40)}, but only full_attention is supported in every layer; "
            "use a model without it"
        )


def _check_quantization(config: dict[str, Any], source: str) -> None:
    """Refuse a model whose weights are to be dequantised: what its tensors mean is in that section."""
    for key in QUANTIZATION_KEYS:
        if config.get(key):
            raise CheckpointError(
                f"{source}: has a {key}, so its weights are not plain numbers; use the model from before quantisation, or "
                f"remove {key} if the weights were dequantised already"
            )


# Sections of config.json that make loaders take plain weights for quantised ones.
QUANTIZATION_KEYS = ("quantization_config", "compression_config")


def _rope(config: dict[str, Any], family: Family, source: str) -> tuple[float, dict[str, Any] | None, float]:
    """Read RoPE theta, scaling and the fraction of rotated channels.

    transformers 5 stores them in ``rope_parameters``, and 4 in ``rope_theta``, ``rope_scaling`` and ``partial_rotary_factor``.
    Both may be there; where they disagree, readers would make different models of them.

    Raises:
        CheckpointError: a value is of another type or out of its range, or the two forms disagree.
    """
    for key in ("rope_parameters", "rope_scaling"):
        if config.get(key) is not None and not isinstance(config[key], dict):
            raise CheckpointError(f"{source}: {key}={config[key]!r} must be a mapping, or null")
    forms = {key: config[key] for key in ("rope_parameters", "rope_scaling") if config.get(key)}
    theta = _agreed("rope_theta", config, forms, family.default("rope_theta"), source)
    percent = _agreed("partial_rotary_factor", config, forms, family.rotary_percent, source)
    if percent != family.rotary_percent == 1:
        # transformers 5 ignores it in these families, and 4 fails.
        raise CheckpointError(f"{source}: partial_rotary_factor={percent:g} is not supported for {family.architecture}")
    # If a file does not name the original context, it means the longest one that it claims.
    longest = config.get("max_position_embeddings", family.default("max_position_embeddings"))
    original = config.get("original_max_position_embeddings")
    scalings = {}
    for key, form in forms.items():
        found = check_scaling({"original_max_position_embeddings": original or longest, **form}, source)
        named = (found or {}).get("original_max_position_embeddings")
        if original is not None and named not in (None, original):
            raise CheckpointError(
                f"{source}: original_max_position_embeddings is {original}, but {named} in {key}; which one counts depends on "
                "the reader, so leave one of them"
            )
        scalings[key] = found
    scaling, *others = scalings.values() or (None,)
    if any(other != scaling for other in others):
        raise CheckpointError(
            f"{source}: rope_parameters means {scaling or 'no scaling'}, but rope_scaling {others[0] or 'none'}; which one "
            "counts depends on the reader, so leave one of them"
        )
    return float(theta), scaling, float(percent)


def _agreed(key: str, config: dict[str, Any], forms: dict[str, dict[str, Any]], default: Any, source: str) -> Any:
    """A number that may stand in either form of RoPE, or beside them."""
    found = {f"{key} in {name}": form[key] for name, form in forms.items() if key in form}
    if key in config:
        found[key] = config[key]
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise CheckpointError(f"{source}: {name}={value!r} must be a number above 0")
    if len(set(found.values())) > 1:
        values = ", but ".join(f"{name} is {value:g}" for name, value in found.items())
        raise CheckpointError(f"{source}: {values}; which one counts depends on the reader, so leave one of them")
    return next(iter(found.values()), default)


def config_for_export(config: dict[str, Any], shape: ModelShape, dtype: str, source: str) -> dict[str, Any]:
    """Make the exported model's config.json: the source's, with its own RoPE, longest context and dtype.

    RoPE is written in both forms, ``rope_parameters`` (transformers 5) and ``rope_theta`` with ``rope_scaling`` (transformers 4),
    and family defaults that the source leaves out are written out, so that every reader makes the same model of it.

    Args:
        config: config.json of the imported model.
        shape: shape of the exported model.
        dtype: dtype of the exported weights.
        source: name of the imported model, for errors.
    """
    config = {key: value for key, value in config.items() if key not in _LEFT_OUT}
    family = FAMILIES[shape.family]
    for key in _WRITTEN_OUT:
        if key not in config and family.default(key) is not None:
            config[key] = family.default(key)
    if family.window_key is not None:
        config[family.window_key] = shape.window_size
    config["max_position_embeddings"] = shape.max_position_embeddings
    exported = _with_rope(config, shape)
    # transformers before 4.56 knows only the second name.
    exported |= {"dtype": dtype, "torch_dtype": dtype}
    found = shape_from_hf(exported, source)
    assert found.rotary_base == shape.rotary_base and found.rope_scaling == shape.rope_scaling
    return exported


# Keys of config.json that do not hold for plain weights in files of their own: they name code, quantisation or another file.
_LEFT_OUT = frozenset({"auto_map", "transformers_weights", *QUANTIZATION_KEYS})


def _with_rope(config: dict[str, Any], shape: ModelShape) -> dict[str, Any]:
    own_percent = FAMILIES[shape.family].rotary_percent
    has_percent = shape.rotary_percent != 1 or own_percent != 1
    percent = {"partial_rotary_factor": shape.rotary_percent} if has_percent else {}
    # What else the source says there has no meaning for us, but perhaps for others.
    forms = [config.get(key) or {} for key in ("rope_scaling", "rope_parameters")]
    kept = {
        key: value
        for form in forms
        for key, value in form.items()
        if key not in SCALING_KEYS and key not in ("rope_theta", "partial_rotary_factor")
    }
    scaling = shape.rope_scaling
    return {
        **{k: v for k, v in config.items() if k != "original_max_position_embeddings"},
        **percent,
        "rope_theta": shape.rotary_base,
        # transformers before 4.43 calls it `type`.
        "rope_scaling": {**kept, **scaling, "type": scaling["rope_type"]} if scaling else None,
        "rope_parameters": {
            **kept,
            "rope_type": "default",
            **(scaling or {}),
            "rope_theta": shape.rotary_base,
            **percent,
        },
    }
