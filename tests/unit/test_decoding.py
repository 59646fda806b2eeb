"""Strategies of decoding: one answer, however rows are laid out and whatever is decoded beside them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from megatron_longpo.engines.base import Sampling
from megatron_longpo.engines.decoding import Answer, Decoder, Packed, Padded, Row, Stacked, choose_tokens
from megatron_longpo.engines.reading import PromptReader, crop
from tests.support.models import make_chat_model

SHARED = list(range(10, 90))
ROWS = [Row([*SHARED, *own], seed) for seed, own in enumerate(([5, 6, 7], [8], [9, 10, 11, 12]))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(make_chat_model(tmp_path_factory.mktemp("model"))).eval()


def reader_of(model: Any, *, keep: bool = False) -> PromptReader:
    return PromptReader(model, prefill_tokens=30, roomy=True, keep=keep)


@pytest.mark.parametrize("sampling", [Sampling(12), Sampling(12, temperature=0.9, top_p=0.95)])
@torch.inference_mode()
def test_all_strategies_write_the_same_tokens(model: Any, sampling: Sampling) -> None:
    decoder = Decoder(model, sampling, frozenset({1}))
    alone = [Padded(decoder, reader_of(model).new_cache(), shared=0).decode([row])[0] for row in ROWS]
    assert all(answer.ids for answer in alone)
    prefix = reader_of(model).read(SHARED)
    assert Packed(decoder, prefix, shared=len(SHARED)).decode(ROWS) == alone
    crop(prefix, len(SHARED))
    assert Packed(decoder, prefix, shared=len(SHARED)).decode(ROWS[1:]) == alone[1:], "a cropped cache serves again"
    crop(prefix, len(SHARED))
    assert Padded(decoder, prefix, shared=len(SHARED)).decode(ROWS) == alone
    stacked = reader_of(model, keep=True).read_stacked([row.ids[:-1] for row in ROWS])
    assert Stacked(decoder, stacked).decode(ROWS) == alone


def test_an_answer_ends_by_itself_or_at_the_limit(model: Any) -> None:
    decoder = Decoder(model, Sampling(3), frozenset())
    (cut,) = Padded(decoder, None, shared=0).decode(ROWS[:1])
    assert len(cut.ids) == 3 and not cut.finished
    ended = Decoder(model, Sampling(3), frozenset({cut.ids[1]}))
    assert Padded(ended, None, shared=0).decode(ROWS[:1]) == [Answer(cut.ids[: cut.ids.index(cut.ids[1])], True)]


@torch.inference_mode()
def test_a_kept_prefix_is_read_once(model: Any) -> None:
    """Forwards see only what the cache does not hold; a short common beginning is not worth keeping."""
    read: list[int] = []
    reader = reader_of(model, keep=True)
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        for ids, expected in (
            (SHARED, [30, 30, 20]),
            ([*SHARED, 3, 4], [2]),
            (SHARED, []),
            ([*SHARED[:70], 7], [1]),
            ([*SHARED[:20], 7], [21]),
        ):
            read.clear()
            assert reader.read_reusing(ids).get_seq_length() == len(ids)
            assert read == expected
        reader.forget()
        reader.read_reusing([*SHARED[:20], 7])
        assert read == [21, 21]
    finally:
        handle.remove()


def test_a_nucleus_holds_the_likeliest_tokens() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(200, 1)
    generators = [torch.Generator().manual_seed(random.Random(i).randrange(2**31)) for i in range(200)]
    assert set(choose_tokens(logits, Sampling(1, temperature=1.0, top_p=0.7), generators).tolist()) == {0, 1}
    assert set(choose_tokens(logits, Sampling(1), generators).tolist()) == {0}
