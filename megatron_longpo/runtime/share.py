"""Which part of a tool's work this process does.

Processes either come from one launch and can wait for each other, or are separate commands that write to one folder.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from megatron_longpo.errors import ConfigError

Launcher = Literal["alone", "--rank", "torchrun", "a Slurm array"]


@dataclass(frozen=True)
class Share:
    """Part ``rank`` of ``world_size`` parts of the work.

    Attributes:
        rank: index of this part.
        world_size: number of parts.
        launcher: what assigned the part to this process.
    """

    rank: int = 0
    world_size: int = 1
    launcher: Launcher = "alone"

    @property
    def together(self) -> bool:
        """Whether the processes belong to one launch, which ends all of them if one fails: they can wait for each other."""
        return self.launcher == "torchrun"


def share_of_process(rank: int | None, world_size: int | None, *, slurm_array: bool = False) -> Share:
    """The share of this process.

    Args:
        rank, world_size: the user's choice, which comes first, or None.
        slurm_array: whether the tasks of a Slurm array divide the work of one command. Off for tools whose users run one
            command per model in the tasks of an array.

    Raises:
        ConfigError: the tasks of the Slurm array are not consecutive.
    """
    environment = os.environ
    if rank is not None and world_size is not None:
        return Share(rank, world_size, "--rank")
    if "TORCHELASTIC_RUN_ID" in environment:
        return Share(int(environment["RANK"]), int(environment["WORLD_SIZE"]), "torchrun")
    if slurm_array and "SLURM_ARRAY_TASK_ID" in environment:
        task = int(environment["SLURM_ARRAY_TASK_ID"])
        first, count = (int(environment[f"SLURM_ARRAY_TASK_{name}"]) for name in ("MIN", "COUNT"))
        part = (task - first) // int(environment.get("SLURM_ARRAY_TASK_STEP", "1"))
        if part >= count:
            raise ConfigError(
                f"Slurm array task {task} is not one of {count} consecutive tasks from {first}; use an array such as 0-15, and "
                "--rank with --world-size to run single parts again"
            )
        return Share(part, count, "a Slurm array")
    return Share()
