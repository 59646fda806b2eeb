"""Schedules, RMSProp, assignment of short rows, reporting and the platform's refusals, by hand."""

from __future__ import annotations

import io
import json
import math
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_longpo.config import Config, FaultsConfig, LoggingConfig, from_dict
from megatron_longpo.errors import ConfigError, DataError, PlatformError
from megatron_longpo.model.attention import check_ulysses, head_groups_of, resolve_comm_type
from megatron_longpo.model.gpt import padded_vocab_size
from megatron_longpo.runtime import platform
from megatron_longpo.runtime.balance import assign
from megatron_longpo.runtime.log import LOGGER, log, use_json
from megatron_longpo.training import fingerprint as fingerprints
from megatron_longpo.training import held_out, metrics, phases
from megatron_longpo.training.fingerprint import fingerprint
from megatron_longpo.training.metrics import Reporter, SampleMetrics, keep_until, read_metrics, reduce_samples
from megatron_longpo.training.optimization import _become_rmsprop, build_scheduler, idle_line
from megatron_longpo.training.phases import Phases
from megatron_longpo.training.reference import ReferenceCache
from megatron_longpo.training.reference_scoring import pack
from megatron_longpo.training.trackers import TensorBoard
from tests.support.plans import SHAPE


class _Optimizer:
    """What the scheduler sees of an optimizer."""

    def __init__(self) -> None:
        self.param_groups = [{"lr": 0.0, "weight_decay": 0.0, "params": []}]


def _rates(train_iters: int, **values: Any) -> list[float]:
    optimizer = _Optimizer()
    config = from_dict({"optimizer": {"lr": 1.0, "min_lr": 0.1, **values}}, "test")
    scheduler = build_scheduler(config, optimizer, train_iters)  # type: ignore[arg-type]
    rates = []
    for _ in range(train_iters):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(increment=1)
    return rates  # type: ignore[return-value]


def test_schedules_by_hand() -> None:
    cosine = _rates(10, lr_decay_style="cosine", lr_warmup_fraction=0.2)
    # Two warm-up steps, then nine intervals of decay from the second step on, of which the seventh step is the fifth.
    assert cosine[:2] == pytest.approx([0.5, 1.0])
    assert cosine[6] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 5 / 9)))
    assert _rates(10, lr_decay_style="linear", lr_warmup_iters=2)[6] == pytest.approx(0.1 + 0.9 * 4 / 9)
    assert _rates(5, lr_decay_style="constant") == pytest.approx([1.0] * 5)
    wsd = _rates(10, lr_decay_style="WSD", lr_wsd_decay_iters=4, lr_warmup_iters=1)
    assert wsd[:7] == pytest.approx([1.0] * 7)
    assert wsd[8] == pytest.approx(0.1 + 0.9 * 0.5)
    with pytest.raises(ConfigError, match="warm-up of 11 steps"):
        _rates(10, lr_warmup_iters=11)


def test_a_warm_up_step_k_of_w_has_k_over_w_of_the_rate() -> None:
    assert _rates(6, lr_warmup_iters=1, lr_decay_style="constant") == pytest.approx([1.0] * 6)
    assert _rates(6, lr_warmup_iters=4, lr_decay_style="constant") == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])
    assert _rates(3, lr_warmup_iters=3) == pytest.approx([1 / 3, 2 / 3, 1])
    assert _rates(1, lr_warmup_fraction=0.1) == pytest.approx([1.0])
    # From 0.2 on, five steps of 0.16 each.
    above = _rates(5, lr_warmup_iters=5, lr_warmup_init=0.2, min_lr=0.0)
    assert above == pytest.approx([0.36, 0.52, 0.68, 0.84, 1.0])


def test_steps_at_the_rate_0_are_said() -> None:
    def line(train_iters: int, **values: Any) -> str | None:
        return idle_line(from_dict({"optimizer": values}, "test"), train_iters)

    assert "0 from step 7 on (lr_decay_iters=6, min_lr=0), so 4 of 10 steps" in str(line(10, lr_decay_iters=6))
    assert _rates(10, lr_decay_iters=6, min_lr=0.0)[5] > 0 and _rates(10, lr_decay_iters=6, min_lr=0.0)[6:] == [0] * 4
    assert line(10) is None and line(10, lr_decay_iters=10) is None
    assert (
        line(10, lr_decay_iters=6, min_lr=1e-8) is None
        and line(10, lr_decay_iters=6, lr_decay_style="constant") is None
    )


def test_a_run_keeps_the_schedule_that_it_began_with() -> None:
    config = from_dict({"optimizer": {"lr": 1.0, "lr_warmup_iters": 4, "lr_decay_style": "linear"}}, "test")

    def resumed(state: dict[str, Any]) -> list[float]:
        optimizer = _Optimizer()
        scheduler = build_scheduler(config, optimizer, 8)  # type: ignore[arg-type]
        scheduler.load_state_dict(state)
        rates = []
        for _ in range(int(state["num_steps"]), 8):
            rates.append(optimizer.param_groups[0]["lr"])
            scheduler.step(increment=1)
        again = build_scheduler(config, _Optimizer(), 8)  # type: ignore[arg-type]
        again.load_state_dict({**scheduler.state_dict(), "num_steps": 2})
        assert again.optimizer.param_groups[0]["lr"] == rates[0], "also after a second resume"
        return rates  # type: ignore[return-value]

    now = build_scheduler(config, _Optimizer(), 8)  # type: ignore[arg-type]
    now.step(increment=2)
    # Step 3 of 4, the peak, then four of five intervals down to 0.
    assert resumed(now.state_dict()) == pytest.approx([0.75, 1.0, 0.8, 0.6, 0.4, 0.2])
    # Checkpoints of earlier commits have no such key: there step k of w has (k - 1)/w.
    before = {name: value for name, value in now.state_dict().items() if name != "begins_at_zero"}
    assert resumed(before) == pytest.approx([0.5, 0.75, 1.0, 0.75, 0.5, 0.25])


def test_rmsprop_is_torchs() -> None:
    torch.manual_seed(0)
    start = torch.randn(7, 3)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    settings_ = {"lr": 1e-2, "eps": 1e-8, "weight_decay": 0.1}
    mine: torch.optim.Optimizer = torch.optim.AdamW([ours], **settings_)
    _become_rmsprop(mine, 0.99)
    reference = torch.optim.RMSprop([theirs], alpha=0.99, **settings_)
    for _ in range(5):
        gradient = torch.randn(7, 3)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        reference.step()
    torch.testing.assert_close(ours, theirs)
    assert set(mine.state[ours]) == {"step", "exp_avg_sq"} and mine.state[ours]["step"] == 5


@given(st.lists(st.floats(0.1, 100), max_size=40), st.integers(1, 6))
def test_dealing_loses_nothing_and_keeps_grahams_bound(costs: list[float], ranks: int) -> None:
    assigned = assign(costs, ranks)
    assert sorted(i for mine in assigned for i in mine) == list(range(len(costs)))
    if costs:
        loads = [sum(costs[i] for i in mine) for mine in assigned]
        assert max(loads) <= sum(costs) / ranks + max(costs) + 1e-9


def test_short_rows_are_balanced() -> None:
    """64 rows of lognormal lengths on 4 ranks: the slowest has at most 1.05 times the mean."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(7, 1, 64), 256, 8192)
    costs = (lengths * 3.5e6 + lengths**2 * 1152).tolist()
    loads = [sum(costs[i] for i in mine) for mine in assign(costs, 4)]
    assert max(loads) <= 1.05 * sum(loads) / 4


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 60))
def test_packing_keeps_the_limit(tokens: list[int], limit: int) -> None:
    packs = pack(tokens, limit)
    assert sorted(i for p in packs for i in p) == list(range(len(tokens)))
    assert all(sum(tokens[i] for i in p) <= limit or len(p) == 1 for p in packs)


def test_heads_and_context_ranks() -> None:
    check_ulysses(32, 8, 8, 1)
    check_ulysses(32, 8, 16, 1)  # key-value heads repeated
    with pytest.raises(ConfigError, match="use one of 1, 2, 4, 28, or cp_comm_type=allgather"):
        check_ulysses(28, 4, 8, 1)
    assert resolve_comm_type("auto", 28, 4, 8, 1)[0] == "allgather"
    assert resolve_comm_type("auto", 32, 8, 8, 1)[0] == "a2a"
    assert resolve_comm_type("allgather", 32, 8, 8, 1)[0] == "allgather"


def test_heads_of_one_key_value_head_are_exchanged_in_groups_too() -> None:
    """Otherwise nothing of an exchange would be hidden where a rank has one key-value head, as a 7B's at CP 8."""

    def groups(heads: int, kv_heads: int) -> list[tuple[int, int, int, int, bool, bool]]:
        found = head_groups_of(heads, kv_heads, 4)
        return [(*(g.queries.start, g.queries.stop), g.keys.start, g.keys.stop, g.is_first, g.is_last) for g in found]

    assert groups(4, 1) == [
        (0, 1, 0, 1, True, False),
        (1, 2, 0, 1, False, False),
        (2, 3, 0, 1, False, False),
        (3, 4, 0, 1, False, True),
    ]
    # Of two key-value heads each is cut into two, of seven query heads as evenly as can be.
    assert groups(14, 2) == [
        (0, 3, 0, 1, True, False),
        (3, 7, 0, 1, False, True),
        (7, 10, 1, 2, True, False),
        (10, 14, 1, 2, False, True),
    ]
    # Three cannot be cut into four groups evenly, and eight make four groups as they are.
    assert groups(6, 3) == [(0, 2, 0, 1, True, True), (2, 4, 1, 2, True, True), (4, 6, 2, 3, True, True)]
    assert groups(8, 8) == [(i, i + 2, i, i + 2, True, True) for i in (0, 2, 4, 6)]
    assert groups(1, 1) == [(0, 1, 0, 1, True, True)]


def test_vocabulary_is_rounded_up() -> None:
    assert [padded_vocab_size(v, 8, 2) for v in (101, 112, 113)] == [112, 112, 128]


def test_platform_refuses_what_goes_wrong_silently() -> None:
    with pytest.raises(PlatformError, match="wrong losses"):
        platform.check_p2p(True, 2)
    platform.check_p2p(True, None)
    assert not platform.use_batched_p2p(virtual_pipeline=True)
    assert platform.CURRENT.name == "cpu" and platform.CURRENT.reason


def test_metrics_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": i, "loss": 1.0}) + "\n" for i in (1, 2, 3)) + '{"step": 4, "lo')
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3]
    assert [r["step"] for r in keep_until(path, 2)] == [1, 2]
    assert [r["step"] for r in read_metrics(path)] == [1, 2]


def test_reporter_writes_what_people_look_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = "loss nll preference logps/chosen logps/rejected ref/chosen ref/rejected rewards/chosen rewards/rejected"
    record = dict.fromkeys(names.split(), 0.5) | {"rewards/margins": 0.1, "rewards/accuracies": 1.0, "grad_norm": 1.0}
    record |= {"lr": 1e-6, "tokens": 10, "tokens_per_second": 5.0, "step_seconds": 2.0, "peak_memory_gb": 1.0}
    reporter = Reporter(
        tmp_path,
        train_iters=2,
        resumed_step=0,
        config=Config(logging=LoggingConfig(plot_interval=1)),
        active=True,
        trackers=[TensorBoard(tmp_path / "tensorboard")],
    )
    for step in (1, 2):
        reporter.step({"step": step, **record})
    reporter.close()
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "tensorboard").iterdir())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 1/2 | loss 0.5000") and "left" in lines[0]


def test_curves_take_little_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, drawn = [0.0], []

    def draw(records: list[dict[str, Any]], *_: object) -> None:
        drawn.append(records[-1]["step"])
        now[0] += 2.0

    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(metrics, "draw_curves", draw)
    monkeypatch.setattr(Reporter, "_line", lambda *_: "")
    config = Config(logging=LoggingConfig(plot_interval=5))
    reporter = Reporter(tmp_path, train_iters=100, resumed_step=0, config=config, active=True)
    for step in range(1, 101):
        now[0] += 1.0
        reporter.step({"step": step})
    reporter.close()
    # Two seconds of drawing are allowed after forty of training, at a multiple of five steps; the last one always.
    assert drawn == [5, 45, 85, 100]


class _FullDisk(io.StringIO):
    """A stream on which every second flush fails, with half of the line written."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.name, self._path = str(path), path

    def write(self, text: str) -> int:
        with open(self._path, "a", encoding="utf-8") as stream:
            return stream.write(text[: len(text) // 2])

    def flush(self) -> None:
        raise OSError(28, "No space left on device")


def test_lines_that_could_not_be_written_follow_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = "loss nll rewards/margins rewards/accuracies grad_norm lr tokens_per_second"
    record = dict.fromkeys(names.split(), 0.5)
    for goes_on in (True, False):
        faults = FaultsConfig(on_save_failure="continue" if goes_on else "stop")
        output = tmp_path / str(goes_on)
        reporter = Reporter(output, train_iters=9, resumed_step=0, config=Config(faults=faults), active=True)
        path = output / "metrics.jsonl"
        reporter.step({"step": 1, **record})
        reporter._stream = _FullDisk(path)
        if not goes_on:
            with pytest.raises(OSError, match="No space left"):
                reporter.step({"step": 2, **record})
            continue
        reporter.step({"step": 2, **record})
        assert "cannot be written (No space left on device); its lines follow when it can be" in capsys.readouterr().out
        assert [r["step"] for r in read_metrics(path)] == [1]
        reporter.step({"step": 3, **record})
        reporter.step({"step": 4, **record})
        reporter.close()
        assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4]


def test_a_step_as_an_object_on_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    names = "loss nll rewards/margins rewards/accuracies grad_norm lr tokens_per_second"
    reporter = Reporter(None, train_iters=4, resumed_step=0, config=Config(), active=True)
    handlers = [(handler, handler.formatter) for handler in LOGGER.handlers]
    use_json()
    try:
        reporter.step({"step": 1, **dict.fromkeys(names.split(), 0.5)})
        log("plain words")
    finally:
        for handler, formatter in handlers:
            handler.setFormatter(formatter)
    step, words = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert step["event"] == "step" and step["step"] == 1 and step["rewards/margins"] == 0.5 and step["train_iters"] == 4
    assert step["message"].startswith("step 1/4 | loss 0.5000") and step["seconds_left"] >= 0
    assert words["message"] == "plain words" and words["level"] == "info"
    assert datetime.fromisoformat(words["time"]).tzinfo is not None


def test_the_time_of_a_step_by_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 10.0, 11.0, 14.0, 16.0, 20.0, 21.0])
    monkeypatch.setattr(phases.time, "monotonic", lambda: next(times))
    clock = Phases()
    clock.begin()
    clock.end("reference")
    clock.end("forward_backward")
    clock.end("optimizer")
    expected = {"between_steps": 10.0, "reference": 1.0, "forward_backward": 3.0, "optimizer": 2.0}
    assert clock.as_metrics() == {f"seconds/{name}": value for name, value in expected.items()}
    assert clock.step_seconds == 6.0
    clock.begin()
    clock.end("reference")
    assert clock.as_metrics() == {"seconds/between_steps": 4.0, "seconds/reference": 1.0}


def test_operations_of_a_step_by_hand() -> None:
    """Hidden 8, 2 heads of 4 on 1 key-value head, MLP 16, 3 layers, vocabulary 10; one row of 6 tokens.

    A layer has 8 * (2 * 8 + 2 * 4) + 3 * 8 * 16 = 576 weights. The row's multiply-adds in a layer: 6 * 576, and two products of
    width 8 for each of 18 query-key pairs. Forward and backward are six operations for each.
    """
    heads = {"num_attention_heads": 2, "num_query_groups": 1, "kv_channels": 4}
    shape = SHAPE.replace(num_layers=3, hidden_size=8, ffn_hidden_size=16, vocab_size=10, **heads)
    cost = 6 * 576 + 2 * 18 * 8
    assert shape.row_cost(6) == cost
    assert shape.step_flops(cost, 6) == 6 * (3 * cost + 8 * 10 * 6)


def test_a_fingerprint_changes_with_any_bit() -> None:
    values = torch.arange(1000, dtype=torch.float32).reshape(10, 100)
    before = fingerprint([values, values.bfloat16()])
    assert before == fingerprint([values.clone(), values.bfloat16()])
    other = values.clone()
    other[7, 3] = math.nextafter(float(other[7, 3]), math.inf)  # rounds to the same fp32
    assert fingerprint([other, values.bfloat16()]) == before
    other.view(torch.int32)[7, 3] += 1
    assert fingerprint([other, values.bfloat16()]) != before
    # Neither two values nor two tensors may be swapped.
    swapped = values.clone()
    swapped[0, :2] = swapped[0, [1, 0]]
    assert fingerprint([swapped, values.bfloat16()]) != before != fingerprint([values.bfloat16(), values])
    assert fingerprint([]) == 0


def test_a_fingerprint_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits 5 and 6 count at places 1 and 2, and so do those of the chunk after: 5 + 12, then 17 * 31 + 7 * 3."""
    bits = torch.tensor([5, 6, 7], dtype=torch.int32).view(torch.float32)
    assert fingerprint([bits]) == 5 * 1 + 6 * 2 + 7 * 3
    monkeypatch.setattr(fingerprints, "_CHUNK", 2)
    assert fingerprint([bits]) == (5 * 1 + 6 * 2) * 31 + 7 * 3


@settings(max_examples=20, deadline=None)
@given(st.binary(max_size=50))
def test_a_damaged_cache_is_refused(tmp_path_factory: pytest.TempPathFactory, junk: bytes) -> None:
    cache = ReferenceCache(tmp_path_factory.mktemp("cache"), {"weights": "w"}, 3)
    assert cache.read() is None
    cache.path.write_bytes(junk)
    with pytest.raises(DataError, match="remove it"):
        cache.read()


def test_another_identity_is_another_cache(tmp_path: Path) -> None:
    caches = [ReferenceCache(tmp_path, {"weights": w, "scope": s}, 3) for w in "ab" for s in ("short", "long")]
    assert len({c.path for c in caches}) == 4


class _LastStage:
    """What the reduction of metrics sees of the only rank."""

    is_last_stage, pipeline_size, data_group = True, 1, None


@pytest.mark.parametrize("order", ["as it is", "reversed"])
def test_a_metric_is_known_by_its_name_in_whatever_order(monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    """Two micro batches that give their metrics in orders of their own, at places of their own."""
    names = metrics.SAMPLE_METRICS
    if order == "reversed":
        monkeypatch.setattr(metrics, "SAMPLE_METRICS", names[::-1])
    monkeypatch.setattr(metrics.dist, "all_reduce", lambda *_, **__: None)
    # Of the metric number i, sample number n has the value 10 * i + n.
    values = {
        name: [10.0 * i + n for n in range(3)] for i, name in enumerate((*names, "only some objectives have this"))
    }

    def of(places: list[int], order: list[str]) -> SampleMetrics:
        columns = {name: torch.tensor([values[name][p] for p in places], dtype=torch.float64) for name in order}
        return SampleMetrics(places, columns)

    found = [of([2, 0], list(values)), of([1], list(values)[::-1])]
    means = reduce_samples(found, 3, _LastStage())  # type: ignore[arg-type]
    assert list(means) == list(metrics.SAMPLE_METRICS)
    for i, name in enumerate(names):
        assert means[name] == (30.0 * i + 3 if name == "tokens" else 10.0 * i + 1), name
    gathered = metrics.gather_samples(found, ("tokens", "loss"), 3, _LastStage())  # type: ignore[arg-type]
    assert {name: column.tolist() for name, column in gathered.items()} == {n: values[n] for n in ("tokens", "loss")}


def test_metrics_in_files_do_not_depend_on_the_order_in_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half-done evaluations keep a list of numbers per sample, whose order is that of commit a8ab853."""
    order = "loss nll preference logps/chosen logps/rejected ref/chosen ref/rejected rewards/chosen rewards/rejected"
    order += " rewards/margins rewards/accuracies tokens response_tokens/chosen response_tokens/rejected"
    table = {name: np.array([100.0 + i, 200.0 + i]) for i, name in enumerate(order.split())}
    (first, second) = held_out.kept_rows([5, 7], dict(reversed(table.items())))
    assert first["figures"] == [100.0 + i for i in range(14)] and first["score"] == 100.0
    kept = held_out.kept_metrics([first, second, {"index": 9, "figures": [1.0]}])
    assert kept == {n: {name: values[i] for name, values in table.items()} for i, n in enumerate((5, 7))}
