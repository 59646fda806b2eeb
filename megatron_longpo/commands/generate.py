"""``megatron-longpo generate`` and ``generate merge``, or ``tools/generate_preference_data.py``."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from megatron_longpo.command_line import ConfigOptions, Switch, parse, parse_with_config
from megatron_longpo.errors import DataError
from megatron_longpo.generation.settings import GenerationConfig, check
from megatron_longpo.runtime.log import log


@dataclass(frozen=True)
class GenerateOptions(ConfigOptions):
    """The command's own flags."""

    restart: Switch = False
    """Discard what an earlier run has made, and start over."""


@dataclass(frozen=True)
class MergeOptions:
    """Flags of merge."""

    output: Annotated[str, tyro.conf.arg(metavar="FILE.jsonl")]
    """The output that the parts were generated with."""


def generate(arguments: Sequence[str], *, prog: str) -> None:
    """Generate preference pairs from documents with a model's own answers. Launched with torchrun, each process makes a part
    and the first merges them; in a Slurm array each task makes a part, and `merge` merges them. Rerun the same command to
    resume."""
    options, config = parse_with_config(
        GenerationConfig,
        arguments,
        prog=prog,
        description=" ".join((generate.__doc__ or "").split()),
        options=GenerateOptions,
    )
    if options.print_config:
        print(config.as_yaml(), end="")
        return
    check(config)
    # Not before the configuration is checked: it imports torch.
    from megatron_longpo.engines.make import with_folders
    from megatron_longpo.generation.run import generate as run
    from megatron_longpo.model.shape import allow_model_sizes
    from megatron_longpo.runtime import platform
    from megatron_longpo.runtime.share import share_of_process

    allow_model_sizes(config.engine.model_size_factor)
    config = dataclasses.replace(config, engine=with_folders(config.engine))
    share = share_of_process(config.run.rank, config.run.world_size, slurm_array=True)
    platform.CURRENT.use_local_rank(int(os.environ.get("LOCAL_RANK", "0")))
    report = run(config, share, restart=options.restart)
    if report is not None:
        _print_summary(config.run.output, report)
    elif not share.together:
        log(
            f"part {share.rank} of {share.world_size} is done; after the last one: {prog} merge --output {config.run.output}"
        )


def merge(arguments: Sequence[str], *, prog: str) -> None:
    """Merge the parts of a generation into one file, with filters, skipped rows and a report."""
    options = parse(MergeOptions, arguments, prog=prog, description=merge.__doc__ or "")
    from megatron_longpo.generation.merging import merge as merge_parts

    _print_summary(options.output, merge_parts(Path(options.output)))


def _print_summary(output: str | None, report: dict[str, Any]) -> None:
    """Print what was made.

    Raises:
        DataError: nothing was.
    """
    counts, reasons = report["counts"], report["reasons"]
    log(
        f"{output}: {counts.get('samples', 0)} samples with {counts.get('turns kept', 0)} turns of "
        f"{counts.get('documents read', 0)} documents; skipped: "
        + (", ".join(f"{n} {reason}" for reason, n in reasons.items()) or "nothing")
        + f"; {output}.report/report.html"
    )
    if not counts.get("samples"):
        raise DataError(
            f"{output}: no sample was made; see {output}.rejects.jsonl, and change the documents, the filters or the model"
        )
