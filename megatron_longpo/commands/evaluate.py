"""``megatron-longpo evaluate`` and ``evaluate compare``, or ``tools/evaluate.py``."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from megatron_longpo.command_line import ConfigOptions, Switch, parse, parse_with_config
from megatron_longpo.evaluation.settings import EvaluationConfig, check
from megatron_longpo.runtime.log import log

_COMPARISON = "comparison"


@dataclass(frozen=True)
class EvaluateOptions(ConfigOptions):
    """The command's own flags."""

    restart: Switch = False
    """Discard the answers of earlier runs, and start over."""
    compare: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="DIR DIR ...")] = None
    """Compare these evaluations, with --output and --seed, instead of evaluating: the same as `evaluate compare`."""


@dataclass(frozen=True)
class CompareOptions:
    """Flags of compare."""

    folders: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DIR DIR ...")]
    """Output folders of evaluations; the others are compared with the first."""
    output: Annotated[str, tyro.conf.arg(metavar="DIR")] = _COMPARISON
    """Folder for the table and the picture."""
    seed: int = 1234
    """Seed of the bootstrap."""


def evaluate(arguments: Sequence[str], *, prog: str) -> None:
    """Evaluate a Hugging Face model, or a server with OpenAI's interface. Launched with torchrun, the processes share the
    samples. Rerun the same command to resume. `evaluate compare` compares finished evaluations."""
    first = os.environ.get("RANK", "0") == "0"
    options, config = parse_with_config(
        EvaluationConfig,
        arguments,
        prog=prog,
        description=" ".join((evaluate.__doc__ or "").split()),
        options=EvaluateOptions,
        quiet=not first,
    )
    if options.print_config:
        if first:
            print(config.as_yaml(), end="")
        return
    if options.compare is not None:
        _compare(options.compare, config.evaluate.output or _COMPARISON, config.evaluate.seed)
        return
    check(config)
    # Not before the configuration is checked: it imports torch.
    from megatron_longpo.engines.make import with_folders
    from megatron_longpo.evaluation.evaluate import evaluate as run
    from megatron_longpo.model.shape import allow_model_sizes

    allow_model_sizes(config.engine.model_size_factor)
    config = dataclasses.replace(config, engine=with_folders(config.engine))
    run(config, restart=options.restart)


def compare(arguments: Sequence[str], *, prog: str) -> None:
    """Compare evaluations: differences with confidence intervals, as table, JSON and picture."""
    options = parse(CompareOptions, arguments, prog=prog, description=compare.__doc__ or "")
    _compare(options.folders, options.output, options.seed)


def _compare(folders: Sequence[str], output: str, seed: int) -> None:
    from megatron_longpo.evaluation.compare import write_comparison

    write_comparison([Path(folder) for folder in folders], Path(output), seed)
    log(f"{output}: comparison.md, comparison.json, comparison.png")
