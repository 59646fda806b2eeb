"""The trainer's parts decide for themselves: when to evaluate, save, stop and profile, and what is recomputed."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import os
import signal
import types
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.profiler import record_function

from megatron_longpo.config import CheckpointConfig, LoggingConfig, ObjectiveConfig, check, from_dict
from megatron_longpo.data.indexed import Manifest
from megatron_longpo.data.preference import Sample
from megatron_longpo.errors import CheckpointError, ConfigError, DamagedError
from megatron_longpo.training import checkpointer as checkpointer_module
from megatron_longpo.training import memory, session, stopping
from megatron_longpo.training import trainer as trainer_module
from megatron_longpo.training.best import Best
from megatron_longpo.training.checkpointer import Checkpointer, check_shared
from megatron_longpo.training.held_out import HeldOut
from megatron_longpo.training.objective import LOSS_TYPES, OBJECTIVES
from megatron_longpo.training.plan import RunPlan
from megatron_longpo.training.profiler import Profiler
from megatron_longpo.training.reference import NoReference
from megatron_longpo.training.stopping import Stop, StopCondition
from tests.support.data import random_sample
from tests.support.plans import SHAPE, plan_of

_MANIFEST = Manifest(
    vocab_size=101,
    dtype="uint16",
    tokenizer=None,
    tokenizer_hash=None,
    template_hash=None,
    longest=200,
    bin_sha256="sha",
)


def _plan(output: Path | None = None, **sections: dict[str, Any]) -> RunPlan:
    """A plan of ten steps."""
    if output is not None:
        sections["checkpoint"] = {**sections.get("checkpoint", {}), "save": str(output)}
    return RunPlan(
        config=from_dict(sections, "test"),
        load=Path("ckpt"),
        reference_load=Path("ckpt"),
        shape=SHAPE,
        reference_shape=SHAPE,
        manifest=_MANIFEST,
        valid_manifest=None,
        train_iters=10,
        comm_type="a2a",
        comm_reason="test",
    )


_ONE: Any = types.SimpleNamespace(
    rank=0,
    tensor_size=1,
    pipeline_size=1,
    context_size=1,
    data_size=1,
    dp_cp_size=1,
    pipeline_rank=0,
    virtual_stages=None,
    sequence_parallel=False,
    comm_type="a2a",
)


def test_objectives_and_loss_types_are_those_of_the_configuration() -> None:
    hints = typing.get_type_hints(ObjectiveConfig)
    assert set(OBJECTIVES) == set(typing.get_args(hints["objective"]))
    assert set(LOSS_TYPES) == set(typing.get_args(hints["loss_type"]))


def _held_out(plan: RunPlan, data: Any) -> HeldOut:
    return HeldOut(plan, _ONE, data=data, chunks=[], runner=None, reference=NoReference())  # type: ignore[arg-type]


def test_held_out_data_are_evaluated_first_last_and_every_interval() -> None:
    plan = _plan(training={"eval_interval": 4})
    assert [s for s in range(11) if _held_out(plan, [1]).should_evaluate(s)] == [0, 4, 8, 10]
    assert [s for s in range(11) if _held_out(_plan(), [1]).should_evaluate(s)] == [0, 10]
    assert not any(_held_out(plan, None).should_evaluate(s) for s in range(11))


def test_a_checkpointer_saves_every_interval_and_at_the_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checkpointer_module, "on_rank0", lambda action: action())
    saved: list[int] = []
    monkeypatch.setattr(Checkpointer, "_save", lambda _self, _output, step, *_: saved.append(step))
    state: Any = None
    keeper = Checkpointer(_plan(tmp_path, checkpoint={"save_interval": 4}), _ONE, reference_weights="")
    for step in range(1, 11):
        keeper.save(step, state, records=[], last=step == 10)
    assert saved == [4, 8, 10]
    saved.clear()
    for output, interval in ((tmp_path, None), (None, 1)):
        keeper = Checkpointer(_plan(output, checkpoint={"save_interval": interval}), _ONE, reference_weights="")
        for step in range(1, 11):
            keeper.save(step, state, records=[], last=step == 10)
    # Without an interval the last step only; without an output folder nothing.
    assert saved == [10]


def test_another_run_is_refused_before_anything_long(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checkpointer_module, "on_rank0", lambda action: action())
    monkeypatch.setattr(checkpointer_module, "whole_steps", lambda _: [3])
    before = checkpointer_module.run_identity(_plan(tmp_path), "weights")
    progress = checkpointer_module.RunProgress(step=3, layout="", train_iters=10, identity=before)
    monkeypatch.setattr(checkpointer_module, "read_progress", lambda _: progress)
    keeper = Checkpointer(_plan(tmp_path), _ONE, reference_weights="weights")
    assert keeper.resume_step == 3
    # A save in the background fails: neither it nor its best value was ever there.
    keeper.saved_step, keeper.best = 8, Best(8, 0.5)
    keeper.give_up_save()
    assert (keeper.saved_step, keeper.best) == (keeper.good_step, None)
    with pytest.raises(CheckpointError, match=r"has beta=0\.1, but now it is 0\.2; use the same value"):
        Checkpointer(_plan(tmp_path, objective={"beta": 0.2}), _ONE, reference_weights="weights")
    # A setting that did not exist when the run was saved.
    del before["rope_scaling"]
    Checkpointer(_plan(tmp_path), _ONE, reference_weights="weights")


def test_a_damaged_checkpoint_is_replaced_by_the_stores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Damage that shows only as it is loaded."""
    monkeypatch.setattr(checkpointer_module, "on_rank0", lambda action: action())
    monkeypatch.setattr(checkpointer_module, "whole_steps", lambda _: [3, 6])
    identity = checkpointer_module.run_identity(_plan(tmp_path), "weights")
    progress = checkpointer_module.RunProgress(step=6, layout="", train_iters=10, identity=identity)
    monkeypatch.setattr(checkpointer_module, "read_progress", lambda _: progress)
    damaged, put = {"iter_0000006"}, []
    state: Any = None

    def load(_: Checkpointer, folder: Path, __: Any) -> None:
        if folder.name in damaged:
            raise DamagedError(f"{folder.name} is damaged")

    monkeypatch.setattr(Checkpointer, "_load_run", load)
    monkeypatch.setattr(Checkpointer, "_set_damaged_aside", lambda *_: None)
    for has_copy, resumed in ((False, 3), (True, 6)):

        def bring(step: int, *, has_copy: bool = has_copy) -> bool:
            if has_copy:
                damaged.remove(f"iter_{step:07d}")
            return has_copy

        uploader = types.SimpleNamespace(put=lambda step, best, is_old: put.append((step, is_old)))
        uploads: Any = types.SimpleNamespace(uploader=uploader, bring=bring)
        keeper = Checkpointer(_plan(tmp_path), _ONE, reference_weights="weights", uploads=uploads)
        assert keeper.resume(state) == resumed
    assert put == [(3, False), (3, True), (6, False)]
    assert "iter_0000006 is damaged; its copy in the store is used" in capsys.readouterr().out


def test_ranks_that_do_not_share_the_folder_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check_shared(tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(
        checkpointer_module, "all_gather_objects", lambda own: [own, ("node1", False), ("node1", False)]
    )
    with pytest.raises(
        CheckpointError, match=r"2 ranks do not see .*host node1.*; give --save a folder that all nodes"
    ):
        check_shared(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_without_the_files_of_a_rank_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    dcp.save({"weight": torch.ones(2)}, checkpoint_id=tmp_path, no_dist=True)
    checkpointer_module._check_written(tmp_path)
    monkeypatch.setattr(checkpointer_module, "_SECONDS_UNTIL_SEEN", 0.0)
    (tmp_path / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"1 files .* are not there, __0_0\.distcp first; give --save"):
        checkpointer_module._check_written(tmp_path)


def test_a_run_stops_after_its_interval_or_its_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now)
    monkeypatch.setattr(stopping.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(stopping.dist, "all_reduce", lambda *_, **__: None)
    interval = StopCondition(CheckpointConfig(exit_interval=3), began=0.0)
    assert [s for s in range(1, 8) if interval.check(s)] == [3, 6]
    assert StopCondition(CheckpointConfig(exit_duration_in_mins=16), began=0.0).check(1) == Stop("as requested")
    assert not StopCondition(CheckpointConfig(exit_duration_in_mins=17), began=0.0).check(1)
    assert not StopCondition(CheckpointConfig(), began=0.0).check(1)


def test_a_run_stops_on_a_signal_that_any_rank_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    reduced: list[list[int]] = []
    monkeypatch.setattr(stopping.dist, "all_reduce", lambda found, **_: reduced.append(found.tolist()))
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    with contextlib.closing(StopCondition(CheckpointConfig(), began=0.0)) as condition:
        condition.open()
        assert condition.check(1) is None
        # Whoever stops a job may send several.
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert condition.check(2) == Stop("on SIGUSR1", is_urgent=True)
    assert reduced == [[0, 0], [int(signal.SIGUSR1), 0]]
    assert {number: signal.getsignal(number) for number in before} == before

    # What another rank got counts like one's own.
    monkeypatch.setattr(stopping.dist, "all_reduce", lambda found, **_: found.fill_(int(signal.SIGTERM)))
    assert StopCondition(CheckpointConfig(), began=0.0).check(1) == Stop("on SIGTERM", is_urgent=True)
    # Nothing is asked for, so nothing is exchanged.
    assert StopCondition(CheckpointConfig(exit_signal_handler=False), began=0.0).check(1) is None
    with pytest.raises(ConfigError, match="exit_signal=SIGKILL is not a signal that a run can stop on; use SIGTERM, "):
        check(from_dict({"checkpoint": {"exit_signal": ["SIGKILL"]}}, "test"))


class _Data:
    """Samples and their costs, as a data set has them."""

    def __init__(self, samples: list[Sample]) -> None:
        self._samples = samples
        self.costs = [SHAPE.row_cost(s.long_length) for s in samples]

    def samples(self, numbers: Any) -> list[Sample]:
        return [self._samples[int(n)] for n in numbers]


def test_the_plan_holds_what_is_recomputed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    data: Any = _Data([random_sample(rng, 2, context=c) for c in (40, 150, 90)])
    monkeypatch.setattr(memory.dist, "all_reduce", lambda *_, **__: None)
    chosen = _plan(training={"recompute_granularity": "full"})
    assert memory.decide_recompute(chosen, data, _ONE) is chosen
    evaluated = memory.decide_recompute(_plan(training={"skip_train": True}), data, _ONE)
    assert evaluated.config.training.recompute_granularity == "none"
    plan = _plan(training={"global_batch_size": 2})
    resolved = memory.decide_recompute(plan, data, _ONE)
    training = resolved.config.training
    assert (
        training.recompute_granularity in ("none", "selective") and plan.config.training.recompute_granularity == "auto"
    )
    assert dataclasses.replace(plan.config, training=training) == resolved.config
    assert "recompute: " in capsys.readouterr().out


def test_small_data_and_unused_samples_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parallel: Any = types.SimpleNamespace(**{**vars(_ONE), "rank": 0, "world_size": 1, "describe": lambda: "DP 1"})

    def said(samples: int) -> tuple[int, str]:
        # Ten steps of eight samples.
        plan = plan_of(tmp_path, manifest={"samples": samples})
        session._log_plan(plan, parallel)
        return plan.samples_per_step, capsys.readouterr().out

    per_step, text = said(5)
    assert per_step == 5 and "10 steps of 5 samples" in text
    assert "5 samples are fewer than global_batch_size=8; each step takes all of them, each once" in text
    per_step, text = said(100)
    assert per_step == 8 and "20 of 100 samples are not used, since only whole batches are" in text
    assert "not used" not in said(80)[1] and "fewer" not in said(8)[1]


def test_unequal_stages_choose_among_the_same() -> None:
    """They exchange in the same order, so a stage of one layer and one of three must number their choices alike."""
    plan = _plan(parallel={"pipeline_model_parallel_size": 2, "decoder_first_pipeline_num_layers": 1})
    parallel: Any = types.SimpleNamespace(**{**vars(_ONE), "pipeline_size": 2})
    sizes: dict[str, Any] = {"tokens": 1000, "pairs": 500_000, "num_microbatches": 4}
    first, last = (memory.choices(SHAPE, plan.config, parallel, **sizes, stage=stage) for stage in (0, 1))
    assert [(c.granularity, c.layers, c.extra) for c in first] == [(c.granularity, c.layers, c.extra) for c in last]
    assert sorted(c.layers for c in first if c.granularity == "full") == [1, 2, 3]
    # Of all stages the one that needs most, whichever rank asks.
    neediest = memory.choices(SHAPE, plan.config, parallel, **sizes, stage=None)
    assert [c.bytes_needed for c in neediest] == [
        max(a.bytes_needed, b.bytes_needed) for a, b in zip(first, last, strict=True)
    ]
    # In fp32 a parameter takes 16 bytes with gradient and states. The embedding and the output have 128 rows, padding included,
    # and the last stage has a norm more.
    layer = SHAPE.layer_weights + 2 * 48
    needs = [memory.static_bytes(SHAPE, plan.config, parallel, stage).total for stage in (0, 1)]
    assert needs == [16 * (1 * layer + 128 * 48), 16 * (3 * layer + 128 * 48 + 48)]


def test_a_layer_costs_what_its_matrices_and_pairs_cost() -> None:
    # Heads of 12: queries 48 wide, keys and values 24; 7 tokens, 7 * 7 / 2 causal pairs in two products.
    weights = 48 * (48 + 24 + 24) + 48 * 48 + 3 * 48 * 96
    assert SHAPE.query_width == 48 and SHAPE.kv_width == 24 and SHAPE.layer_weights == weights
    assert SHAPE.row_cost(7) == 7 * weights + 2 * 24.5 * 48


@pytest.mark.parametrize(
    ("rank", "steps", "expected"),
    [
        (0, range(10), ["steps_3-5_rank_0"]),
        # Resumed within the profiled steps, and stopped within them.
        (0, range(3, 4), ["steps_4-4_rank_0"]),
        (0, range(5, 9), []),
        (1, range(10), []),
    ],
)
def test_chosen_steps_are_profiled_on_chosen_ranks(
    tmp_path: Path, rank: int, steps: range, expected: list[str]
) -> None:
    config = LoggingConfig(profile=True, profile_step_start=2, profile_step_end=5)
    profiler = Profiler(config, tmp_path, rank)
    for step in steps:
        profiler.update(step)
        with record_function(f"longpo/step {step + 1}"):
            torch.zeros(3).sum()
    profiler.close(steps[-1] + 1)
    traces = sorted(tmp_path.glob("profile/*"))
    assert [t.name for t in traces] == [f"{name}.json.gz" for name in expected]
    for trace in traces:
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        names = {e["name"] for e in events if e.get("name", "").startswith("longpo/")}
        first, last = map(int, trace.name.split("_")[1].split("-"))
        assert names == {f"longpo/step {n}" for n in range(first, last + 1)}


def test_a_profile_that_is_off_or_has_no_folder_writes_nothing(tmp_path: Path) -> None:
    for config, output in ((LoggingConfig(profile_step_start=0), tmp_path), (LoggingConfig(profile=True), None)):
        profiler = Profiler(config, output, 0)
        profiler.update(10)
        profiler.close(11)
    assert not list(tmp_path.iterdir())


def test_profile_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="profile is on but save is not given; name the output folder with --save"):
        check(from_dict({"logging": {"profile": True}}, "test"))
    with pytest.raises(ConfigError, match="profile_step_start=12 must be less than profile_step_end=12"):
        check(from_dict({"logging": {"profile_step_start": 12}}, "test"))


def test_ranks_that_start_from_different_checkpoints_say_what_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another step, as one was completed meanwhile, or another content under the same name, as on disks of the nodes' own."""
    own = ("iter_0000020", "sha of 20")
    for other in (("iter_0000010", "sha of 10"), ("iter_0000020", "another")):
        monkeypatch.setattr(trainer_module, "all_gather_objects", lambda _, other=other: [own, own, other])
        with pytest.raises(
            CheckpointError,
            match=f"rank 0 chose iter_0000020 and rank 2 {other[0]}, .*nodes have different copies; run",
        ):
            trainer_module._check_same_choice(_plan())
