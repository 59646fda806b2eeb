"""``megatron-longpo doctor``, or ``python -m megatron_longpo.doctor``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from megatron_longpo.command_line import ConfigOptions, parse_with_config
from megatron_longpo.config import Config
from megatron_longpo.schema import Count, PositiveFloat, check_ranges


@dataclass(frozen=True)
class DoctorOptions(ConfigOptions):
    """What is examined besides the configuration of the run that the machine is for."""

    hf: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Model whose memory and checkpoints the machine must hold: a folder with Hugging Face's config.json or model.json, or such a
    file. Weights are not needed. Default: --load."""
    tokens: Count | None = None
    """Tokens of its longest row. Default: the longest sample of --data-path, else the context that the model claims."""
    folder: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder of the disk that checkpoints will be saved to, seen by all nodes; left as it was. Default: the nearest folder above
    --save, else one for temporary files."""
    json: Annotated[str, tyro.conf.arg(metavar="FILE")] = "doctor.json"
    """File for everything that was found."""
    time_limit: PositiveFloat = 150.0
    """Seconds after which no further layout is begun."""
    check_time_limit: PositiveFloat = 60.0
    """Seconds after which a check counts as hanging."""


def doctor(arguments: Sequence[str], *, prog: str) -> None:
    """Examine a machine: does it compute right and fast? Kernels, collectives, a step in every layout, checkpoints, memory, disk.

    Exits with 0 if all is well, 3 if something is slow, 4 if something is wrong.
    """
    first = os.environ.get("RANK", "0") == "0"
    options, config = parse_with_config(
        Config, arguments, prog=prog, description=doctor.__doc__ or "", options=DoctorOptions, quiet=not first
    )
    if options.print_config:
        if first:
            print(config.as_yaml(), end="")
        return
    check_ranges(options)
    # Not before the configuration is read: they import torch and megatron-core.
    from megatron_longpo.doctor.resources import Wanted
    from megatron_longpo.doctor.run import Order, examine
    from megatron_longpo.training.preflight import existing

    save = config.checkpoint.save
    folder = Path(options.folder) if options.folder else existing(Path(save)) if save else None
    status = examine(
        Order(
            wanted=Wanted(config, options.hf, options.tokens),
            folder=folder,
            output=Path(options.json),
            seconds=options.time_limit,
            check_seconds=options.check_time_limit,
        )
    )
    sys.stdout.flush()
    if status:
        sys.exit(status)
