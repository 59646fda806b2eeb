"""Configuration of self-evolution: what all rounds share, and what each round changes.

    evolve: {model: ./chat-model, output: ./evolved}
    resources:                      # per stage, where they differ from those of ``evolve``
      train: {nodes: 2, nproc_per_node: 8, sbatch: [--gpus-per-node=8, --time=24:00:00]}
    methods:                        # trained on the same pairs; the first one's model goes on to the next round
      longpo: {}
      sft: {objective: {objective: sft}}
    defaults:                       # of every round
      train: {optimizer: {lr: 5.0e-7}}
    rounds:
    - name: 128K
      generate: {documents: {documents: [./books], seq_length: 131072}}
      methods: {sft: {optimizer: {lr: 1.0e-6}}}      # what this round changes of a method
      gate: [{suite: ruler, name: average, length: all, figure: low, at_least: 0.0}]

``generate``, ``train`` and ``evaluate`` hold what a YAML file of that command holds; ``preprocess``, ``import`` and ``export``
hold flags by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from megatron_longpo.config import read_yaml
from megatron_longpo.errors import ConfigError
from megatron_longpo.schema import Count, FiniteFloat, Range, check_ranges, convert_fields, kind_of, nearest

# Sections of a round that hold the settings of a command.
COMMANDS = ("generate", "preprocess", "import", "train", "export", "evaluate")
STAGES = (
    "generate",
    "split",
    "preprocess",
    "preprocess-held-out",
    "import",
    "evaluate-before",
    "reference",
    "train",
    "export",
    "evaluate",
    "compare",
    "gate",
)
# Whose resources a stage has unless it has its own.
_LIKE = {"reference": "train", "evaluate-before": "evaluate", "preprocess-held-out": "preprocess"}
# Stages of one process.
_ALONE = ("split", "preprocess", "preprocess-held-out", "compare", "gate")
_TOP = ("evolve", "resources", "methods", "defaults", "rounds")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class EvolveConfig:
    """What all rounds share."""

    model: str | None = None
    """Hugging Face folder of the model that the first round begins with."""
    output: str | None = None
    """Folder of all rounds. Rerun the same command to resume."""
    executor: Literal["local", "slurm"] = "local"
    """local: run the stages here, one after the other; slurm: submit them as jobs that depend on each other."""
    nproc_per_node: Count = 1
    """Processes per node of the stages that take several: generate, import, reference, train, export, evaluate."""
    held_out_fraction: Annotated[float, Range(ge=0, lt=1, fix="0.05 holds out one sample in twenty")] = 0.05
    """Fraction of the samples that are not trained on but evaluated, drawn by the seed. 0: none."""
    seed: int = 1234
    """Seed of the draw of held-out samples, and of the comparison's bootstrap."""
    dollars_per_process_hour: Annotated[float, Range(ge=0, lt=math.inf)] = 0.0
    """Price of a process (a GPU) per hour, for the report. 0: costs are given in process hours only."""


@dataclass(frozen=True)
class Resources:
    """What a stage runs on."""

    nodes: Count = 1
    """Nodes, with executor=slurm."""
    nproc_per_node: Count | None = None
    """Processes per node. Default: that of evolve; one for split, preprocess, compare and gate."""
    array: Count = 1
    """Tasks of a Slurm array that divide the stage among them (generate, evaluate), with executor=slurm."""
    sbatch: tuple[str, ...] = ()
    """Further options of sbatch."""


@dataclass(frozen=True)
class GateRule:
    """A line of the comparison, and what it must be for the next round to begin with the new model."""

    suite: str = ""
    """Suite of the line: ruler, needle, short, ..."""
    name: str = "average"
    """Name of the line in comparison.json: a task, or average."""
    length: str = "all"
    """Length of the line, in tokens, or all: the mean over lengths, or the only one."""
    figure: Literal["change", "low", "high", "other_mean"] = "change"
    """change: new model minus old; low, high: its 95 % interval; other_mean: the new model's own mean."""
    at_least: FiniteFloat | None = None
    """Smallest value that passes."""
    at_most: FiniteFloat | None = None
    """Largest value that passes."""
    otherwise: Literal["stop", "back"] = "stop"
    """stop: no further round; back: the next round begins with the model that this one began with."""


@dataclass(frozen=True)
class Round:
    """One round.

    Attributes:
        name: name of the round, and of its folder.
        settings: command -> its settings, those of ``defaults`` included.
        gate: what decides about the next round.
        methods: name -> changes of the training's settings, those of all rounds included, in the order of ``Evolution.methods``.
    """

    name: str
    settings: Mapping[str, dict[str, Any]]
    gate: tuple[GateRule, ...]
    methods: Mapping[str, dict[str, Any]]


@dataclass(frozen=True)
class Evolution:
    """A whole configuration.

    Attributes:
        source: the file that it was read from.
        evolve: what all rounds share.
        resources: stage -> resources, where they are given.
        methods: name -> changes of the training's settings in all rounds. The first one's model goes on.
        rounds: the rounds in order.
    """

    source: Path
    evolve: EvolveConfig
    resources: Mapping[str, Resources]
    methods: Mapping[str, dict[str, Any]]
    rounds: tuple[Round, ...]

    @property
    def output(self) -> Path:
        """Folder of all rounds."""
        assert self.evolve.output is not None
        return Path(self.evolve.output)

    @property
    def main_method(self) -> str:
        """The method whose model goes on to the next round."""
        return next(iter(self.methods))

    def round(self, name: str) -> Round:
        """A round by its name.

        Raises:
            ConfigError: there is none.
        """
        for each in self.rounds:
            if each.name == name:
                return each
        raise ConfigError(f"{self.source}: there is no round {name!r}; {nearest(name, [r.name for r in self.rounds])}")

    def resources_of(self, stage: str) -> Resources:
        """Resources of a stage: those of ``train`` for ``train:sft``, too, and for a reference that has none of its own."""
        kind = stage.split(":")[0]
        given = self.resources.get(kind) or self.resources.get(_LIKE.get(kind, kind)) or Resources()
        if given.nproc_per_node is not None:
            return given
        return replace(given, nproc_per_node=1 if kind in _ALONE or given.array > 1 else self.evolve.nproc_per_node)


def read_evolution(path: str | Path) -> Evolution:
    """Read and check a configuration; the settings of the commands are checked when their stages are planned.

    Raises:
        ConfigError: the first thing that is wrong.
    """
    source = Path(path)
    where = f"--config {source}"
    values = read_yaml(source)
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: holds {kind_of(values)}; it must be a mapping with evolve and rounds")
    for key in values:
        if key not in _TOP:
            raise ConfigError(f"{where}: {key!r} is unknown; {nearest(str(key), _TOP)}")
    evolve = EvolveConfig(**convert_fields(EvolveConfig, _mapping(values, "evolve", where), f"{where}: evolve."))
    check_ranges(evolve)
    for name in ("model", "output"):
        if getattr(evolve, name) is None:
            raise ConfigError(f"{where}: evolve.{name} is not given; name a folder")
    methods = _methods(values, where)
    evolution = Evolution(
        source,
        evolve,
        _resources(_mapping(values, "resources", where), where),
        methods,
        _rounds(values, methods, where),
    )
    _check_arrays(evolution, where)
    return evolution


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two mappings as one; where both have a mapping, these are merged, else the second one counts."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def _mapping(values: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    content = values.get(key)
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: {key} holds {kind_of(content)}; it must be a mapping")
    return content


def _resources(content: Mapping[str, Any], where: str) -> dict[str, Resources]:
    resources = {}
    for stage in content:
        if stage not in STAGES:
            raise ConfigError(f"{where}: resources has {stage!r}, which is not a stage; {nearest(str(stage), STAGES)}")
        at = f"{where}: resources.{stage}."
        resources[stage] = Resources(**convert_fields(Resources, _mapping(content, stage, f"{where}: resources"), at))
        check_ranges(resources[stage])
    return resources


def _methods(values: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    content = _mapping(values, "methods", where) or {"longpo": {}}
    for name in content:
        _check_name(name, f"{where}: methods")
    return {name: _mapping(content, name, f"{where}: methods") for name in content}


def _rounds(values: Mapping[str, Any], methods: Mapping[str, dict[str, Any]], where: str) -> tuple[Round, ...]:
    defaults = _mapping(values, "defaults", where)
    _check_round_keys(defaults, (*COMMANDS, "gate"), f"{where}: defaults")
    content = values.get("rounds")
    if not isinstance(content, list) or not content:
        raise ConfigError(f"{where}: rounds holds {kind_of(content)}; list at least one round")
    rounds: list[Round] = []
    for number, one in enumerate(content, start=1):
        at = f"{where}: round {number}"
        if not isinstance(one, dict):
            raise ConfigError(f"{at} is {kind_of(one)}; it must be a mapping")
        _check_round_keys(one, (*COMMANDS, "gate", "methods", "name"), at)
        name = one.get("name", f"round{number}")
        _check_name(name, f"{at}: name")
        if name in [other.name for other in rounds]:
            raise ConfigError(f"{at} has the name {name!r} of another round; rename it")
        settings = {c: merged(_mapping(defaults, c, f"{where}: defaults"), _mapping(one, c, at)) for c in COMMANDS}
        gate = _gate(one.get("gate", defaults.get("gate")), at)
        rounds.append(Round(name, settings, gate, _methods_of_round(_mapping(one, "methods", at), methods, at)))
    return tuple(rounds)


def _methods_of_round(
    changes: Mapping[str, Any], methods: Mapping[str, dict[str, Any]], where: str
) -> dict[str, dict[str, Any]]:
    for name in changes:
        if name not in methods:
            raise ConfigError(
                f"{where}: methods has {name!r}, which is none of the file's; {nearest(str(name), methods)}"
            )
    return {name: merged(own, _mapping(changes, name, f"{where}: methods")) for name, own in methods.items()}


def _check_round_keys(content: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in content:
        if key not in known:
            raise ConfigError(f"{where} has {key!r}, which is unknown; {nearest(str(key), known)}")


def _check_name(name: Any, where: str) -> None:
    """A name is a folder's and a part of a Slurm job's."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(
            f"{where}: {name!r} is not a name; use letters, digits, '.', '_' and '-', in quotes if it is a number"
        )


def _gate(content: Any, where: str) -> tuple[GateRule, ...]:
    content = [] if content is None else content
    if not isinstance(content, list) or not all(isinstance(rule, dict) for rule in content):
        raise ConfigError(f"{where}: gate holds {kind_of(content)}; it must be a list of mappings")
    rules = []
    for rule in content:
        # YAML reads a length as a number.
        rule = {k: str(v) if k == "length" and type(v) is int else v for k, v in rule.items()}
        rules.append(GateRule(**convert_fields(GateRule, rule, f"{where}: gate.")))
        if not rules[-1].suite:
            raise ConfigError(f"{where}: a rule of the gate has no suite; name one, such as ruler")
        if rules[-1].at_least is None and rules[-1].at_most is None:
            raise ConfigError(f"{where}: the gate's rule on {rules[-1].suite} has no bound; give at_least or at_most")
    return tuple(rules)


def _check_arrays(evolution: Evolution, where: str) -> None:
    for stage, resources in evolution.resources.items():
        if resources.array > 1 and stage not in ("generate", "evaluate", "evaluate-before"):
            raise ConfigError(
                f"{where}: resources.{stage}.array={resources.array}, but only generate and evaluate can be divided among "
                "the tasks of an array; leave it out"
            )
        if resources.array > 1 and (resources.nodes > 1 or (resources.nproc_per_node or 1) > 1):
            raise ConfigError(
                f"{where}: resources.{stage} has array={resources.array} and several processes per task; give each task one "
                "process (nodes=1, nproc_per_node=1) or leave array out"
            )
