"""The benchmarks' command lines at toy size: not their times, but that both sides compute the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.support.launch import ROOT, environment, run
from tests.support.models import make_chat_model, make_model
from tests.support.tokenizers import make_fast_tokenizer


def test_our_step_and_the_authors_have_the_same_loss(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model")
    output = tmp_path / "bench"
    sizes = ["--lengths", "96", "--answer", "16", "--short", "32", "--threads", "1"]
    tool = str(ROOT / "benchmarks" / "benchmark_step.py")
    run([sys.executable, tool, "--hf", str(model), *sizes, "--output", str(output)], env=environment())
    (row,) = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert row["ours"]["loss"] == pytest.approx(row["authors"]["loss"], rel=1e-5)
    assert row["ours"]["peak_gb"] > 0 and row["authors"]["seconds"] > 0
    assert all(row["ours"]["parts"][part] > 0 for part in ("attention", "log-probs", "linear layers", "optimizer"))
    # Counted by hand: 95 places of the chosen row and 12 of the rejected answer; 4 layers of 48 x (2 x 48 + 2 x 24 + 3 x 96)
    # weights.
    weights = 48 * (2 * 48 + 2 * 24 + 3 * 96)
    assert row["ours"]["operations"]["linear layers"] == pytest.approx(6 * (95 + 12) * weights * 4)
    table = (tmp_path / "bench.md").read_text()
    assert "ours s" in table and "GFLOP/s" in table
    assert (tmp_path / "bench.png").stat().st_size > 1000


def test_log_probs_are_measured_against_plain_ones(tmp_path: Path) -> None:
    tool = str(ROOT / "benchmarks" / "benchmark_logprobs.py")
    sizes = ["--tokens", "300", "--vocab-size", "512", "--hidden-size", "16", "--threads", "1"]
    done = run([sys.executable, tool, *sizes, "--output", str(tmp_path / "table.md")], env=environment())
    assert "| plain |" in done.stdout and (tmp_path / "table.md").read_text() in done.stdout


def test_the_engine_is_measured_against_plain_transformers(tmp_path: Path) -> None:
    make_fast_tokenizer(tmp_path / "model")
    make_chat_model(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(["tower river bank people climb view left built"] * 60))
    tool = str(ROOT / "benchmarks" / "benchmark_engine.py")
    sizes = ["--lengths", "200", "--new-tokens", "5", "--repeats", "1", "--threads", "1", "--dtype", "float32"]
    output = tmp_path / "engine.json"
    model = ["--model", str(tmp_path / "model"), "--text", str(text)]
    done = run([sys.executable, tool, *model, *sizes, "--output", str(output)], env=environment())
    (row,) = json.loads(output.read_text())
    assert 150 < row["length"] <= 200 and row["same"] and f"{row['length']} tokens: read in" in done.stdout
    assert row["read"]["ratio"] == pytest.approx(row["read"]["ours"] / row["read"]["plain"])
