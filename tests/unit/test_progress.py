"""Progress lines and log messages."""

from __future__ import annotations

import logging

import pytest
import torch.distributed as dist

from megatron_longpo.runtime import progress as module
from megatron_longpo.runtime.log import LOGGER, log
from megatron_longpo.runtime.progress import Progress, duration


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_lines_now_and_then_and_one_at_the_end(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("questions", 8, done=2) as progress:
        clock[0] = 5.0
        progress.add(1, tokens=50)
        assert capsys.readouterr().out == "", "not before ten seconds"
        clock[0] = 10.0
        progress.add(1, tokens=50)
        # Two in ten seconds; the two of an earlier run say nothing about the speed.
        assert capsys.readouterr().out == "questions: 4 of 8 documents, 0.20 documents/s, 10 tokens/s, 0:20 left\n"
        clock[0] = 12.0
        progress.add(4)
    assert capsys.readouterr().out == "questions: 8 of 8 documents, 0.50 documents/s, 8 tokens/s\n"


def test_the_last_line_is_not_logged_twice_nor_after_a_failure(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("short", 1) as progress:
        clock[0] = 10.0
        progress.add(1)
    assert len(capsys.readouterr().out.splitlines()) == 1
    with pytest.raises(ValueError), Progress("short", 2) as progress:
        progress.add(1)
        raise ValueError
    with Progress("short", 1, active=False) as progress:
        progress.add(1)
    with Progress("short", 1, last_line=False) as progress:
        progress.add(1)
    with Progress("short", 3, done=3):
        pass
    assert capsys.readouterr().out == ""


def test_bytes_with_a_total_that_is_known_later(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("import", unit="bytes") as progress:
        clock[0] = 20.0
        progress.add(4 * 10**9, total=16 * 10**9)
        assert capsys.readouterr().out == "import: 4.00 of 16.00 GB, 0.20 GB/s, 1:00 left\n"
        progress.stop()
        clock[0] = 50.0
    assert progress.seconds == 20.0


def test_processes_share_a_count(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes of a group, of which one reports: it shows what both have done."""
    store = dist.HashStore()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    # Each process counts its shared progress objects by itself.
    monkeypatch.setattr(module, "_shared_counts", iter([0, 0]))
    with Progress("verify", 8, unit="layers", shared=True) as first:
        with Progress("verify", 8, unit="layers", shared=True, active=False) as second:
            clock[0] = 1.0
            second.add(2)
            clock[0] = 1.2
            second.add(1)  # too soon to be exchanged
        clock[0] = 10.0
        first.add(1)
        assert capsys.readouterr().out == "verify: 4 of 8 layers, 0.40 layers/s, 0:10 left\n"


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (123, "2:03"), (3723, "1:02:03"), (-1, "0:00")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_only_reporting_ranks_log(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    log("step 1: 100% [sic] %s {x}")
    log("of another rank", active=False)
    log("a warning", active=False, level=logging.WARNING)
    assert capsys.readouterr().out == "step 1: 100% [sic] %s {x}\na warning\n"
    monkeypatch.setattr(LOGGER, "level", logging.DEBUG)
    LOGGER.manager._clear_cache()  # type: ignore[attr-defined]
    log("of another rank", active=False)
    assert capsys.readouterr().out == "of another rank\n"
