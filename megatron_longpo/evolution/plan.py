"""The stages of a round: which command each one runs, on what, after which others.

OUTPUT/ROUND/pairs.jsonl, train.jsonl, held_out.jsonl    generate, split
OUTPUT/ROUND/data.*, held_out.*                          preprocess
OUTPUT/ROUND/checkpoint/                                 import
OUTPUT/ROUND/before/                                     evaluate-before
OUTPUT/ROUND/METHOD/run/, model/, evaluation/            train, export, evaluate
OUTPUT/ROUND/comparison/, gate.json                      compare, gate
OUTPUT/ROUND/stages/STAGE/                               configuration, record and log of a stage
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_longpo.config import Config, Sections, from_dict
from megatron_longpo.config import check as check_training
from megatron_longpo.errors import ConfigError
from megatron_longpo.evaluation.settings import EvaluationConfig
from megatron_longpo.evaluation.settings import check as check_evaluation
from megatron_longpo.evolution.settings import Evolution, Resources, Round, merged
from megatron_longpo.generation.settings import GenerationConfig
from megatron_longpo.generation.settings import check as check_generation
from megatron_longpo.schema import nearest

# Command -> dataclass of its flags, for the commands that take no YAML file; and its parser, which exits on a wrong value.
FlagTypes = Mapping[str, type]
ParseFlags = Callable[[str, Sequence[str]], object]

_LENGTH_OF_RUN = ("train_iters", "train_epochs", "eval_interval", "eval_iters", "seed", "manual_gc_interval")


@dataclass(frozen=True)
class Stage:
    """One step of a round.

    Attributes:
        round: name of the round.
        name: name of the stage, ``train:sft`` for one that belongs to a method.
        command: words of the command that it runs; empty for what evolution does itself (split, gate).
        config: content of the command's YAML file, or None.
        flags: other arguments of the command.
        outputs: files and folders that it makes.
        inputs: files and folders that it reads and no stage makes.
        after: ids of the stages that come before it.
        resources: what it runs on.
        folder: folder of its configuration, record and log.
    """

    round: str
    name: str
    command: tuple[str, ...]
    config: dict[str, Any] | None
    flags: tuple[str, ...]
    outputs: tuple[Path, ...]
    inputs: tuple[Path, ...]
    after: tuple[str, ...]
    resources: Resources
    folder: Path

    @property
    def id(self) -> str:
        """``128K/train:longpo``."""
        return f"{self.round}/{self.name}"

    @property
    def kind(self) -> str:
        """The stage's name without the method."""
        return self.name.split(":")[0]


@dataclass(frozen=True)
class RoundFolder:
    """Paths of a round."""

    root: Path

    @property
    def pairs(self) -> Path:
        return self.root / "pairs.jsonl"

    @property
    def train_pairs(self) -> Path:
        return self.root / "train.jsonl"

    @property
    def held_out_pairs(self) -> Path:
        return self.root / "held_out.jsonl"

    @property
    def data(self) -> Path:
        """Prefix of the training data."""
        return self.root / "data"

    @property
    def held_out(self) -> Path:
        """Prefix of the held-out data."""
        return self.root / "held_out"

    @property
    def checkpoint(self) -> Path:
        return self.root / "checkpoint"

    @property
    def before(self) -> Path:
        return self.root / "before"

    @property
    def comparison(self) -> Path:
        return self.root / "comparison"

    @property
    def gate(self) -> Path:
        return self.root / "gate.json"

    def run(self, method: str) -> Path:
        return self.root / method / "run"

    def model(self, method: str) -> Path:
        return self.root / method / "model"

    def evaluation(self, method: str) -> Path:
        # The folder's name is the evaluation's in the comparison.
        return self.root / method / method

    def stage(self, name: str) -> Path:
        return self.root / "stages" / name.replace(":", "-")


@dataclass(frozen=True)
class Origin:
    """The model that a round begins with.

    Attributes:
        model: its Hugging Face folder.
        stage: id of the stage that made it; None for the first model.
    """

    model: Path
    stage: str | None = None


class Planner:
    """Plans rounds.

    Args:
        evolution: the configuration.
        flag_types: the flags of preprocess, import and export.
        parse_flags: reads flags as the command would.
    """

    def __init__(self, evolution: Evolution, flag_types: FlagTypes, parse_flags: ParseFlags) -> None:
        self.evolution = evolution
        self._flag_types, self._parse_flags = flag_types, parse_flags

    def check(self) -> None:
        """Check the settings of all rounds, whichever model they begin with.

        Raises:
            ConfigError: the first value that a command would refuse.
        """
        for each in self.evolution.rounds:
            self.stages(each, Origin(Path(str(self.evolution.evolve.model))))

    def folder(self, name: str) -> RoundFolder:
        """Paths of a round."""
        return RoundFolder(self.evolution.output / name)

    def stages(self, round_: Round, origin: Origin) -> list[Stage]:
        """The stages of a round, in an order in which they can run.

        Args:
            round_: the round.
            origin: the model that it begins with.

        Raises:
            ConfigError: a setting that a command would refuse, or that is not the user's to set.
        """
        return list(_Round(self, round_, origin).stages())

    def checked_flags(self, command: str, content: Mapping[str, Any], own: Mapping[str, Any], where: str) -> list[str]:
        """Arguments of a command that takes flags only.

        Args:
            command: preprocess, import or export.
            content: the user's settings.
            own: those of the evolution.
            where: beginning of error messages.
        """
        fields = dict(_flag_fields(self._flag_types[command]))
        for key in content:
            if key in own:
                raise ConfigError(f"{where}: {command}.{key} is set by the evolution; leave it out")
            if key not in fields:
                raise ConfigError(f"{where}: {command}.{key} is unknown; {nearest(str(key), fields)}")
        arguments: list[str] = []
        for key, value in {**own, **content}.items():
            arguments += _argument(key, value, default=fields[key])
        try:
            self._parse_flags(command, arguments)
        except SystemExit:
            raise ConfigError(f"{where}: {command} refuses its settings, as said above; correct them") from None
        return arguments


class _Round:
    """A round being planned."""

    def __init__(self, planner: Planner, round_: Round, origin: Origin) -> None:
        self._planner, self._round, self._origin = planner, round_, origin
        self._evolution = planner.evolution
        self._paths = planner.folder(round_.name)
        self._where = f"--config {self._evolution.source}: round {round_.name}"
        self._held_out = self._evolution.evolve.held_out_fraction > 0

    def stages(self) -> Iterator[Stage]:
        yield from self._data()
        methods = self._round.methods
        evaluates = bool(self._round.settings["evaluate"])
        if evaluates:
            yield self._evaluation("evaluate-before", self._origin.model, self._paths.before, self._from_origin)
        for method, changes in methods.items():
            yield from self._method(method, changes)
            if evaluates:
                name = f"evaluate:{method}"
                yield self._evaluation(
                    name, self._paths.model(method), self._paths.evaluation(method), [f"export:{method}"]
                )
        if evaluates:
            folders = [self._paths.before, *map(self._paths.evaluation, methods)]
            flags = [*map(str, folders), "--output", str(self._paths.comparison)]
            yield self._stage(
                "compare",
                ("evaluate", "compare"),
                flags=[*flags, "--seed", str(self._evolution.evolve.seed)],
                outputs=[self._paths.comparison],
                after=["evaluate-before", *(f"evaluate:{method}" for method in methods)],
            )
        elif self._round.gate:
            raise ConfigError(f"{self._where} has a gate but no evaluation; add evaluate, or remove the gate")
        yield self._stage(
            "gate",
            config={"rules": [dataclasses.asdict(rule) for rule in self._round.gate]},
            outputs=[self._paths.gate],
            after=["compare"] if evaluates else [f"export:{self._evolution.main_method}"],
        )

    def _data(self) -> Iterator[Stage]:
        """Pairs by the current model, tokenised; its weights as a checkpoint."""
        paths, settings = self._paths, self._round.settings
        own: dict[str, Any] = {"run": {"output": str(paths.pairs)}, "engine": {"model": str(self._origin.model)}}
        generation, values = self._config("generate", GenerationConfig, own)
        if generation.engine.engine == "openai":
            raise ConfigError(
                f"{self._where}: generate.engine.engine=openai asks a server, which serves one model while each round has its "
                "own; use transformers or vllm"
            )
        check_generation(generation)
        yield self._stage(
            "generate",
            ("generate",),
            config=values,
            outputs=[paths.pairs],
            inputs=[Path(p) for p in generation.documents.documents],
            after=self._from_origin,
        )
        yield self._stage(
            "split",
            config={"held_out_fraction": self._evolution.evolve.held_out_fraction, "seed": self._evolution.evolve.seed},
            outputs=[paths.train_pairs, *([paths.held_out_pairs] if self._held_out else [])],
            after=["generate"],
        )
        parts = [("preprocess", paths.train_pairs, paths.data)]
        if self._held_out:
            parts.append(("preprocess-held-out", paths.held_out_pairs, paths.held_out))
        for name, source, prefix in parts:
            own = {"input": [str(source)], "output_prefix": str(prefix), "tokenizer": str(self._origin.model)}
            yield self._stage(
                name,
                ("preprocess",),
                flags=self._planner.checked_flags("preprocess", settings["preprocess"], own, self._where),
                outputs=[Path(f"{prefix}{ending}") for ending in (".bin", ".idx", ".json")],
                after=["split", *self._from_origin],
            )
        own = {"hf": str(self._origin.model), "output": str(paths.checkpoint)}
        changes = {"name": Path(str(self._evolution.evolve.model)).name, **settings["import"]}
        yield self._stage(
            "import",
            ("convert", "import"),
            flags=self._planner.checked_flags("import", changes, own, self._where),
            outputs=[paths.checkpoint],
            after=self._from_origin,
        )

    def _method(self, method: str, changes: Mapping[str, Any]) -> Iterator[Stage]:
        """Reference, training and export of a method."""
        paths = self._paths
        own: dict[str, Any] = {
            "data": {"data_path": str(paths.data)},
            "checkpoint": {"load": str(paths.checkpoint), "save": str(paths.run(method))},
        }
        if self._held_out:
            own["data"]["valid_data_path"] = str(paths.held_out)
        training, values = self._config("train", Config, own, changes)
        check_training(training)
        if training.checkpoint.upload_to is not None:
            place = f"{training.checkpoint.upload_to.rstrip('/')}/{self._round.name}/{method}"
            values = merged(values, {"checkpoint": {"upload_to": place}})
        data = ["preprocess", "import", *(["preprocess-held-out"] if self._held_out else [])]
        before = data
        if _caches_reference(training):
            only = _for_reference(values)
            yield self._stage(f"reference:{method}", ("train",), config=only, outputs=[], after=data)
            before = [*data, f"reference:{method}"]
        yield self._stage(f"train:{method}", ("train",), config=values, outputs=[paths.run(method)], after=before)
        own = {"checkpoint": str(paths.run(method)), "output": str(paths.model(method))}
        yield self._stage(
            f"export:{method}",
            ("convert", "export"),
            flags=self._planner.checked_flags("export", self._round.settings["export"], own, self._where),
            outputs=[paths.model(method)],
            after=[f"train:{method}"],
        )

    def _evaluation(self, name: str, model: Path, output: Path, after: Sequence[str]) -> Stage:
        own: dict[str, Any] = {"engine": {"model": str(model)}, "evaluate": {"output": str(output)}}
        after = list(after)
        if self._held_out:
            own["preference"] = {"pairs": str(self._paths.held_out), "reference_model": str(self._origin.model)}
            after.append("preprocess-held-out")
        evaluation, values = self._config("evaluate", EvaluationConfig, own)
        check_evaluation(evaluation)
        array = self._evolution.resources_of(name).array
        is_divided = array > 1 and self._evolution.evolve.executor == "slurm"
        if is_divided and "preference" in evaluation.evaluate.tasks:
            raise ConfigError(
                f"{self._where}: resources.evaluate.array={array} divides the samples among tasks, but the suite preference "
                "computes with all processes together; leave the array out, or preference out of evaluate.tasks"
            )
        return self._stage(name, ("evaluate",), config=values, outputs=[output], after=after)

    @property
    def _from_origin(self) -> list[str]:
        return [] if self._origin.stage is None else [self._origin.stage]

    def _config(
        self, command: str, root: type[Any], own: dict[str, Any], changes: Mapping[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """A command's configuration, and the content of its YAML file."""
        where = f"{self._where}: {command}: "
        values = merged(self._round.settings[command], changes or {})
        given: Sections = from_dict(values, where.rstrip(": "), root)
        default = root()
        for section, content in own.items():
            for key in content:
                if getattr(getattr(given, section), key) != getattr(getattr(default, section), key):
                    raise ConfigError(f"{where}{section}.{key} is set by the evolution; leave it out")
        values = merged(values, own)
        return from_dict(values, where.rstrip(": "), root), values

    def _stage(
        self,
        name: str,
        command: Sequence[str] = (),
        *,
        outputs: Sequence[Path],
        after: Sequence[str],
        config: dict[str, Any] | None = None,
        flags: Sequence[str] = (),
        inputs: Sequence[Path] = (),
    ) -> Stage:
        # Whatever reads the first model has it as an input; a later one is the output of a stage.
        reads_origin = name in ("generate", "preprocess", "preprocess-held-out", "import", "evaluate-before")
        if reads_origin and self._origin.stage is None:
            inputs = [*inputs, self._origin.model]
        return Stage(
            round=self._round.name,
            name=name,
            command=tuple(command),
            config=config,
            flags=tuple(flags),
            outputs=tuple(outputs),
            inputs=tuple(inputs),
            after=tuple(n if "/" in n else f"{self._round.name}/{n}" for n in after),
            resources=self._evolution.resources_of(name),
            folder=self._paths.stage(name),
        )


def _for_reference(values: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a run that only scores: without what log-probs do not depend on, so that another lr, say, does not
    score the data again."""
    kept = {name: content for name, content in values.items() if name not in ("optimizer", "faults", "logging")}
    kept["training"] = {k: v for k, v in kept.get("training", {}).items() if k not in _LENGTH_OF_RUN}
    kept["checkpoint"] = {"load": values["checkpoint"]["load"]}
    return merged(kept, {"reference": {"reference_only": True}})


def _caches_reference(training: Config) -> bool:
    """Whether a run scores its data with the reference before it trains."""
    # Not at the top: it imports torch, which no other part of planning needs.
    from megatron_longpo.training.objective import spec_of

    spec = spec_of(training.objective.objective, training.objective.loss_type)
    return spec.reference_rows is not None and training.reference.reference == "cached"


def _flag_fields(cls: type) -> Iterator[tuple[str, Any]]:
    """Names and defaults of a command's flags; nested dataclasses have theirs in the same list."""
    hints = typing.get_type_hints(cls)
    for each in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[each.name]):
            yield from _flag_fields(hints[each.name])
        else:
            yield each.name, each.default


def _argument(key: str, value: Any, *, default: Any) -> list[str]:
    """A flag with its value, as tyro reads it; nothing for a value that is the default."""
    if value is None or value == default:
        return []
    flag = f"--{key.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag if value else f"--no-{key.replace('_', '-')}"]
    if isinstance(value, (list, tuple)):
        return [flag, *map(_text, value)]
    return [flag, _text(value)]


def _text(value: Any) -> str:
    """A value of YAML as the command line has it."""
    return repr(value) if isinstance(value, float) and math.isfinite(value) else str(value)
