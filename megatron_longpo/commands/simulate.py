"""``megatron-longpo simulate``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from megatron_longpo.command_line import ConfigOptions, parse_with_config
from megatron_longpo.config import Config
from megatron_longpo.errors import ConfigError, PlatformError
from megatron_longpo.runtime.log import log
from megatron_longpo.schema import Count, PositiveFloat, check_ranges
from megatron_longpo.simulation.request import Card, Request
from megatron_longpo.simulation.show import draw, print_report
from megatron_longpo.simulation.start import simulate as run


@dataclass(frozen=True)
class SimulateOptions(ConfigOptions):
    """What is simulated besides the configuration of the run."""

    world_size: Count = 1
    """Number of GPUs of the run."""
    rank: int = 0
    """The rank that is simulated."""
    model: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Model whose shape is taken: a folder with model.json or Hugging Face's config.json, or such a file. Weights are not needed.
    Default: --load."""
    tokens: Count | None = None
    """Tokens of the longest row of a made-up sample. Default: the longest sample of --data-path."""
    answer_tokens: Count = 512
    """Tokens of the chosen answer of a made-up sample; the rejected one has three quarters as many."""
    num_turns: Count = 1
    """Turns of a made-up sample."""
    num_micro_batches: Count | None = None
    """Micro batches of the step. Default: one, or as many as fill a pipeline."""
    gpu_memory: PositiveFloat = 80.0
    """Memory of the GPU, in GiB."""
    compute_capability: PositiveFloat = 9.0
    """CUDA compute capability of the GPU."""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """File for everything that was found."""
    plot: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Picture of the live bytes over the step: .png, .svg or .pdf."""


def simulate(arguments: Sequence[str], *, prog: str) -> None:
    """Simulate the training step of one rank on a GPU that is not there: memory, operations, exchanges, host waits."""
    options, config = parse_with_config(
        Config, arguments, prog=prog, description=simulate.__doc__ or "", options=SimulateOptions
    )
    if options.print_config:
        print(config.as_yaml(), end="")
        return
    check_ranges(options)
    if options.plot is not None and Path(options.plot).suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"plot={options.plot} has no suffix that is known; use .png, .svg or .pdf")
    request = Request(
        config=config.as_dict(),
        world_size=options.world_size,
        rank=options.rank,
        model=options.model,
        tokens=options.tokens,
        answer_tokens=options.answer_tokens,
        turns=options.num_turns,
        micro_batches=options.num_micro_batches,
    )
    major, minor = divmod(round(options.compute_capability * 10), 10)
    card = Card(memory_bytes=int(options.gpu_memory * 2**30), capability=(major, minor))
    try:
        (report,) = run([request], card)
    except PlatformError as error:
        log(f"no simulation but an estimate, since {error}")
        from megatron_longpo.simulation.fallback import estimate

        log(str(estimate(request, card)))
        return
    print_report(report, Console())
    if options.json is not None:
        Path(options.json).write_text(report.as_json() + "\n", encoding="utf-8")
    if options.plot is not None:
        draw(report, Path(options.plot))
