"""``megatron-longpo evolve``, ``evolve status`` and ``evolve report``, or ``tools/self_evolve.py``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from megatron_longpo.command_line import Switch, parse
from megatron_longpo.commands.convert import ExportOptions, ImportOptions
from megatron_longpo.commands.preprocess import PreprocessOptions
from megatron_longpo.errors import ConfigError
from megatron_longpo.evolution.plan import Planner
from megatron_longpo.evolution.settings import read_evolution
from megatron_longpo.runtime.signals import STOPPED

_FLAG_TYPES: dict[str, type] = {"preprocess": PreprocessOptions, "import": ImportOptions, "export": ExportOptions}
_Config = Annotated[str, tyro.conf.arg(metavar="FILE.yaml")]


@dataclass(frozen=True)
class EvolveOptions:
    """Flags of evolve."""

    config: _Config
    """The rounds, as YAML."""
    redo: Annotated[str | None, tyro.conf.arg(metavar="ROUND/STAGE")] = None
    """Move what this stage and those after it made aside, and stop; the next run makes it again."""
    stage: Annotated[str | None, tyro.conf.arg(metavar="ROUND/STAGE")] = None
    """Run only this stage, whose predecessors are done; what the jobs of executor=slurm do."""
    part: Switch = False
    """With --stage: do the part of this Slurm array task."""
    finish: Switch = False
    """With --stage: put the parts together."""
    check: Switch = False
    """Check the settings of all rounds, and stop."""


@dataclass(frozen=True)
class StatusOptions:
    """Flags of status."""

    config: _Config
    """The rounds, as YAML."""


@dataclass(frozen=True)
class ReportOptions:
    """Flags of report."""

    config: _Config
    """The rounds, as YAML."""
    output: Annotated[str | None, tyro.conf.arg(metavar="FILE.html")] = None
    """File of the report. Default: report.html in the folder of the rounds."""


def evolve(arguments: Sequence[str], *, prog: str) -> None:
    """Evolve a model through rounds: pairs by the model itself, training, export, evaluation, and a gate that decides about the
    next round. Each stage is one of the other commands. Rerun the same command to resume. Exit status 75: training was broken
    off, and goes on when the command is run again."""
    options = parse(EvolveOptions, arguments, prog=prog, description=" ".join((evolve.__doc__ or "").split()))
    if options.stage is None and (options.part or options.finish):
        raise ConfigError("--part and --finish belong to one stage; name it with --stage ROUND/STAGE")
    planner = _planner(options.config)
    # Not before the configuration is read: what they import takes a second.
    from megatron_longpo.evolution import run, slurm
    from megatron_longpo.evolution.gate import read_gate
    from megatron_longpo.runtime.log import log

    if options.check:
        planner.check()
        log(f"{options.config}: {len(planner.evolution.rounds)} rounds, all settings are accepted")
    elif options.redo is not None:
        run.redo(planner, options.redo)
    elif options.stage is None and planner.evolution.evolve.executor == "slurm":
        slurm.submit(planner)
    elif options.part and options.stage is not None:
        run.run_part(planner, options.stage)
    elif options.finish and options.stage is not None:
        run.finish_parts(planner, options.stage)
    else:
        try:
            run.run_rounds(planner) if options.stage is None else run.run_stage(planner, options.stage)
        except run.Interrupted as error:
            log(f"error: {error}")
            sys.exit(STOPPED)
        round_name, _, name = (options.stage or "").partition("/")
        if name == "gate" and read_gate(planner.folder(round_name).gate) == "stop":
            # The jobs of later rounds depend on this one's success.
            sys.exit(slurm.STOPPED)


def status(arguments: Sequence[str], *, prog: str) -> None:
    """Show where an evolution is: stages, time spent, time left."""
    options = parse(StatusOptions, arguments, prog=prog, description=status.__doc__ or "")
    planner = _planner(options.config)
    from megatron_longpo.evolution.status import print_status, read_status

    print_status(read_status(planner), planner.evolution.evolve.dollars_per_process_hour)


def report(arguments: Sequence[str], *, prog: str) -> None:
    """Write one page about all rounds: data, curves, evaluations before and after, cost."""
    options = parse(ReportOptions, arguments, prog=prog, description=report.__doc__ or "")
    planner = _planner(options.config)
    from pathlib import Path

    from megatron_longpo.evolution.report import write_report
    from megatron_longpo.runtime.log import log

    path = Path(options.output) if options.output else planner.evolution.output / "report.html"
    write_report(planner, path)
    log(str(path))


def _planner(config: str) -> Planner:
    return Planner(read_evolution(config), _FLAG_TYPES, _parse_flags)


def _parse_flags(command: str, arguments: Sequence[str]) -> object:
    return parse(_FLAG_TYPES[command], arguments, prog=command, description="")
