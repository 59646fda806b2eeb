"""Constants of a machine from measurements, and the measurements themselves."""

from __future__ import annotations

import datetime
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_longpo.errors import LongPOError
from megatron_longpo.planner import calibrate, measure
from megatron_longpo.planner.machine import load_machine, machine_from

TODAY = datetime.date(2026, 11, 26)


def _found(**changes: Any) -> dict[str, Any]:
    """Two processes; bf16 products at half of its 400 GFLOP/s at 64 rows, attention a quarter of it."""
    of_dtype = {
        "rows": {"64": 200e9, "4096": 400e9},
        "widths": {"64": 100e9, "1024": 400e9},
        "attention": {"512": [50e9, 80e9], "8192": [100e9, 90e9]},
        "elementwise_bytes_per_s": 5e9,
        "logits_per_s": 2e8,
        "logprob_flops_per_s": 60e9,
    }
    fp32 = {
        **of_dtype,
        "rows": {"64": 50e9, "4096": 100e9},
        "widths": {"64": 75e9, "1024": 100e9},
        "elementwise_bytes_per_s": 20e9,
    }
    return {
        "platform": "cpu",
        "device": "A processor",
        "processes": 2,
        "threads": 1,
        "memory_bytes": 24 * 2**30,
        "used_bytes": 2**29,
        "copy_bytes_per_s": 16e9,
        "operator_seconds": 2e-6,
        "bfloat16": of_dtype,
        "float32": fp32,
        "optimizer_bytes_per_s": 9e9,
        "fresh_bytes_per_s": 1.5e9,
        "host_bytes_per_s": 10e9,
        "disk_bytes_per_s": 1e9,
        "exchanges": {
            "2": {
                # 100 us for nothing, and 1 s for 1e9 bytes more.
                "all_gather": {"4096": 100e-6, "1000004096": 1.0001},
                # Twice as many steps.
                "all_reduce": {"4096": 200e-6, "1000004096": 1.0002},
            }
        },
        **changes,
    }


def test_constants_follow_from_what_was_measured() -> None:
    machine = machine_from(calibrate.content_of(_found(), name="mine", like=None, today=TODAY), "mine")
    assert (machine.device, machine.gpus_per_node) == ("cpu", 2)
    # Two processes share 24 GiB, and each has half a GiB without tensors.
    assert (machine.memory_gib, machine.reserved_gib) == (12, 0.5)
    # Kernels in fp32 ran in the caches, faster than the copy.
    assert machine.memory_gb_per_s == 20
    assert machine.memory_bytes_per_s == pytest.approx(16e9)
    assert machine.elementwise_bytes_per_s("bfloat16") == pytest.approx(5e9)
    assert machine.elementwise_bytes_per_s("float32") == pytest.approx(20e9)
    assert (machine.optimizer_bytes_per_s, machine.logits_per_s("float32")) == (9e9, 2e8)
    assert machine.fresh_gb_per_s == 1.5
    # 60 of 100 GFLOP/s in fp32, whatever the rows.
    assert machine.logprob_flops_per_s("float32", rows=7, width=512) == pytest.approx(60e9)
    # Half way between 64 and 4096 rows in the logarithm: 512.
    assert machine.linear_flops_per_s("bfloat16", rows=512, width=1024) == pytest.approx(300e9)
    # A width of 64 is a quarter as fast in bf16 and three quarters in fp32: half, on the mean.
    assert machine.linear_flops_per_s("float32", rows=4096, width=64) == pytest.approx(50e9)
    assert machine.attention_flops_per_s("bfloat16", length=512, is_backward=False) == pytest.approx(50e9)
    assert machine.attention_flops_per_s("float32", length=8192, is_backward=True) == pytest.approx(90e9)
    assert machine.operator_us == 2
    # A ring of two has one step for a gather and two for an all-reduce: 100 us each.
    assert machine.node_link_latency_us == pytest.approx(100)
    assert machine.node_link_gb_per_s == pytest.approx(1, rel=1e-3)
    assert "measured on 2026-11-26 by 2 process(es) of 1 thread(s)" in machine.sources["optimizer_gb_per_s"]


def test_the_network_is_that_of_another_machine_where_one_is_named() -> None:
    h100 = load_machine("h100-sxm")
    machine = machine_from(calibrate.content_of(_found(), name="mine", like=h100, today=TODAY), "mine")
    assert machine.network_gb_per_s == h100.network_gb_per_s
    assert machine.sources["network_gb_per_s"] == h100.sources["network_gb_per_s"]
    assert machine.gpu_hours_between_failures == h100.gpu_hours_between_failures
    assert machine.sources["restart_minutes"] == "as h100-sxm"


def test_the_softmax_is_what_does_not_grow_with_the_hidden_size() -> None:
    """t = 1 + 2 size; and what noise alone would make negative or all of the time stays a share of it."""
    assert measure.split_times({1: 3.0, 2: 5.0, 4: 9.0}) == pytest.approx((1.0, 2.0))
    assert measure.split_times({1: 1.0, 3: 9.0}) == pytest.approx((0.25, 2.375))
    assert measure.split_times({1: 5.0, 3: 5.0}) == pytest.approx((3.0, 1.0))


def test_log_probs_are_measured_on_logits_of_a_model_s_scale(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """None of them is so far below the largest that its probability is denormal, with which a CPU's arithmetic is slow."""
    spreads = []
    plain = measure.logprobs.token_logprobs

    def watched(states: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits = (states @ weight.T).detach().float()
        spreads.append(float((logits.amax(1) - logits.amin(1)).max()))
        return plain(states, weight, *args, **kwargs)

    monkeypatch.setattr(measure.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(measure.logprobs, "token_logprobs", watched)
    measurement = measure.Measurement(seconds=1, folder=tmp_path)
    monkeypatch.setattr(measurement, "seconds", lambda action: [action(), 1.0][1])
    measurement.logprobs(torch.bfloat16)
    # Three hidden sizes; logits of scale 0.02 times the root of 256 to 768, and about nine of their deviations apart.
    assert len(spreads) == 3 and all(1 < spread < 20 for spread in spreads)


def test_a_gpu_s_host_is_measured_as_well() -> None:
    found = _found(platform="cuda", host_update_bytes_per_s=30e9, host_memory_bytes=64 * 2**30, compute_capability=9.0)
    machine = machine_from(calibrate.content_of(found, name="mine", like=None, today=TODAY), "mine")
    # Two processes share the host's 64 GiB.
    assert (machine.host_update_bytes_per_s, machine.host_memory_bytes) == (30e9, 32 * 2**30)
    assert machine.compute_capability == 9.0


def test_one_process_exchanges_nothing() -> None:
    content = calibrate.content_of(_found(exchanges={}, processes=1), name="mine", like=None, today=TODAY)
    machine = machine_from(content, "mine")
    assert machine.node_link_gb_per_s == 8
    assert machine.sources["node_link_gb_per_s"] == "one process: half a copy's rate"


def test_two_processes_measure_this_machine(tmp_path: Path) -> None:
    # Within a second, so only the small sizes; tests/unit/test_planner.py plans with such a file.
    machine = calibrate.calibrate(tmp_path / "cpu.yaml", processes=2, seconds=1, like=None)
    assert load_machine(str(tmp_path / "cpu.yaml")) == machine
    assert (machine.device, machine.gpus_per_node) == ("cpu", 2)
    assert 1e9 < machine.linear_flops_per_s("float32", rows=64, width=512) < 1e13
    assert 0.05 < machine.reserved_gib < 3
    assert machine.node_link_latency_us > 1
    assert machine.fresh_gb_per_s is not None and machine.fresh_gb_per_s > 0.01
    assert not list(tmp_path.glob(".calibrate-*"))


def test_a_process_that_fails_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, stderr="RuntimeError: no room\n")
    monkeypatch.setattr(calibrate.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(LongPOError, match="the measurement ended with status 1: RuntimeError: no room"):
        calibrate.calibrate(tmp_path / "cpu.yaml", processes=1, seconds=1, like=None)
    assert not (tmp_path / "cpu.yaml").exists()
