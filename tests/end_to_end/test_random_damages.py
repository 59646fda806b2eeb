"""Random damages of checkpoints, a few of those that ``python -m tests.random_damages`` draws; each seed draws others."""

from __future__ import annotations

import time
from pathlib import Path

from tests.support.launch import PYTHON, run


def test_random_damages_are_found_and_the_last_good_checkpoint_is_taken(tmp_path: Path) -> None:
    seed = str(int(time.time()))
    flags = ["--folder", str(tmp_path / "run"), "--damages", "12", "--commands", "0", "--seed", seed]
    done = run([PYTHON, "-m", "tests.random_damages", *flags])
    assert "12 found and said" in done.stdout
