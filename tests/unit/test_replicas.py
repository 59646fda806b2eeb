"""Ranks whose weights are not those of their replicas are named."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from megatron_longpo.errors import PlatformError
from megatron_longpo.training import replicas
from megatron_longpo.training.replicas import check_replicas, digest_of, odd_ranks


def test_the_odd_one_of_three_is_named_and_of_two_both() -> None:
    # Two shards of three replicas each, in turn.
    found = [((0, 0), "a"), ((0, 1), "b"), ((0, 0), "a"), ((0, 1), "c"), ((0, 0), "a"), ((0, 1), "b")]
    assert odd_ranks(found) == [3]
    assert odd_ranks([((0, 0), "a"), ((0, 0), "b")]) == [0, 1]
    assert odd_ranks([((0, 0), "a"), ((1, 0), "b")]) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_bit_changes_the_hash(dtype: torch.dtype) -> None:
    weights = [torch.arange(6, dtype=dtype).view(2, 3).t(), torch.zeros((), dtype=dtype)]
    before = digest_of(weights)
    assert digest_of([w.clone() for w in weights]) == before
    weights[1].view(torch.int32 if dtype == torch.float32 else torch.int16).bitwise_xor_(1)
    assert digest_of(weights) != before


def test_the_error_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    parallel: Any = types.SimpleNamespace(pipeline_rank=0)
    monkeypatch.setattr(replicas.parallel_state, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(replicas, "all_gather_objects", lambda mine: [mine, mine, (mine[0], "other")])
    monkeypatch.setattr(replicas, "whereabouts", lambda rank: f" (host node{rank})")
    with pytest.raises(PlatformError, match=r"step 7: the weights of rank 2 \(host node2\) differ from"):
        check_replicas([torch.ones(3)], parallel, step=7)
    monkeypatch.setattr(replicas, "all_gather_objects", lambda mine: [mine, mine])
    check_replicas([torch.ones(3)], parallel, step=7)
