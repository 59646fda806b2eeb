"""The models that the paper names, by their published configurations: every one is read as what it is."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from megatron_longpo.errors import CheckpointError
from megatron_longpo.model.families import FAMILIES, config_for_export, entries_of, shape_from_hf
from megatron_longpo.model.rotary import changed_scaling

_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5}
_MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
    "max_position_embeddings": 32768,
}
_GLM = {
    "architectures": ["GlmForCausalLM"],
    "model_type": "glm",
    "hidden_act": "silu",
    "attention_bias": True,
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "head_dim": 128,
    "vocab_size": 151552,
    "rms_norm_eps": 1.5625e-07,
    "tie_word_embeddings": False,
}


def _sizes(
    hidden: int, ffn: int, layers: int, heads: int, groups: int, vocabulary: int, longest: int
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": longest,
    }


_LLAMA31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Name -> config.json's entries, and the parameters that the model is known to have.
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Llama-2-7B": ({**_LLAMA, **_sizes(4096, 11008, 32, 32, 32, 32000, 4096)}, 6_738_415_616),
    "Llama-3-8B": ({**_LLAMA, **_sizes(4096, 14336, 32, 32, 8, 128256, 8192), "rope_theta": 5e5}, 8_030_261_248),
    "Llama-3.1-8B": (
        {
            **_LLAMA,
            **_sizes(4096, 14336, 32, 32, 8, 128256, 131072),
            "rope_theta": 5e5,
            "rope_scaling": {"rope_type": "llama3", **_LLAMA31},
        },
        8_030_261_248,
    ),
    "Llama-3.2-1B": (
        {
            **_LLAMA,
            **_sizes(2048, 8192, 16, 32, 8, 128256, 131072),
            "rope_theta": 5e5,
            "head_dim": 64,
            "tie_word_embeddings": True,
            "rope_scaling": {"rope_type": "llama3", **_LLAMA31, "factor": 32.0},
        },
        1_235_814_400,
    ),
    "LWM-Text-1M": (
        {**_LLAMA, **_sizes(4096, 11008, 32, 32, 32, 32000, 1048576), "rope_theta": 5e7},
        6_738_415_616,
    ),
    "SmolLM2-135M": (
        {**_LLAMA, **_sizes(576, 1536, 30, 9, 3, 49152, 8192), "rope_theta": 1e5, "tie_word_embeddings": True},
        134_515_008,
    ),
    "Mistral-7B-v0.1": ({**_MISTRAL, "vocab_size": 32000, "sliding_window": 4096}, 7_241_732_096),
    "Mistral-7B-v0.2": ({**_MISTRAL, "vocab_size": 32000, "sliding_window": None, "rope_theta": 1e6}, 7_241_732_096),
    "Mistral-7B-v0.3": ({**_MISTRAL, "vocab_size": 32768, "sliding_window": None, "rope_theta": 1e6}, 7_248_023_552),
    "Yarn-Mistral-7B-128k": (
        {
            **_MISTRAL,
            "vocab_size": 32000,
            "sliding_window": 131072,
            "rope_scaling": {
                "type": "yarn",
                "factor": 16.0,
                "original_max_position_embeddings": 8192,
                "finetuned": True,
            },
        },
        7_241_732_096,
    ),
    "Qwen2.5-0.5B": (
        {**_QWEN2, **_sizes(896, 4864, 24, 14, 2, 151936, 32768), "tie_word_embeddings": True},
        494_032_768,
    ),
    "Qwen2.5-7B": (
        {**_QWEN2, **_sizes(3584, 18944, 28, 28, 4, 152064, 131072), "tie_word_embeddings": False},
        7_615_616_512,
    ),
    "Qwen2.5-72B": (
        {**_QWEN2, **_sizes(8192, 29568, 80, 64, 8, 152064, 131072), "tie_word_embeddings": False},
        72_706_203_648,
    ),
    "Qwen3-8B": (
        {
            **_sizes(4096, 12288, 36, 32, 8, 151936, 40960),
            "head_dim": 128,
            "rope_theta": 1e6,
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "rms_norm_eps": 1e-6,
            "attention_bias": False,
            "use_sliding_window": False,
            "tie_word_embeddings": False,
        },
        8_190_735_360,
    ),
    "GLM-4-9B": (
        {**_GLM, "num_key_value_heads": 2, "max_position_embeddings": 131072, "rope_theta": 5e6},
        9_399_951_360,
    ),
    "GLM-4-9B-1M": (
        {**_GLM, "num_key_value_heads": 4, "max_position_embeddings": 1048576, "rope_theta": 1e8},
        9_483_857_920,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_parameters(name: str) -> None:
    config, parameters = PUBLISHED[name]
    shape = shape_from_hf(config, name)
    total = 0
    for entry in entries_of(shape):
        once = sum(math.prod(sizes) for sizes in entry.their_shapes(shape))
        total += once * (shape.num_layers if entry.stacked else 1)
    assert total == parameters


def test_query_key_and_value_are_fused_by_group() -> None:
    """Two groups of two query heads of one channel: q0 q1 k0 v0, then q2 q3 k1 v1."""
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 4, "head_dim": 1}
    shape = shape_from_hf({**PUBLISHED["Qwen2.5-7B"][0], **sizes}, "test")
    (bias,) = (entry for entry in entries_of(shape) if entry.ours.endswith("linear_qkv.bias"))
    assert bias.names(7)[1] == "model.layers.7.self_attn.k_proj.bias"
    assert bias.their_shapes(shape) == [(4,), (2,), (2,)] and bias.our_shape(shape) == (8,)
    theirs = [torch.tensor([0, 1, 2, 3]), torch.tensor([10, 11]), torch.tensor([20, 21])]
    fused = bias.fuse(theirs, shape)
    assert fused.tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert [part.tolist() for part in bias.split(fused, shape)] == [part.tolist() for part in theirs]


def test_published_rope() -> None:
    def shape(name: str) -> Any:
        return shape_from_hf(PUBLISHED[name][0], name)

    assert shape("Mistral-7B-v0.1").window_size == 4096 and shape("Mistral-7B-v0.3").window_size is None
    assert shape("Llama-3.1-8B").rope_scaling == {"rope_type": "llama3", **_LLAMA31}
    yarn = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 8192}
    assert shape("Yarn-Mistral-7B-128k").rope_scaling == yarn
    glm = shape("GLM-4-9B-1M")
    assert glm.rotary_interleaved and glm.rotary_percent == 0.5 and glm.rotary_base == 1e8
    assert shape("LWM-Text-1M").rotary_base == 5e7


@pytest.mark.parametrize("name", PUBLISHED)
def test_export_of_an_unchanged_model_keeps_its_config(name: str) -> None:
    """Every key keeps its value; what is added is RoPE's other form, the other name of the dtype, and family defaults."""
    config = {**PUBLISHED[name][0], "torch_dtype": "bfloat16"}
    config.setdefault("rope_theta", 10000.0)
    exported = config_for_export(config, shape_from_hf(config, name), "bfloat16", name)
    # The scaling's type is written under both of its names.
    scaling = {**(config.get("rope_scaling") or {})}
    kind = scaling.get("rope_type", scaling.get("type"))
    if scaling:
        assert exported["rope_scaling"] == {**scaling, "type": kind, "rope_type": kind}
    assert {key: value for key, value in exported.items() if key in config and key != "rope_scaling"} == {
        key: value for key, value in config.items() if key != "rope_scaling"
    }
    added = set(exported) - set(config)
    assert added <= {
        *("rope_parameters", "rope_scaling", "dtype", "partial_rotary_factor", "tie_word_embeddings", "sliding_window"),
        *("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings"),
    }
    assert shape_from_hf(exported, name) == shape_from_hf(config, name)
    again = config_for_export(exported, shape_from_hf(config, name), "bfloat16", name)
    assert again == exported


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("style", ["rope_scaling", "rope_parameters"])
def test_changed_rope_is_exported_in_both_forms(name: str, style: str) -> None:
    config = dict(PUBLISHED[name][0])
    if style == "rope_parameters":
        scaling = config.pop("rope_scaling", {"rope_type": "default"})
        config["rope_parameters"] = {"rope_theta": config.pop("rope_theta", 10000.0), **scaling}
    before = shape_from_hf(config, name)
    scaling = changed_scaling(before, "yarn", {"factor": 4.0, "beta_fast": 24.0}, "test")
    changed = before.replace(rotary_base=1e7, rope_scaling=scaling, max_position_embeddings=2_000_000)
    exported = config_for_export(config, changed, "bfloat16", name)
    after = shape_from_hf(exported, name)
    assert after == changed
    # Each form by itself says the same: what transformers 4 reads, and what transformers 5 does.
    old = {key: value for key, value in exported.items() if key != "rope_parameters"}
    new = {key: value for key, value in exported.items() if key not in ("rope_theta", "rope_scaling")}
    assert shape_from_hf(old, name) == shape_from_hf(new, name) == changed
    # And none at all.
    plain = config_for_export(config, before.replace(rope_scaling=None), "bfloat16", name)
    assert shape_from_hf(plain, name).rope_scaling is None


def test_a_longer_claim_does_not_stretch_the_scaling() -> None:
    """A config.json that leaves the original context out means the context it claims; export writes it down."""
    config = {**PUBLISHED["Mistral-7B-v0.2"][0], "rope_scaling": {"type": "yarn", "factor": 2.0}}
    before = shape_from_hf(config, "test")
    assert before.rope_scaling is not None and before.rope_scaling["original_max_position_embeddings"] == 32768
    exported = config_for_export(config, before.replace(max_position_embeddings=65536), "float32", "test")
    assert shape_from_hf(exported, "test").rope_scaling == before.rope_scaling


@pytest.mark.parametrize("style", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Qwen2.5-7B", "GLM-4-9B-1M", "Yarn-Mistral-7B-128k"])
def test_transformers_reads_exported_rope_as_we_do(name: str, style: str) -> None:
    from transformers import AutoConfig

    config = dict(PUBLISHED[name][0])
    if style == "rope_parameters":
        scaling = config.pop("rope_scaling", {"rope_type": "default"})
        config["rope_parameters"] = {"rope_theta": config.pop("rope_theta", 10000.0), **scaling}
    changed = shape_from_hf(config, name).replace(rotary_base=1e7)
    exported = config_for_export(config, changed, "bfloat16", name)
    read = AutoConfig.for_model(**copy.deepcopy(exported)).to_dict()
    assert shape_from_hf({**read, "architectures": config["architectures"]}, name) == changed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e7}},
            "rope_theta in rope_parameters is 1e.07, but rope_theta is",
        ),
        (
            {
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
            },
            "which one counts depends on the reader",
        ),
        (
            {
                "original_max_position_embeddings": 4096,
                "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8192},
            },
            "original_max_position_embeddings is 4096, but 8192 in rope_scaling",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has 'sliding_attention'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "has a quantization_config"),
        ({"compression_config": {"format": "pack-quantized"}}, "has a compression_config"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false' must be true or false"),
    ],
)
def test_configurations_that_readers_understand_differently_are_refused(changes: dict[str, Any], message: str) -> None:
    config = {**PUBLISHED["Qwen2.5-7B"][0], **changes}
    with pytest.raises(CheckpointError, match=message):
        shape_from_hf(config, "test")


def test_a_context_beside_the_scaling_is_its_original_one() -> None:
    """transformers 5 reads it from there; so does vLLM."""
    config = {
        **PUBLISHED["Qwen2.5-7B"][0],
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"rope_type": "yarn", "factor": 2.0},
    }
    scaling = shape_from_hf(config, "test").rope_scaling
    assert scaling == {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_that_are_missing_mean_what_transformers_takes_them_for(family: str) -> None:
    """Each key of a whole config.json is left out, then set to null: the shape is that of transformers' own configuration."""
    from transformers import AutoConfig

    sizes = {
        **_sizes(256, 96, 2, 32, 16, 101, 512),
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.01,
        "hidden_act": "silu",
        **({"sliding_window": 24} if family == "mistral" else {}),
    }
    model_type = FAMILIES[family].model_type
    whole = AutoConfig.for_model(model_type, **sizes, rope_theta=5e5, tie_word_embeddings=True).to_dict()
    whole["architectures"] = [FAMILIES[family].architecture]
    refused = set()
    for key in whole:
        for lacking in ({k: v for k, v in whole.items() if k != key}, {**whole, key: None}):
            try:
                theirs = AutoConfig.for_model(**{**copy.deepcopy(lacking), "model_type": model_type}).to_dict()
            except Exception:
                # transformers refuses it, so there is nothing to agree with.
                continue
            expected = shape_from_hf({**theirs, "architectures": whole["architectures"]}, "transformers'")
            try:
                ours = shape_from_hf(lacking, "ours")
            except CheckpointError as error:
                assert key in str(error)
                refused.add(key)
                continue
            assert ours == expected, f"{key}: {lacking.get(key, 'left out')}"
    # A model whose sizes are not given is refused rather than taken for transformers' example of 7 billion weights.
    sizes_of_a_model = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"}
    assert refused <= {*sizes_of_a_model, "attention_bias", "hidden_act", "initializer_range", "tie_word_embeddings"}


def test_an_export_leaves_no_default_to_its_reader() -> None:
    """A Mistral without sliding_window has 4096; one imported as having none is exported so."""
    config = {key: value for key, value in PUBLISHED["Mistral-7B-v0.1"][0].items() if key != "sliding_window"}
    shape = shape_from_hf(config, "test")
    assert shape.window_size == 4096
    assert config_for_export(config, shape, "bfloat16", "test")["sliding_window"] == 4096
    without = config_for_export(config, shape.replace(window_size=None), "bfloat16", "test")
    assert without["sliding_window"] is None and shape_from_hf(without, "test").window_size is None


def test_scalings_that_make_no_sense_are_refused() -> None:
    shape = shape_from_hf(PUBLISHED["Mistral-7B-v0.2"][0], "test")
    for rope_type, numbers, message in [
        (None, {"factor": 4.0}, "without rope_type"),
        ("yarn", {}, "needs factor > 0"),
        ("linear", {"factor": 2.0, "beta_fast": 3.0}, "has no beta_fast"),
        ("yarn", {"factor": -1.0}, "needs factor > 0"),
        ("dynamic", {"factor": 2.0}, "is not supported"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            changed_scaling(shape, rope_type, numbers, "test")


@pytest.mark.parametrize(("key", "limit"), [("num_hidden_layers", 4096), ("vocab_size", 2**24), ("head_dim", 2**14)])
def test_limits_of_a_models_numbers_can_be_raised(monkeypatch: pytest.MonkeyPatch, key: str, limit: int) -> None:
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 9,
    }
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": 64, **sizes}
    assert shape_from_hf({**config, key: limit}, "c")
    with pytest.raises(CheckpointError, match=rf"c: {key}={limit + 1} must be .* {limit}; .* raise model_size_factor"):
        shape_from_hf({**config, key: limit + 1}, "c")
    monkeypatch.setattr("megatron_longpo.model.shape._size_factor", 2.0)
    shape = shape_from_hf({**config, key: limit + 1}, "c")
    with pytest.raises(CheckpointError, match=rf"must be .* {2 * limit}; .* raise model_size_factor"):
        shape_from_hf({**config, key: 2 * limit + 1}, "c")
    # model.json of what was imported with the factor asks for it as well.
    monkeypatch.setattr("megatron_longpo.model.shape._size_factor", 1.0)
    with pytest.raises(
        CheckpointError, match=rf"m: \w+={limit + 1} must be at most {limit}; .* raise model_size_factor"
    ):
        shape.check("m")
