"""Training in which one rank fails in its second step."""

from __future__ import annotations

import os
from typing import Any

from megatron_longpo.cli import run
from megatron_longpo.training.trainer import Trainer

_original = Trainer.train_step


def _step(self: Trainer) -> dict[str, Any]:
    if self.step == 1 and os.environ["RANK"] == "1":
        raise RuntimeError("the disk of rank 1 is on fire")
    return _original(self)


if __name__ == "__main__":
    Trainer.train_step = _step  # type: ignore[method-assign]
    run("train", prog="megatron_longpo.train")
