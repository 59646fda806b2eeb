"""A rank that is slow, or that computes wrong, is named whatever the layout, though the others wait for it or get its numbers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_longpo.conversion.import_hf import import_hf
from tests.support.data import make_data
from tests.support.launch import run, torchrun
from tests.support.models import make_model
from tests.support.suspicious_rank_worker import COMPUTES_SLOWLY, COMPUTES_WRONG, LAYOUTS, READS_SLOWLY


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What was said, by layout: one launch goes through all of them."""
    folder = tmp_path_factory.mktemp("suspicious")
    make_model("llama", folder / "llama")
    import_hf(folder / "llama", folder / "llama.ckpt")
    make_data(folder / "data", 16, longest=60)
    run(torchrun(2, "-m", "tests.support.suspicious_rank_worker", str(folder)))
    return dict(json.loads((folder / "found.json").read_text()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_slow_rank_is_named(found: dict[str, dict[str, Any]], layout: str) -> None:
    for kind, phase, words, rank in (
        ("computing", "forward_backward", "slow in forward and backward", COMPUTES_SLOWLY),
        ("reading", "data", "slow in reading its samples", READS_SLOWLY),
    ):
        assert f"{words}: rank {rank} (" in found[layout][f"said of {kind}"], found[layout]
        metrics = found[layout][kind]
        assert metrics[f"straggler/{phase}_rank"] == rank
        # The other one waited; what it did itself is less.
        assert metrics[f"straggler/{phase}_seconds"] > 1.5 * metrics[f"straggler/{phase}_median_seconds"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_memory_estimate_counts_what_is_compared(found: dict[str, dict[str, Any]], layout: str) -> None:
    """All but the metrics, and not much more; of two micro batches of an interleaved schedule the longer one counts for both."""
    for values, counted in found[layout]["values"]:
        assert values - 64 <= counted <= 1.5 * values


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_that_computes_wrong_is_named(found: dict[str, dict[str, Any]], layout: str) -> None:
    error, warning = (found[layout][name] for name in ("error", "warning"))
    named = f".self_attention.linear_qkv on rank {COMPUTES_WRONG} (host "
    assert "a micro batch computed twice from the same state gave different numbers, first in the output of" in error
    assert named in error and f"rank {1 - COMPUTES_WRONG}" not in error
    # Where bits may differ.
    assert "different numbers" not in found[layout]["rounded"] and named in found[layout]["negated"]
    # With on_rerun_mismatch=continue the step is taken.
    assert named in warning and "; training goes on" in warning and error.startswith(f"step {found[layout]['step']}: ")
