"""Steps whose numbers cannot be trusted are skipped: no update, a count, a file that names the batch, and an end to it.

Which step is skipped is decided from the mean loss and the gradient norm. Both are reduced over all ranks, so that all ranks
have the same numbers and decide alike, without asking each other.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_longpo.config import FaultsConfig
from megatron_longpo.runtime.files import write_atomically

FOLDER = "skipped"
# Of a normal distribution the standard deviation is this many times the median absolute deviation.
_DEVIATIONS_PER_MAD = 1.4826
# Fewer losses do not say how far they usually spread.
_FEWEST_LOSSES = 20
# Losses that hardly differ, as on data with few samples, would make a spike of every other loss.
_LEAST_SPREAD = 0.01


@dataclass
class StepGuard:
    """Decides which steps are skipped.

    Attributes:
        config: max_skipped_steps and the rule for spikes.
        losses: losses of the last steps that were not skipped, oldest first.
        skipped: steps that were skipped, counted from 1.
        streak: how many of them came one after the other just now.
    """

    config: FaultsConfig
    losses: list[float] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    streak: int = 0

    def fault_of_loss(self, loss: float) -> str | None:
        """What is wrong with the loss of a step, or None."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        bound = self._highest()
        if bound is None or loss <= bound:
            return None
        return f"the loss of {loss:.4f} is a spike (above {bound:.4f})"

    def fault_of_gradient(self, norm: float) -> str | None:
        """What is wrong with the gradient of a step, or None."""
        return None if math.isfinite(norm) else f"the gradient norm is {norm}"

    def _highest(self) -> float | None:
        """The highest loss that is no spike: median plus so many deviations of the last losses. None: any."""
        if not self.config.check_for_spiky_loss or len(self.losses) < _FEWEST_LOSSES:
            return None
        median = statistics.median(self.losses)
        spread = _DEVIATIONS_PER_MAD * statistics.median(abs(loss - median) for loss in self.losses)
        return median + self.config.spiky_loss_deviations * max(spread, _LEAST_SPREAD * abs(median))

    def take(self, loss: float) -> None:
        """Count a step that was not skipped."""
        self.losses = [*self.losses, loss][-self.config.spiky_loss_window :]
        self.streak = 0

    def skip(self, step: int) -> None:
        """Count a step that was skipped, from 1."""
        self.skipped.append(step)
        self.streak += 1

    @property
    def is_too_many(self) -> bool:
        """Whether more steps were skipped than may be."""
        return len(self.skipped) > self.config.max_skipped_steps

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it: a resumed run decides as an undisturbed one."""
        return {"losses": list(self.losses), "skipped": list(self.skipped), "streak": self.streak}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint; one of an earlier commit has nothing."""
        self.losses = [float(loss) for loss in state.get("losses", [])]
        self.skipped = [int(step) for step in state.get("skipped", [])]
        self.streak = int(state.get("streak", 0))


def path_of(output: Path, step: int) -> Path:
    """File about a skipped step."""
    return output / FOLDER / f"step_{step:07d}.json"


def write_skipped(
    output: Path, step: int, reason: str, *, metrics: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]
) -> Path:
    """Write down what there is to know of a skipped step.

    Args:
        output: the run's folder.
        step: the step, counted from 1.
        reason: why it was skipped.
        metrics: means over the batch.
        samples: where each sample is and its own metrics, in the order of the batch.
    """
    path = path_of(output, step)
    path.parent.mkdir(exist_ok=True)
    content = {"step": step, "reason": reason, "metrics": named(metrics), "samples": [named(s) for s in samples]}
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
    return path


def named(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as JSON knows them: NaN and infinities become the texts ``nan``, ``inf`` and ``-inf``."""
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
