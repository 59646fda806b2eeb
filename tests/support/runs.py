"""What runs left: their metrics and the tensors of their checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from megatron_longpo.checkpoint.distributed import DistributedReader
from megatron_longpo.training.metrics import read_metrics

# What differs between two runs that are equal.
PHASES = ("between_steps", "reference", "data", "rerun", "forward_backward", "optimizer")
PARTS = ("weights", "gradients", "optimizer")
TIMED = {
    *("tokens_per_second", "step_seconds", "peak_memory_gb", "tflops_per_rank"),
    *(f"seconds/{phase}" for phase in PHASES),
    *(f"memory/{part}_gb" for part in PARTS),
    *(f"straggler/{phase}_{what}" for phase in PHASES for what in ("rank", "seconds", "median_seconds")),
}


def metrics_of(output: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k not in TIMED} for r in read_metrics(output / "metrics.jsonl")]


def ledger_of(path: Path) -> dict[int, set[tuple[int, ...]]]:
    """Step -> the samples that it was done with, each time, as ``meddling_training`` has noted them."""
    found: dict[int, set[tuple[int, ...]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        step, numbers = json.loads(line)
        found.setdefault(step, set()).add(tuple(numbers))
    return found


def assert_same_samples(ledger: Path, whole: Path, *, steps: int) -> list[int]:
    """However often a step was done, it was with the samples of the undisturbed run; those of all steps, in order."""
    used, expected = ledger_of(ledger), ledger_of(whole)
    assert used.keys() == expected.keys() == set(range(1, steps + 1))
    for step, numbers in expected.items():
        assert len(numbers) == 1, f"step {step} of the undisturbed run"
        assert used[step] == numbers, f"step {step}"
    return [number for step in sorted(expected) for number in next(iter(expected[step]))]


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All stored tensors, optimizer's included."""
    reader = DistributedReader(checkpoint)
    return {key: reader.read(key, [0] * len(reader.shape(key)), reader.shape(key)) for key in reader._tensors}


def assert_same_tensors(a: Path, b: Path, bound: float = 0.0) -> None:
    first, second = tensors_of(a), tensors_of(b)
    assert first.keys() == second.keys() and any(k.startswith("optimizer") for k in first)
    for key, value in first.items():
        if bound:
            size = [slice(min(m, n)) for m, n in zip(value.shape, second[key].shape, strict=True)]
            x, y = value[tuple(size)].double(), second[key][tuple(size)].double()
            assert (x - y).norm() <= bound * y.norm() + 1e-12, key
        else:
            assert torch.equal(value, second[key]), key
