"""``megatron-longpo replay``: compute a step of a run again."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from megatron_longpo.command_line import parse
from megatron_longpo.config import Config, check, from_yaml
from megatron_longpo.schema import Count

_RUN_CONFIG = "run.yaml"


@dataclass(frozen=True)
class ReplayOptions:
    """Flags of replay."""

    run: Annotated[str, tyro.conf.Positional]
    """Output folder of the run (--save). Nothing in it is changed."""
    step: Annotated[Count, tyro.conf.Positional]
    """Step to compute again, counted from 1 as in metrics.jsonl and in OUTPUT/skipped."""


def replay(arguments: Sequence[str], *, prog: str) -> None:
    """Compute a step of a run again, from its newest checkpoint before that step: the values of its samples, and the first place
    where a value is not finite. Start it with as many processes as the run."""
    first = os.environ.get("RANK", "0") == "0"
    options = parse(ReplayOptions, arguments, prog=prog, description=replay.__doc__ or "", quiet=not first)
    run = Path(options.run)
    config: Config = from_yaml(run / _RUN_CONFIG)
    config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, save=str(run)))
    check(config)
    # Not before the configuration is read: it imports torch and megatron-core.
    from megatron_longpo.model.shape import allow_model_sizes
    from megatron_longpo.runtime import process_groups
    from megatron_longpo.runtime.log import log
    from megatron_longpo.training.replay import lines_of
    from megatron_longpo.training.replay import replay as compute

    allow_model_sizes(config.model.model_size_factor)
    process_groups.start_processes(config.parallel.distributed_timeout_minutes)
    for line in lines_of(compute(config, options.step)):
        log(line, active=first)
    process_groups.stop_processes()
