"""Layouts by hand and by property: every row is found again, and every loss is counted once per row."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_longpo.data.sequence import (
    NO_RESPONSE,
    KeyBlock,
    QuerySpan,
    Row,
    SequenceLayout,
    assign_places,
    keys_per_place,
    lay_out,
    local_spans,
    shard,
)
from megatron_longpo.model.blocks import block_attention, blocks_of
from tests.support.attention import dense_attention


def _row(tokens: list[int], first_answer: int, slot: int, nll: bool, sample: int = 0) -> Row:
    response = np.full(len(tokens), NO_RESPONSE)
    response[first_answer:] = slot
    return Row(np.array(tokens), response, np.full(len(tokens), nll), sample)


def test_trunk_and_branches_by_hand() -> None:
    # Common prefix 1 2 3 4; the last common token begins each branch.
    rows = [_row([1, 2, 3, 4, 10, 11], 4, 0, True), _row([1, 2, 3, 4, 20], 4, 1, False)]
    layout = lay_out(rows, prefix_sharing=True, num_samples=1, num_responses=2, minimum_shared=1)
    assert layout.tokens_S.tolist() == [1, 2, 3, 4, 10, 4]
    assert layout.targets_S.tolist() == [2, 3, 4, 10, 11, 20]
    assert layout.positions_S.tolist() == [0, 1, 2, 3, 4, 3]
    assert layout.query_spans == (
        QuerySpan(0, 5, (KeyBlock(0, 5, True),)),
        QuerySpan(5, 6, (KeyBlock(0, 3, False), KeyBlock(5, 6, True))),
    )
    assert sorted(zip(layout.response_places_E.tolist(), layout.response_slots_E.tolist(), strict=True)) == [
        (3, 0),
        (4, 0),
        (5, 1),
    ]
    # The trunk counts once in the NLL, the rejected branch not at all.
    assert layout.nll_places.tolist() == [0, 1, 2, 3, 4]
    assert layout.nll_tokens.tolist() == [5]
    assert layout.response_tokens.tolist() == [2, 1]


def test_nothing_in_common() -> None:
    rows = [_row([1, 2, 3], 1, 0, True), _row([4, 5, 6], 1, 1, False)]
    layout = lay_out(rows, prefix_sharing=True, num_samples=1, num_responses=2, minimum_shared=1)
    assert len(layout.segments) == 2
    assert all(s.parent == -1 for s in layout.segments)


def test_identical_rows_share_everything() -> None:
    rows = [_row([1, 2, 3, 4], 2, 0, True), _row([1, 2, 3, 4], 2, 1, False)]
    layout = lay_out(rows, prefix_sharing=True, num_samples=1, num_responses=2, minimum_shared=1)
    assert layout.length == 3
    assert layout.response_tokens.tolist() == [2, 2]


def test_two_samples_with_one_document_count_their_own_nll() -> None:
    rows = [_row([1, 2, 3, 4], 2, 0, True, 0), _row([1, 2, 3, 5], 2, 2, True, 1)]
    layout = lay_out(rows, prefix_sharing=True, num_samples=2, num_responses=4, minimum_shared=1)
    assert layout.nll_tokens.tolist() == [3, 3]


_rows = st.lists(
    st.lists(st.integers(0, 2), min_size=2, max_size=12),
    min_size=1,
    max_size=6,
)


def _layouts(tokens: list[list[int]], minimum: int) -> tuple[SequenceLayout, SequenceLayout]:
    rows = [_row(t, min(1 + i, len(t)), i, i % 2 == 0, i) for i, t in enumerate(tokens)]
    n = len(rows)
    return (
        lay_out(rows, prefix_sharing=True, num_samples=n, num_responses=n, minimum_shared=minimum),
        lay_out(rows, prefix_sharing=False, num_samples=n, num_responses=n),
    )


def _histories(layout: SequenceLayout) -> list[tuple[int, ...]]:
    """What each place sees, in order of position."""
    seen: list[tuple[int, ...]] = [()] * layout.length
    for group in layout.query_spans:
        for query in range(group.start, group.end):
            keys: list[int] = []
            for block in group.keys:
                end = block.start + query - group.start + 1 if block.causal else block.end
                keys += range(block.start, end)
            keys.sort(key=lambda k: layout.positions_S[k])
            assert [layout.positions_S[k] for k in keys] == list(range(len(keys)))
            seen[query] = tuple(int(layout.tokens_S[k]) for k in keys)
    return seen


@settings(max_examples=300, deadline=None)
@given(_rows, st.integers(1, 4))
def test_sharing_changes_no_prediction(tokens: list[list[int]], minimum: int) -> None:
    """Each response slot and each NLL slot is the same bag of (history, target), shared or not."""
    bags = []
    for layout in _layouts(tokens, minimum):
        histories = _histories(layout)
        responses = sorted(
            (int(slot), histories[place], int(layout.targets_S[place]))
            for place, slot in zip(layout.response_places_E, layout.response_slots_E, strict=True)
        )
        nll = sorted(
            (int(slot), histories[place], int(layout.targets_S[place]))
            for place, slot in zip(layout.nll_places, layout.nll_slots, strict=True)
        )
        bags.append((responses, nll))
    assert bags[0] == bags[1]


@settings(max_examples=200, deadline=None)
@given(_rows, st.integers(1, 5), st.integers(1, 2), st.integers(1, 4))
def test_shards_hold_every_place_and_loss_once(tokens: list[list[int]], parts: int, tp: int, tiles: int) -> None:
    layout, _ = _layouts(tokens, 1)
    assigned = assign_places(layout, multiple=parts * tp, parts=parts, tiles=tiles)
    padded = sum(r.length for mine in assigned for r in mine)
    assert padded % (parts * tp) == 0 and padded >= layout.length
    places = sorted(p for mine in assigned for r in mine for p in range(r.start, r.start + r.length))
    assert places == list(range(padded))
    entries = []
    pairs = 0
    for mine in assigned:
        piece = shard(layout, mine, padded)
        assert len(piece.tokens) == padded // parts
        for index, slot in zip(piece.response_index_E, piece.response_slots_E, strict=True):
            local = int(piece.loss_places_N[index])
            place = next(r.start + local - r.local for r in mine if r.local <= local < r.local + r.length)
            assert piece.tokens[local] == layout.tokens_S[place]
            entries.append((place, int(slot), int(piece.targets_N[index])))
        pairs += sum(g.pairs for g in local_spans(layout.query_spans, mine))
    expected = [
        (int(p), int(s), int(layout.targets_S[p]))
        for p, s in zip(layout.response_places_E, layout.response_slots_E, strict=True)
    ]
    assert sorted(entries) == sorted(expected)
    assert pairs == layout.attention_pairs == keys_per_place(layout.query_spans, padded).sum()


def test_places_are_dealt_in_balance() -> None:
    """A causal row and a tree with many branches: the rank with the most attention has little more than the mean."""
    rng = np.random.default_rng(0)
    document = rng.integers(3, 100, 4096)
    rows = [_row([*document, *rng.integers(3, 100, 500)], 4096, i, i == 0) for i in range(6)]
    for layout in (
        lay_out(rows[:1], prefix_sharing=True, num_samples=1, num_responses=6),
        lay_out(rows, prefix_sharing=True, num_samples=1, num_responses=6),
    ):
        for parts in (2, 3, 4, 8):
            assigned = assign_places(layout, multiple=parts, parts=parts, tiles=4)
            loads = [sum(g.pairs for g in local_spans(layout.query_spans, mine)) for mine in assigned]
            assert max(loads) <= 1.05 * sum(loads) / parts


def test_block_attention_is_masked_attention() -> None:
    """Against dense attention under a mask made from the tree, values and gradients."""
    torch.manual_seed(0)
    rng = np.random.default_rng(1)
    document = rng.integers(3, 100, 60)
    rows = [_row([*document, *rng.integers(3, 100, 10 + 7 * i)], 60, i, i == 0) for i in range(4)]
    layout = lay_out(rows, prefix_sharing=True, num_samples=1, num_responses=4)
    n = layout.length + 3  # padding at the end
    query, key, value = (torch.randn(n, h, 16, requires_grad=True) for h in (6, 2, 2))
    out = block_attention(query, key, value, blocks_of(layout.query_spans), 0.25)
    dense = dense_attention(layout.query_spans, query, key, value, 0.25)
    torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-6)
    assert (out[layout.length :] == 0).all()
    direction = torch.randn_like(out)
    found = torch.autograd.grad((out * direction).sum(), (query, key, value))
    expected = torch.autograd.grad((dense * direction).sum(), (query, key, value))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
