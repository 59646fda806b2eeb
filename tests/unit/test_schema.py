"""Types and ranges: what a field takes is what its annotation says, from YAML, flags and JSON alike."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_longpo import schema
from megatron_longpo.command_line import ConfigOptions, parse_with_config
from megatron_longpo.config import Config, check, from_dict, from_yaml
from megatron_longpo.data.indexed import Manifest, path_of, read_manifest
from megatron_longpo.errors import CheckpointError, ConfigError, DataError
from megatron_longpo.evaluation.settings import EvaluationConfig
from megatron_longpo.generation.settings import GenerationConfig
from megatron_longpo.model.shape import ModelShape
from megatron_longpo.schema import Count, Range, check_ranges, convert_fields
from tests.support.launch import ROOT


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "rule"),
    [
        (Range(gt=0), (1e-9, math.inf), (0, -1, math.nan), "must be positive"),
        (Range(ge=0), (0, 1), (-1,), "must not be negative"),
        (Range(ge=1), (1,), (0,), "must be at least 1"),
        (Range(ge=0, lt=0.5), (0, 0.49), (0.5,), "must be in [0, 0.5)"),
        (Range(gt=0, le=1), (1,), (0, 1.1), "must be in (0, 1]"),
        (Range(le=4), (4, -math.inf), (5,), "must be at most 4"),
        (Range(lt=math.inf), (-1,), (math.inf, math.nan), "must be finite"),
        (Range(gt=0, lt=math.inf), (1,), (math.inf, 0), "must be finite and positive"),
    ],
)
def test_ranges_and_their_words(
    bounds: Range, inside: tuple[float, ...], outside: tuple[float, ...], rule: str
) -> None:
    assert all(bounds.contains(value) for value in inside)
    assert not any(bounds.contains(value) for value in outside)
    assert bounds.rule == rule


@dataclass(frozen=True)
class Inner:
    count: Count = 1
    share: Annotated[float, Range(ge=0, le=1, fix="0.5 is half")] | None = None
    percent: Annotated[float, Range(ge=0, le=100)] = 50


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    kind: Literal["a", "b"] = "a"
    names: tuple[str, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)


def test_ranges_are_found_in_nested_sections_and_options() -> None:
    check_ranges(Outer(Inner(3, 0.5)))
    with pytest.raises(ConfigError, match=r"count=0 must be at least 1; raise it"):
        check_ranges(Outer(Inner(0)))
    with pytest.raises(ConfigError, match=r"percent=120 must be in \[0, 100\]; lower it, or leave it out"):
        check_ranges(Outer(Inner(percent=120)))
    with pytest.raises(ConfigError, match=r"percent=-1 must be in \[0, 100\]; raise it, or leave it out"):
        check_ranges(Outer(Inner(percent=-1)))
    with pytest.raises(ConfigError, match=r"share=1.5 must be in \[0, 1\]; 0.5 is half"):
        check_ranges(Outer(Inner(1, 1.5)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "c"}, "kind='c' is text; it must be one of a, b"),
        ({"kind": True}, "kind=True is a switch"),
        ({"names": "ab"}, "names='ab' is text; it must be a list of texts"),
        ({"names": [True]}, "it must be a list of texts"),
        ({"counts": {"x": "1"}}, "counts={'x': '1'} is a mapping; it must be a mapping of whole numbers"),
        ({"rows": [1]}, "it must be a list of mappings"),
        ({"kinds": "a"}, "kinds is unknown; did you mean 'kind'?"),
    ],
)
def test_values_of_the_wrong_type_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as refused:
        convert_fields(Outer, values, "file: ", DataError, "make it again")
    assert str(refused.value).startswith("file: ") and message in str(refused.value)
    assert str(refused.value).endswith("; make it again")


def test_values_that_yaml_reads_as_another_type_are_taken() -> None:
    assert from_dict(yaml.safe_load("optimizer: {lr: 5e-7, clip_grad: 1}"), "x").optimizer.clip_grad == 1.0
    assert convert_fields(Outer, {"names": ["a", 8192]}, "")["names"] == ("a", "8192")
    assert from_dict({"logging": {"profile_ranks": [0, 3]}}, "x").logging.profile_ranks == (0, 3)
    with pytest.raises(ConfigError, match="a list of whole numbers"):
        from_dict({"logging": {"profile_ranks": ["0"]}}, "x")
    with pytest.raises(ConfigError, match="a number"):
        from_dict({"optimizer": {"lr": True}}, "x")
    with pytest.raises(ConfigError, match="a whole number"):
        from_dict({"training": {"train_iters": True}}, "x")


# --------------------------------------------------------------------------------------------------
# YAML and flags say the same
# --------------------------------------------------------------------------------------------------


def values_of_type(hint: Any) -> st.SearchStrategy[Any]:
    """Values that a field takes, in range."""
    if get_origin(hint) is Annotated:
        return values_in(next(m for m in hint.__metadata__ if isinstance(m, Range)), get_args(hint)[0])
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if get_origin(hint) is tuple:
        return st.lists(values_of_type(get_args(hint)[0]), max_size=3).map(tuple)
    if hint in SCALARS:
        return SCALARS[hint]
    return st.one_of(*map(values_of_type, get_args(hint)))


def values_in(bounds: Range, kind: type) -> st.SearchStrategy[Any]:
    """Numbers in a range, by its bounds rather than by a filter, which hypothesis would find too strict."""
    least = next(x for x in (bounds.ge, bounds.gt, 0) if x is not None)
    most = next(x for x in (bounds.le, bounds.lt, math.inf) if x is not None)
    most = max(10**6, 2 * least) if most == math.inf else most
    if kind is int:
        return st.integers(int(least) + (bounds.gt is not None), int(most))
    return st.floats(least, most, exclude_min=bounds.gt is not None, exclude_max=bounds.lt is not None)


# Text that begins with a dash is a flag, and "None" is no value.
TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=8).filter(
    lambda text: not text.startswith("-") and text != "None"
)
SCALARS = {
    bool: st.booleans(),
    int: st.integers(0, 10**6),
    float: st.floats(0, 1e9, allow_nan=False),
    str: TEXTS,
    type(None): st.none(),
}


def flags_of(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if isinstance(value, tuple):
        return [f"--{flag}", *map(str, value)]
    return [f"--{flag}", str(value)]


@pytest.mark.parametrize("root", [Config, GenerationConfig, EvaluationConfig])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_configuration_is_the_same_by_yaml_and_by_flags(root: type[Any], data: st.DataObject) -> None:
    section = data.draw(st.sampled_from(dataclasses.fields(root)))
    section_type = section.default_factory
    assert isinstance(section_type, type)
    hints = get_type_hints(section_type, include_extras=True)
    names = data.draw(st.lists(st.sampled_from(sorted(hints)), max_size=4, unique=True))
    chosen = {name: data.draw(values_of_type(hints[name]), label=name) for name in names}
    expected = dataclasses.replace(root(), **{section.name: dataclasses.replace(section_type(), **chosen)})
    check_ranges(expected)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.yaml"
        path.write_text(expected.as_yaml(), encoding="utf-8")
        assert from_yaml(path, root) == expected
        _, of_file = parse_with_config(
            root, ["--config", str(path)], prog="p", description="", options=ConfigOptions, quiet=True
        )
    assert of_file == expected
    arguments = [part for name, value in chosen.items() for part in flags_of(name, value)]
    _, of_flags = parse_with_config(root, arguments, prog="p", description="", options=ConfigOptions, quiet=True)
    # By flags, one of several words is the word itself.
    words = {
        name: value[0]
        for name, value in chosen.items()
        if get_origin(hints[name]) in (Union, UnionType)
        and str in get_args(hints[name])
        and isinstance(value, tuple)
        and len(value) == 1
    }
    section_by_flags = dataclasses.replace(getattr(expected, section.name), **words)
    assert of_flags == dataclasses.replace(expected, **{section.name: section_by_flags})


def test_a_value_out_of_range_is_refused_alike_from_yaml_and_from_a_flag() -> None:
    _, of_flags = parse_with_config(
        Config, ["--beta", "0"], prog="p", description="", options=ConfigOptions, quiet=True
    )
    messages = []
    for config in (of_flags, from_dict({"objective": {"beta": 0}}, "file")):
        with pytest.raises(ConfigError) as refused:
            check(config)
        messages.append(str(refused.value))
    assert messages == ["beta=0.0 must be positive; the paper uses 0.1"] * 2


def test_every_error_of_a_range_has_value_rule_and_fix() -> None:
    for root in (Config(), GenerationConfig(), EvaluationConfig()):
        for section in vars(root).values():
            for name, hint in schema._hints(type(section)).items():
                for bounds in schema._ranges(hint):
                    broken = dataclasses.replace(section, **{name: float("nan")})
                    with pytest.raises(ConfigError, match=rf"^{name}=nan must .+; \w+") as refused:
                        check_ranges(broken)
                    assert str(refused.value).endswith(bounds.fix_of(float("nan")))


# --------------------------------------------------------------------------------------------------
# JSON files
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("samples", True, "samples=True is a switch; it must be a whole number"),
        ("tokenizer", 3, "tokenizer=3 is a whole number; it must be text or null"),
        ("settings", [], "settings=[] is a list; it must be a mapping"),
        ("rejected", {"x": "y"}, "skip_reasons={'x': 'y'} is a mapping; it must be a mapping of whole numbers"),
    ],
)
def test_a_manifest_of_wrong_types_is_refused(tmp_path: Path, name: str, value: Any, message: str) -> None:
    content = {**Manifest(101, "uint16", None, None, None).as_dict(), name: value}
    manifest = Manifest(101, "uint16", None, None, None)
    manifest.as_dict = lambda: content  # type: ignore[method-assign]
    path_of(tmp_path / "data", "json").write_bytes(manifest.as_json())
    with pytest.raises(DataError) as refused:
        read_manifest(tmp_path / "data")
    assert message in str(refused.value) and str(refused.value).endswith("preprocess the data again")


def shape(**changes: Any) -> ModelShape:
    sizes = dict.fromkeys(("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"), 8)
    return ModelShape(
        family="qwen2",
        **sizes,
        num_query_groups=8,
        kv_channels=1,
        vocab_size=101,
        layernorm_epsilon=1e-6,
        add_qkv_bias=True,
        untie_embeddings_and_output_weights=False,
        rotary_base=10000.0,
        max_position_embeddings=64,
        **changes,
    )


def test_a_shape_reads_back(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    for written in (shape(), shape(window_size=16, rope_scaling=yarn, base_model="b")):
        written.write(tmp_path)
        assert ModelShape.read(tmp_path) == written


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": "8"}, "num_layers='8' is text; it must be a whole number"),
        ({"window_size": 1.5}, "window_size=1.5 is a floating-point number; it must be a whole number or null"),
        ({"num_layer": 8}, "num_layer is unknown; did you mean 'num_layers'?"),
        ({"family": None}, "family=None is null; it must be text"),
        ({"vocab_size": ...}, "vocab_size is missing"),
    ],
)
def test_a_damaged_shape_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    shape().write(tmp_path)
    content = {**json.loads((tmp_path / "model.json").read_text()), **change}
    content = {name: value for name, value in content.items() if value is not ...}
    (tmp_path / "model.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError) as refused:
        ModelShape.read(tmp_path)
    assert message in str(refused.value) and str(refused.value).endswith("convert the model again")


# --------------------------------------------------------------------------------------------------
# Release 0.1
# --------------------------------------------------------------------------------------------------

# Printed by release 0.1.0 with --print-config: every option at its default, and every option at another value.
OLD_FILES = ROOT / "tests" / "support" / "configurations_0_1"
ROOTS = {"train": Config, "generate": GenerationConfig, "evaluate": EvaluationConfig}


@pytest.mark.parametrize("name", ROOTS)
def test_files_and_flags_of_release_0_1_mean_the_same(name: str) -> None:
    root = ROOTS[name]
    path = OLD_FILES / f"{name}.yaml"
    old = yaml.safe_load(path.read_text(encoding="utf-8"))
    config = from_yaml(path, root)
    new = config.as_dict()
    assert {section: {key: new[section][key] for key in keys} for section, keys in old.items()} == old
    arguments = []
    for keys in old.values():
        for key, value in keys.items():
            arguments += flags_of(key, tuple(value) if isinstance(value, list) else value)
    _, of_flags = parse_with_config(root, arguments, prog="p", description="", options=ConfigOptions, quiet=True)
    assert of_flags == config


@pytest.mark.parametrize("name", ROOTS)
def test_defaults_are_those_of_release_0_1(name: str) -> None:
    assert from_yaml(OLD_FILES / f"{name}_defaults.yaml", ROOTS[name]) == ROOTS[name]()
