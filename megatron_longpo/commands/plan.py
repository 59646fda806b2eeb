"""``megatron-longpo plan``."""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from megatron_longpo.command_line import ConfigOptions, Switch, given_flags, parse_with_config
from megatron_longpo.config import Config, check
from megatron_longpo.errors import ConfigError, PlatformError
from megatron_longpo.planner.costs import Inference, RunCost, cost_of, pairs_of
from megatron_longpo.planner.explain import Remedy, remedies
from megatron_longpo.planner.machine import Machine, load_machine
from megatron_longpo.planner.picture import draw
from megatron_longpo.planner.report import Result, lines_of, train_yaml
from megatron_longpo.planner.search import Plan, Search
from megatron_longpo.planner.space import CHOSEN
from megatron_longpo.planner.verify import Verified, verify
from megatron_longpo.planner.workload import Workload, from_data, made_up
from megatron_longpo.runtime.files import write_atomically
from megatron_longpo.runtime.log import log
from megatron_longpo.schema import Count, PositiveFiniteFloat, check_ranges
from megatron_longpo.simulation.data import read_shape

# Plans that --simulate verifies.
_VERIFIED = 3
# Tokens of an evaluation's answers.
_EVALUATION_ANSWER = 128


@dataclass(frozen=True)
class PlanOptions(ConfigOptions):
    """What is planned besides the configuration of the run."""

    hf: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Model whose shape is taken: a folder with Hugging Face's config.json or with model.json, or such a file. Weights are not
    needed. Default: --load."""
    gpus: Count = 8
    """Number of GPUs."""
    gpu: str = "a100-80g"
    """Kind of GPU: the name of a machine that comes with the package, or the path of a YAML file that `plan calibrate` wrote."""
    gpus_per_node: Count | None = None
    """GPUs that share the links inside a node. Default: the machine's."""
    length: Count | None = None
    """Tokens of the longest row. Default: the samples of --data-path, or else --seq-length."""
    answer_tokens: Count = 512
    """Tokens of the chosen answer of a made-up row; the rejected one has three quarters as many."""
    num_turns: Count = 1
    """Turns of a made-up row."""
    short_tokens: Count = 16384
    """Tokens of the chunk that a short row is about."""
    samples: Count | None = None
    """Samples of the data, for the hours of the run. Default: those of --data-path."""
    top: Count = 10
    """Number of plans that are shown."""
    simulate: Switch = False
    """Verify the best three plans by the real training step on simulated GPUs."""
    dollars_per_gpu_hour: PositiveFiniteFloat | None = None
    """Price of a GPU, for the price of the run."""
    with_generation: Switch = False
    """Add the time of generating the samples' pairs."""
    with_evaluation: Switch = False
    """Add the time of answering evaluation_prompts of the longest row's length after training."""
    evaluation_prompts: Count = 1300
    """Prompts of an evaluation: 100 of each of RULER's 13 tasks."""
    output: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder for train.yaml (the best plan, as train takes it), plan.json and plan_light.svg and plan_dark.svg."""


def plan(arguments: Sequence[str], *, prog: str) -> None:
    """Plan a run: which layouts fit, how fast each is and why, and what the run takes. Flags of training that are given stay as
    they are; the planner chooses the other settings of the layout."""
    began = time.monotonic()
    options, config = parse_with_config(
        Config, arguments, prog=prog, description=plan.__doc__ or "", options=PlanOptions
    )
    if options.print_config:
        print(config.as_yaml(), end="")
        return
    check_ranges(options)
    machine = _machine(options)
    given = given_flags(Config, arguments)
    if (
        options.config is None
        and "bf16" not in given
        and "bfloat16" in machine.peak_tflops
        and machine.device == "cuda"
    ):
        config = dataclasses.replace(config, training=dataclasses.replace(config.training, bf16=True))
    if options.length is not None and config.data.seq_length is None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_length=options.length))
    check(config)
    search = Search(
        config=config,
        shape=read_shape(options.hf, config, flag="hf"),
        machine=machine,
        world_size=options.gpus,
        workload=_workload(options, config),
        given=given.intersection(CHOSEN),
    )
    plans = search.best(options.top)
    result = Result(
        search,
        plans,
        own=_own(search) if options.config is not None else None,
        closest=None if plans else search.closest(),
        remedies=[] if plans else [*remedies(search), *_shorter(search, options)],
        cost=_cost(plans[0], search, options) if plans else None,
        seconds=time.monotonic() - began,
    )
    if options.simulate and plans:
        result = dataclasses.replace(result, verified=_verified(plans[:_VERIFIED], search, options))
    for line in lines_of(result):
        log(line)
    if options.output is not None:
        _write(result, Path(options.output), f"{prog} {shlex.join(arguments)}")
    if not plans:
        longest = search.workload.longest.longest + 1
        longest = search.workload.longest.longest + 1
        raise ConfigError(
            f"nothing fits {options.gpus} x {machine.name} with rows of {longest:,} tokens; see above for what would"
        )


def _machine(options: PlanOptions) -> Machine:
    machine = load_machine(options.gpu)
    if options.gpus_per_node is not None:
        machine = dataclasses.replace(machine, gpus_per_node=options.gpus_per_node)
    return machine


def _length(options: PlanOptions, config: Config) -> int | None:
    """Tokens of made-up rows; None: rows are those of the data."""
    if options.length is None and config.data.data_path is None:
        return config.data.seq_length
    return options.length


def _workload(options: PlanOptions, config: Config) -> Workload:
    shape = read_shape(options.hf, config, flag="hf")
    length = _length(options, config)
    if length is None:
        return from_data(config, shape, samples=options.samples)
    return made_up(
        config,
        shape,
        length=length,
        answer=options.answer_tokens,
        turns=options.num_turns,
        short=options.short_tokens,
        samples=options.samples,
    )


def _own(search: Search) -> Plan | None:
    """The layout of the YAML file, if the trainer takes it for this world."""
    try:
        return search.as_configured()
    except ConfigError as error:
        log(f"the configured layout is none for {search.world_size} GPUs: {error}")
        return None


def _shorter(search: Search, options: PlanOptions) -> list[Remedy]:
    """Half the length, a quarter, ... until something fits."""
    length = _length(options, search.config)
    found: list[Remedy] = []
    while length is not None and length >= 2048 and not found:
        length //= 2
        try:
            shorter = dataclasses.replace(
                search, workload=_workload(dataclasses.replace(options, length=length), search.config)
            )
        except ConfigError:
            break
        found = [Remedy(f"rows of {length:,} tokens", plan) for plan in shorter.best(1)]
    return found


def _cost(plan: Plan, search: Search, options: PlanOptions) -> RunCost | None:
    samples = search.workload.samples
    if samples is None and search.config.training.train_iters is None:
        return None
    samples = samples or search.config.training.train_iters * search.config.training.global_batch_size  # type: ignore[operator]
    rows = search.workload.mean
    pairs = pairs_of(
        samples,
        length=rows.chosen,
        short=options.short_tokens,
        answer=options.answer_tokens,
        turns=options.num_turns,
    )
    answered = (Inference(options.evaluation_prompts, search.workload.longest.chosen, _EVALUATION_ANSWER),)
    return cost_of(
        plan,
        search,
        samples=samples,
        generation=pairs if options.with_generation else (),
        evaluation=answered if options.with_evaluation else (),
        dollars_per_gpu_hour=options.dollars_per_gpu_hour,
    )


def _verified(plans: list[Plan], search: Search, options: PlanOptions) -> list[Verified]:
    try:
        return verify(
            plans,
            search,
            length=_length(options, search.config),
            answer=options.answer_tokens,
            turns=options.num_turns,
        )
    except PlatformError as error:
        log(f"not simulated, since {error}")
        return []


def _write(result: Result, folder: Path, command: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # What an earlier plan left does not stand beside this one.
    for name in ("train.yaml", "plan_light.svg", "plan_dark.svg"):
        (folder / name).unlink(missing_ok=True)
    write_atomically(folder / "plan.json", (result.as_json() + "\n").encode())
    if not result.plans:
        return
    write_atomically(folder / "train.yaml", train_yaml(result, command).encode())
    for theme in ("light", "dark"):
        draw(result, folder / f"plan_{theme}.svg", theme)
    log(f"{folder}: train.yaml, plan.json, plan_light.svg, plan_dark.svg")
