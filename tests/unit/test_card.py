"""Model cards: what they say for each objective."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

import pytest
import yaml

from megatron_longpo.checkpoint.card import card, training_record
from megatron_longpo.config import Config, ObjectiveConfig
from megatron_longpo.model.shape import ModelShape
from megatron_longpo.training.objective import OBJECTIVES

_MANIFEST: dict[str, Any] = {
    "longest": 900,
    "samples": 4,
    "turns": 8,
    "tokens": 3000,
    "rejected": {"too_long": 2},
    "tokenizer": None,
    "bin_sha256": "ff",
}
_SHAPE = ModelShape(
    family="llama",
    num_layers=1,
    hidden_size=8,
    ffn_hidden_size=16,
    num_attention_heads=2,
    num_query_groups=1,
    kv_channels=4,
    vocab_size=10,
    layernorm_epsilon=1e-5,
    add_qkv_bias=False,
    untie_embeddings_and_output_weights=False,
    rotary_base=1e4,
    max_position_embeddings=1024,
    base_model="org/model|1",
)


def make_card(records: list[dict[str, Any]], objective: str = "longpo", data_path: Any = None) -> str:
    config = yaml.safe_load(Config().as_yaml())
    config["data"]["data_path"] = data_path
    config["objective"]["objective"] = objective
    spec = OBJECTIVES[objective]
    names = ("uses_preference", "uses_nll", "prefers_short")
    terms = {name: getattr(spec, name) for name in names}
    record = training_record(step=2, train_iters=20, layout="TP 1", manifest=_MANIFEST, records=records, terms=terms)
    if objective in ("longpo", "dpo", "sft"):
        # As version 0.1 wrote it.
        before = {name: value for name, value in record.items() if name != "terms"}
        assert card(_SHAPE, "bfloat16", record, config) == card(_SHAPE, "bfloat16", before, config)
    return card(_SHAPE, "bfloat16", record, config)


@pytest.mark.parametrize("objective", get_args(get_type_hints(ObjectiveConfig)["objective"]))
def test_every_objective_has_a_card(objective: str) -> None:
    text = make_card([], objective)
    assert yaml.safe_load(text.split("---")[1])["tags"][-1] == objective
    assert f"| objective | {objective}, " in text and "Training metrics" not in text


def test_data_sets_are_named() -> None:
    text = make_card([], data_path=["0.7", "/data/books", "0.3", "papers"])
    assert "| data sets | books (weight 0.7), papers (weight 0.3) |" in text
    assert "| SHA-256 of the data sets' checksums | `ff` |" in text
    assert "| data sets | books, papers |" in make_card([], data_path=["/data/books", "papers"])
    for one in ("/data/books", ["/data/books"]):
        assert "data sets" not in make_card([], data_path=one).split("## Configuration")[0]


def test_rows_are_named_and_a_bar_does_not_end_a_cell() -> None:
    text = make_card([{"loss": 3.0, "lr": 1e-6}, {"loss": 1.0, "lr": 1e-6}])
    for line in (
        "| base model | org/model\\|1 |",
        "| optimizer steps | 2 of 20 |",
        "| skipped input | 2 too_long |",
        "| tokenizer | none; the data came tokenised |",
        "| mean over the | first step | last step |",
        "| loss | 3.0000 | 1.0000 |",
    ):
        assert line in text.splitlines()
    assert "| lr |" not in text, "only metrics that show the training"


def test_metrics_are_means_over_the_first_and_last_tenth() -> None:
    text = make_card([{"loss": float(step)} for step in range(20)])
    assert "| mean over the | first 2 steps | last 2 steps |" in text and "| loss | 0.5000 | 18.5000 |" in text
