"""The best checkpoint of a run by a held-out metric, and the file OUTPUT/best.json that names it."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_longpo.checkpoint.folders import whole_steps
from megatron_longpo.checkpoint.remote import BEST
from megatron_longpo.errors import ConfigError
from megatron_longpo.runtime.checked_json import read_checked, write_checked
from megatron_longpo.training.metrics import names_reported, read_metrics
from megatron_longpo.training.objective import ObjectiveSpec

# Which way each metric of held-out data improves.
_DIRECTIONS = {
    **dict.fromkeys(
        ("loss", "nll", "preference", "logps/rejected", "rewards/rejected", "kl/chosen", "kl/rejected"), "min"
    ),
    **dict.fromkeys(("logps/chosen", "rewards/chosen", "rewards/margins", "rewards/accuracies"), "max"),
}


@dataclass(frozen=True)
class Rule:
    """What counts as best.

    Attributes:
        metric: name of the held-out metric.
        direction: ``min`` or ``max``.
    """

    metric: str
    direction: str

    def is_better(self, value: float, than: float) -> bool:
        """Whether a value is better than another; equal ones are not, so that the earliest of them stays."""
        return value < than if self.direction == "min" else value > than


@dataclass(frozen=True)
class Best:
    """The best checkpoint so far: its step, and the value of the metric there."""

    step: int
    value: float


def rule_of(text: str, objective: ObjectiveSpec) -> Rule:
    """Read save_best: ``nll``, or ``rewards/margins:max`` with a direction of one's own.

    Args:
        text: the setting.
        objective: what the loss consists of; without a preference term or a reference some metrics are not reported.

    Raises:
        ConfigError: no such metric, or no such direction.
    """
    metric, colon, direction = text.partition(":")
    names = names_reported(objective)
    if metric not in names:
        raise ConfigError(
            f"save_best={text}: {metric!r} is no metric of this run's held-out data; use one of {', '.join(names)}"
        )
    if colon and direction not in ("min", "max"):
        raise ConfigError(f"save_best={text}: {direction!r} is no direction; use {metric}:min or {metric}:max")
    return Rule(metric, direction or _DIRECTIONS[metric])


def read_best(output: Path, rule: Rule, until: int) -> Best | None:
    """The best checkpoint of a run that is there; None if there is none yet.

    The lines of validation.jsonl tell, and OUTPUT/best.json where they are gone. A kill may have come between a checkpoint and
    its best.json.

    Args:
        output: the run's folder.
        rule: what counts as best.
        until: step that the run resumes from; what was found later does not count.
    """
    found = [
        Best(r["step"], float(r[rule.metric])) for r in read_metrics(output / "validation.jsonl") if rule.metric in r
    ]
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        content = read_checked(output / BEST)
        if Rule(content["metric"], content["direction"]) == rule:
            found.append(Best(int(content["step"]), float(content["value"])))
    steps = {step for step in whole_steps(output) if step <= until}
    best: Best | None = None
    for candidate in sorted((b for b in found if b.step in steps), key=lambda b: b.step):
        if best is None or rule.is_better(candidate.value, best.value):
            best = candidate
    return best


def write_best(output: Path, rule: Rule, best: Best) -> None:
    """Write OUTPUT/best.json, once the checkpoint has its name."""
    write_checked(output / BEST, {"schema_version": 1, **asdict(rule), **asdict(best)})
