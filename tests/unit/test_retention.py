"""Which checkpoints stay."""

from __future__ import annotations

import pytest

from megatron_longpo.checkpoint.retention import Retention
from megatron_longpo.config import CheckpointConfig, Config, check
from megatron_longpo.errors import ConfigError

STEPS = (10, 20, 30, 40, 45)


def test_the_newest_every_kth_and_those_that_are_spared_stay() -> None:
    assert Retention(None).removable(STEPS) == []
    assert Retention(2).removable(STEPS) == [10, 20, 30]
    assert Retention(2, 20).removable(STEPS) == [10, 30]
    assert Retention(2, 20).removable(STEPS, spare={10}) == [30]
    assert Retention(5).removable(STEPS) == Retention(9).removable(STEPS) == Retention(1).removable([]) == []


def test_retaining_every_kth_keeps_one_of_the_others_as_in_megatron() -> None:
    assert Retention.of(CheckpointConfig(save_interval=10)) == Retention(None)
    assert Retention.of(CheckpointConfig(save_interval=10, save_retain_interval=20)) == Retention(1, 20)
    assert Retention.of(CheckpointConfig(save_interval=10, save_retain_interval=20, keep_last=3)) == Retention(3, 20)
    assert Retention(1, 20).removable(STEPS) == [10, 30]


@pytest.mark.parametrize(
    ("interval", "message"),
    [
        (None, "save_retain_interval=25 keeps some of the checkpoints of save_interval, which is not given"),
        (10, r"save_retain_interval=25 must be a multiple of save_interval=10.*; use 20$"),
    ],
)
def test_steps_that_are_retained_must_be_saved(interval: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(Config(checkpoint=CheckpointConfig(save="run", save_interval=interval, save_retain_interval=25)))
