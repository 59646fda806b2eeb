"""Configuration: every field a flag, unknown keys refused, cross-checks with value, rule and fix."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_longpo.config import (
    Config,
    DataConfig,
    check,
    check_against_model,
    data_parallel_size,
    data_sources,
    from_dict,
    from_yaml,
    pipeline_split,
    virtual_pipeline_size,
)
from megatron_longpo.errors import ConfigError
from tests.support.commands import parsed


def test_flags_have_no_section_prefix(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("optimizer:\n  lr: 5e-7\n  optimizer: rmsprop\nparallel:\n  sequence_parallel: true\n")
    flags = ["--context-parallel-size", "8", "--no-sequence-parallel", "--print-config"]
    options, config = parsed("train", ["--config", str(path), *flags])
    assert options.print_config
    assert config.optimizer.lr == 5e-7 and config.optimizer.optimizer == "rmsprop"
    assert config.parallel.context_parallel_size == 8 and not config.parallel.sequence_parallel


def test_resolved_configuration_reads_back(tmp_path: Path) -> None:
    _, config = parsed("train", ["--lr", "3e-6", "--recompute-granularity", "full"])
    path = tmp_path / "run.yaml"
    path.write_text(config.as_yaml())
    assert from_yaml(path) == config


def test_every_field_name_is_unique() -> None:
    names = [f.name for s in dataclasses.fields(Config) for f in dataclasses.fields(type(getattr(Config(), s.name)))]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimiser": {}}, "did you mean 'optimizer'"),
        ({"optimizer": {"learning_rate": 1}}, "optimizer.learning_rate is unknown"),
        ({"optimizer": {"lr": "fast"}}, "must be a number"),
        ({"training": {"bf16": 1}}, "true or false"),
        ({"training": {"train_iters": 1.5}}, "a whole number"),
        ({"objective": {"objective": "ppo"}}, "one of longpo, dpo, sft"),
        ([1], "a list"),
        ({"data": [1]}, "must be a mapping"),
    ],
)
def test_wrong_values_are_refused(values: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(values, "file")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"objective": {"beta": 0}}, "beta=0"),
        ({"objective": {"label_smoothing": 0.5}}, "label_smoothing=0.5"),
        ({"objective": {"label_smoothing": 0.1, "loss_type": "ipo"}}, "loss_type=sigmoid"),
        ({"objective": {"label_smoothing": 0.1, "loss_type": "orpo"}}, "label_smoothing=0.1 is defined for"),
        ({"objective": {"objective": "sft", "rpo_alpha": 1.0}}, "nll_scope=response"),
        ({"objective": {"objective": "dpo", "loss_type": "orpo"}}, "set rpo_alpha=1"),
        ({"objective": {"objective": "solopo"}}, "use loss_type=simpo or orpo"),
        ({"objective": {"objective": "solopo", "loss_type": "orpo"}}, "set rpo_alpha=1"),
        ({"optimizer": {"lr": 1e-6, "min_lr": 1e-5}}, "min_lr=1e-05"),
        ({"optimizer": {"lr_decay_style": "WSD"}}, "lr_wsd_decay_iters"),
        ({"optimizer": {"lr_warmup_fraction": 0.1, "lr_warmup_iters": 5}}, "give one of them"),
        ({"parallel": {"num_layers_per_virtual_pipeline_stage": 1}}, "pipeline_model_parallel_size of at least 2"),
        ({"parallel": {"sequence_parallel": True}}, "tensor_model_parallel_size=1"),
        ({"optimizer": {"lr_warmup_init": 1.0}}, "lr_warmup_init=1.0"),
        ({"parallel": {"context_parallel_size": 0}}, "context_parallel_size=0"),
        ({"checkpoint": {"async_save": True}}, "--save"),
        ({"checkpoint": {"upload_to": "s3://b/run"}}, "--save"),
        ({"checkpoint": {"save": "run", "upload_to": "backup"}}, "upload_to=backup is no URL"),
        ({"checkpoint": {"save": "s3://b/run"}}, "use --save FOLDER --upload-to s3://b/run"),
        ({"checkpoint": {"load": "s3://key:secret@b/run"}}, "could be credentials"),
        ({"reference": {"reference_load": "s3://b/run?token=secret"}}, "could be credentials"),
        ({"training": {"eval_interval": 2}}, "valid_data_path is not given"),
        ({"training": {"skip_train": True}}, "valid_data_path is not given"),
        ({"training": {"eval_interval": 0}, "data": {"valid_data_path": "x"}}, "eval_interval=0"),
        ({"data": {"turns": "independent"}, "objective": {"objective": "dpo"}}, "turns=independent"),
        ({"reference": {"reference_model": "resident"}}, "reference=online"),
        ({"training": {"recompute_modules": ["attention"]}}, "recompute_modules=attention"),
        ({"optimizer": {"optimizer_cpu_offload": True}}, "set use_distributed_optimizer as well"),
        ({"optimizer": {"optimizer_offload_fraction": 0}}, "1 offloads everything"),
        ({"parallel": {"overlap_param_gather": True}}, "set use_distributed_optimizer and overlap_grad_reduce"),
    ],
)
def test_contradictions_are_refused(values: dict[str, dict[str, object]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(from_dict(values, "file"))


def _parallel(batch: int = 8, micro: int = 1, **values: object) -> Config:
    return from_dict({"parallel": values, "training": {"global_batch_size": batch, "micro_batch_size": micro}}, "file")


def test_degrees_against_world_and_model() -> None:
    model = {"num_layers": 8, "attention_heads": 6, "key_value_heads": 2}
    assert data_parallel_size(_parallel(tensor_model_parallel_size=2), 8) == 4
    with pytest.raises(ConfigError, match="do not divide the world of 6"):
        data_parallel_size(_parallel(tensor_model_parallel_size=4), 6)
    with pytest.raises(ConfigError, match="global_batch_size=6 is not a multiple"):
        data_parallel_size(_parallel(batch=6), 4)
    with pytest.raises(ConfigError, match="use one of 1, 2"):
        check_against_model(_parallel(tensor_model_parallel_size=3, batch=9), world_size=3, **model)
    with pytest.raises(ConfigError, match="does not divide the 8 layers"):
        check_against_model(_parallel(pipeline_model_parallel_size=3), world_size=3, **model)
    with pytest.raises(ConfigError, match="micro batches per step to be a multiple"):
        check_against_model(
            _parallel(batch=5, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
            world_size=2,
            **model,
        )
    offloaded = from_dict(
        {"training": {"cpu_offloading_num_layers": 4}, "parallel": {"pipeline_model_parallel_size": 2}}, "file"
    )
    with pytest.raises(ConfigError, match="cpu_offloading_num_layers=4 must be less than the 4 layers of a stage"):
        check_against_model(offloaded, world_size=2, **model)
    config = _parallel(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=2)
    assert virtual_pipeline_size(config.parallel, 8) == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("data", [("data", None)]),
        (("data",), [("data", None)]),
        # One word is a prefix, whatever it looks like.
        ("0.7", [("0.7", None)]),
        (("0.7", "A", "0.3", "B"), [("A", 0.7), ("B", 0.3)]),
        (("7", "A", "3e0", "some/B"), [("A", 7.0), ("some/B", 3.0)]),
        (("1", "A"), [("A", 1.0)]),
        (("A", "B", "C"), [("A", None), ("B", None), ("C", None)]),
    ],
)
def test_data_sets_with_weights(words: Any, expected: list[tuple[str, float | None]]) -> None:
    assert [(source.prefix, source.weight) for source in data_sources(words)] == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "data_path is empty"),
        (("0.7", "A", "B"), "do not alternate; write 0.7 A 0.3 B"),
        (("A", "0.7", "B", "0.3"), "do not alternate"),
        (("0.7", "A", "0.3"), "do not alternate"),
        (("0.7", "A", "0", "B"), "the weight 0 of B must be positive"),
        (("0.7", "A", "-1", "B"), "the weight -1 of B must be positive"),
        (("nan", "A", "1", "B"), "the weight nan of A"),
        (("inf", "A", "1", "B"), "the weight inf of A"),
        (("0.7", "A", "0.3", "A"), "A comes twice"),
        (("A", "A"), "A comes twice"),
    ],
)
def test_data_sets_that_are_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(Config(data=DataConfig(data_path=words)))


def test_data_sets_as_flags_and_as_yaml(tmp_path: Path) -> None:
    flags = ["--data-path", "0.7", "A", "0.3", "B", "--train-iters", "3"]
    _, config = parsed("train", flags)
    assert config.data.data_path == ("0.7", "A", "0.3", "B") and config.training.train_iters == 3
    (tmp_path / "written.yaml").write_text(config.as_yaml())
    (tmp_path / "by_hand.yaml").write_text("data: {data_path: [0.7, A, 0.3, B]}\ntraining: {train_iters: 3}\n")
    for name in ("written", "by_hand"):
        assert from_yaml(tmp_path / f"{name}.yaml") == config
    assert parsed("train", ["--data-path", "P"])[1].data.data_path == "P"


def _split(layers: int, stages: int, **settings: Any) -> Any:
    config = _parallel(pipeline_model_parallel_size=stages, **settings)
    check(config)
    return pipeline_split(config.parallel, layers)


def test_layers_are_divided_among_stages() -> None:
    first, last = "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"
    embedding, loss = "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"
    virtual = "virtual_pipeline_model_parallel_size"
    assert _split(8, 1) == ((8,),)
    assert _split(8, 2, num_layers_per_virtual_pipeline_stage=2) == ((2, 2), (2, 2))
    assert _split(8, 2, **{first: 3}) == ((3,), (5,))
    assert _split(10, 4, **{first: 3, last: 1}) == ((3,), (3,), (3,), (1,))
    assert _split(8, 2, **{first: 3, last: 5}) == ((3,), (5,))
    assert _split(10, 3, **{last: 2, virtual: 2}) == ((2, 2), (2, 2), (1, 1))
    assert _split(6, 2, **{embedding: True, loss: True}) == ((3,), (3,))
    assert _split(7, 2, **{loss: True}) == ((4,), (3,))
    assert _split(7, 2, **{loss: True, virtual: 2}) == ((2, 2), (2, 1))
    assert _split(7, 2, **{embedding: True, "num_layers_per_virtual_pipeline_stage": 2}) == ((1, 2), (2, 2))
    # 30 layers on 4 stages, as a user with tied weights would have them.
    assert _split(30, 4, **{embedding: True, loss: True}) == ((7,), (8,), (8,), (7,))
    for layers, stages, values, message in [
        (8, 3, {}, "does not divide the 8 layers; use one of 1, 2, 4, 8, or give the first"),
        (8, 3, {embedding: True, loss: True}, "the 8 layers and 2 more for account_for_embedding"),
        (8, 3, {first: 3}, "leaves 5 of the 8 layers for 2 other pipeline ranks"),
        (8, 2, {first: 8}, "leaves 0 of the 8 layers for 1 other"),
        (8, 2, {first: 3, last: 4}, "leaves 1 of the 8 layers for no other"),
        (8, 2, {first: 9}, "leaves -1 of the 8"),
        (8, 2, {first: 3, virtual: 2}, "does not divide the 3 layers of a pipeline rank; use one of 1$"),
        (8, 2, {first: 2, virtual: 4}, "does not divide the 2 layers of a pipeline rank; use one of 1, 2$"),
        (8, 1, {first: 3}, "but pipeline_model_parallel_size=1"),
        (8, 1, {loss: True}, "but pipeline_model_parallel_size=1"),
        (8, 2, {first: 3, loss: True}, "decoder_first_pipeline_num_layers=3 and account_for_loss"),
        (8, 2, {last: 2, "num_layers_per_virtual_pipeline_stage": 2}, "virtual_pipeline_model_parallel_size instead"),
    ]:
        with pytest.raises(ConfigError, match=message):
            _split(layers, stages, **values)


_scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
_values = st.recursive(
    _scalars, lambda c: st.lists(c, max_size=3) | st.dictionaries(st.text(max_size=8), c, max_size=3)
)
_sections = st.sampled_from([f.name for f in dataclasses.fields(Config)]) | st.text(max_size=6)
_keys = st.sampled_from(["lr", "beta", "data_path", "train_iters", "bf16", "recompute_modules", "objective"]) | st.text(
    max_size=6
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(_sections, st.dictionaries(_keys, _values, max_size=3) | _values, max_size=3))
def test_any_mapping_is_read_or_refused(values: dict[str, object]) -> None:
    """Never anything but a Config or a ConfigError."""
    try:
        check(from_dict(values, "file"))
    except ConfigError as error:
        assert str(error)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=60))
def test_any_file_is_read_or_refused(content: bytes) -> None:
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        file.write(content)
        file.flush()
        try:
            from_yaml(file.name)
        except ConfigError as error:
            assert file.name in str(error)
