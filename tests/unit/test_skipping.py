"""Which steps are skipped, and what is written down of them."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path

import pytest
from megatron.core.optimizer.optimizer import ChainedOptimizer

from megatron_longpo.config import FaultsConfig, check, from_dict
from megatron_longpo.errors import ConfigError
from megatron_longpo.runs.records import METRICS
from megatron_longpo.runtime.signals import heed
from megatron_longpo.training import optimization
from megatron_longpo.training.replay import _skipped
from megatron_longpo.training.skipping import StepGuard, path_of, write_skipped

INFINITY = math.inf


def guard(**settings: object) -> StepGuard:
    return StepGuard(FaultsConfig(**settings))  # type: ignore[arg-type]


def test_what_is_not_finite_is_a_fault() -> None:
    found = guard()
    assert found.fault_of_loss(math.nan) == "the loss is nan"
    assert found.fault_of_loss(-INFINITY) == "the loss is -inf"
    assert found.fault_of_gradient(INFINITY) == "the gradient norm is inf"
    assert found.fault_of_loss(1e30) is None and found.fault_of_gradient(0.0) is None


def test_spikes_are_so_many_deviations_above_the_median() -> None:
    found = guard(check_for_spiky_loss=True, spiky_loss_deviations=5)
    # 1.0, 1.1, ..., 1.9, twice: median 1.45, median absolute deviation 0.25, so 1.4826 * 0.25 * 5 = 1.853 above it.
    for index in range(20):
        assert found.fault_of_loss(1e9) is None
        found.take(1 + index % 10 / 10)
    assert found.fault_of_loss(3.303) is None and found.fault_of_loss(-1e9) is None
    fault = found.fault_of_loss(3.304)
    assert fault is not None and fault.startswith("the loss of 3.3040 is a spike (above 3.303")
    assert guard().fault_of_loss(1e9) is None


def test_losses_that_hardly_differ_have_a_least_spread() -> None:
    found = guard(check_for_spiky_loss=True, spiky_loss_deviations=10)
    for _ in range(20):
        found.take(2.0)
    # 1% of 2.0, ten times.
    assert found.fault_of_loss(2.2) is None and found.fault_of_loss(2.21) is not None


def test_only_the_last_losses_count_and_skipped_ones_do_not() -> None:
    found = guard(check_for_spiky_loss=True, spiky_loss_window=20)
    for index in range(50):
        found.take(float(index))
    assert found.losses == [float(index) for index in range(30, 50)]
    found.skip(51)
    assert len(found.losses) == 20 and found.streak == 1


def test_steps_are_counted_in_the_run_and_in_a_row() -> None:
    found = guard(max_skipped_steps=2)
    for step in (3, 4):
        found.skip(step)
        assert not found.is_too_many
    found.take(1.0)
    assert (found.skipped, found.streak) == ([3, 4], 0)
    resumed = guard(max_skipped_steps=2)
    resumed.load(json.loads(json.dumps(found.state())))
    assert resumed == found
    resumed.skip(9)
    assert resumed.is_too_many and resumed.streak == 1
    # A checkpoint of an earlier commit.
    resumed.load({})
    assert resumed == guard(max_skipped_steps=2)


def test_a_file_names_the_samples(tmp_path: Path) -> None:
    samples = [{"data": "d", "sample": 7, "loss": math.nan}, {"data": "d", "sample": 2, "loss": 0.5}]
    path = write_skipped(tmp_path, 12, "the loss is nan", metrics={"loss": math.nan, "nll": INFINITY}, samples=samples)
    assert path == path_of(tmp_path, 12) == tmp_path / "skipped" / "step_0000012.json"
    # Every JSON reader takes it: NaN is a text.
    found = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert found["samples"] == [{"data": "d", "sample": 7, "loss": "nan"}, {"data": "d", "sample": 2, "loss": 0.5}]
    assert found["metrics"] == {"loss": "nan", "nll": "inf"}


def test_settings_have_ranges() -> None:
    for name, value in (("max_skipped_steps", -1), ("spiky_loss_deviations", 0), ("spiky_loss_window", 19)):
        with pytest.raises(ConfigError, match=f"{name}={value}"):
            check(from_dict({"faults": {name: value}}, "test"))


def test_all_replicas_leave_out_an_update_that_one_must(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the distributed optimizer a replica whose arithmetic fails is the only one to see NaN."""
    monkeypatch.setattr(ChainedOptimizer, "get_grad_norm", lambda self: 1.5)
    monkeypatch.setattr(ChainedOptimizer, "step_with_ready_grads", lambda self: True)
    monkeypatch.setattr(optimization.dist, "all_reduce", lambda flag, op: flag.fill_(1))
    optimizer = object.__new__(optimization.Optimizer)
    assert optimizer.get_grad_norm() == 1.5 and optimizer.step_with_ready_grads()
    optimizer.has_replicas = True
    assert math.isnan(optimizer.get_grad_norm()) and not optimizer.step_with_ready_grads()


def test_a_replay_trains_what_a_later_launch_has_trained(tmp_path: Path) -> None:
    for step in (2, 3):
        write_skipped(tmp_path, step, "the loss is nan", metrics={}, samples=[])
    # Step 3 was skipped at first, and trained after a resume from step 2.
    lines = [{"step": 1, "loss": 1.0}, {"step": 2, "lr": 0.1, "skipped": 1}, {"step": 3, "loss": 0.9}]
    (tmp_path / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert _skipped(tmp_path) == {2}


def test_signals_that_the_parent_ignores_count_again() -> None:
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        heed(["SIGUSR1"])
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
        signal.signal(signal.SIGUSR1, signal.default_int_handler)
        heed(["SIGUSR1"])
        assert signal.getsignal(signal.SIGUSR1) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGUSR1, before)
