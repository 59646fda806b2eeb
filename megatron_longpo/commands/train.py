"""``megatron-longpo train``, or ``python -m megatron_longpo.train``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from megatron_longpo.command_line import ConfigOptions, given_flags, parse_with_config
from megatron_longpo.config import Config
from megatron_longpo.runtime.failure import advise_on_memory
from megatron_longpo.runtime.log import use_json
from megatron_longpo.runtime.signals import STOPPED


def _next_layout(config: Config, world_size: int) -> str:
    from megatron_longpo.planner.layout import next_layout

    return next_layout(config, world_size)


def train(arguments: Sequence[str], *, prog: str) -> None:
    """Train, or print the configuration."""
    first = os.environ.get("RANK", "0") == "0"
    options, config = parse_with_config(
        Config,
        arguments,
        prog=prog,
        description="Train a model: LongPO, DPO or SFT.",
        options=ConfigOptions,
        quiet=not first,
    )
    if options.print_config:
        if first:
            print(config.as_yaml(), end="")
        return
    if config.logging.log_format == "json":
        use_json()
    # Not before the configuration is read: it imports torch and megatron-core.
    from megatron_longpo.model.shape import allow_model_sizes
    from megatron_longpo.training.trainer import run

    allow_model_sizes(config.model.model_size_factor)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if config.parallel.auto_layout:
        from megatron_longpo.planner.layout import auto_layout, given_in

        given = given_flags(Config, arguments)
        if options.config is not None:
            given |= given_in(options.config)
        config = auto_layout(config, world_size, given)
    advise_on_memory(lambda: _next_layout(config, world_size))
    if config.checkpoint.save_hf_interval is None:
        stop = run(config)
    else:
        from megatron_longpo.conversion.export_hf import export_hf

        stop = run(config, export=export_hf)
    if stop is not None and stop.is_urgent:
        sys.exit(STOPPED)
