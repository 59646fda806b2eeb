"""Failures of long runs: how often to save, and how much time they cost."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Saving:
    """When to save, and what saving and failures cost.

    Attributes:
        interval: seconds of training between two checkpoints; infinity if nothing fails.
        save: seconds that training waits for a checkpoint.
        mean_time: seconds between failures of the whole run.
        lost_share: expected time beside the training itself, as a share of it.
    """

    interval: float
    save: float
    mean_time: float
    lost_share: float


def best_saving(
    *, save: float, gpu_hours_between_failures: float, gpus: int, restart: float, shortest: float = 0.0
) -> Saving:
    """The interval between checkpoints that loses the least time.

    Young's first-order optimum is sqrt(2 C M), with C the time of a checkpoint and M the mean time between failures (J. W. Young,
    "A first order approximation to the optimum checkpoint interval", CACM 17, 1974). Daly's higher-order estimate (J. T. Daly, "A
    higher order estimate of the optimum checkpoint interval for restart dumps", FGCS 22, 2006, eq. 37) is

        sqrt(2 C M) (1 + 1/3 sqrt(C / 2M) + 1/9 C / 2M) - C  for C < 2M, else M.

    What is lost is the expected total time of his eq. 20 over the time without failures and checkpoints.

    Args:
        save: seconds of a checkpoint.
        gpu_hours_between_failures: GPU hours between two interruptions.
        gpus: number of GPUs.
        restart: seconds from an interruption to the next step, what is computed again not included.
        shortest: seconds of the shortest interval that there can be: a step.
    """
    mean = gpu_hours_between_failures * 3600 / gpus
    if math.isinf(mean):
        return Saving(math.inf, save, mean, 0.0)
    if save < 2 * mean:
        half = save / (2 * mean)
        interval = math.sqrt(2 * save * mean) * (1 + math.sqrt(half) / 3 + half / 9) - save
    else:
        interval = mean
    interval = max(interval, shortest)
    # Failures come at any moment, while restarting as well: M e^(R/M) (e^((t + C)/M) - 1) for each t seconds of work.
    exponent = (interval + save) / mean
    expected = (
        mean * math.exp(restart / mean) * math.expm1(exponent) if exponent < 500 and restart / mean < 200 else math.inf
    )
    return Saving(interval, save, mean, expected / interval - 1)
