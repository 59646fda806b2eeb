"""Sections of an evaluation's configuration that all suites share; each suite's own section stands in its file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from megatron_longpo.config import Sections
from megatron_longpo.engines.settings import EngineConfig
from megatron_longpo.errors import ConfigError
from megatron_longpo.runtime.reading import ReadingConfig
from megatron_longpo.schema import Count

Section = TypeVar("Section")


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured, and where the results go."""

    tasks: tuple[str, ...] = ("ruler",)
    """Suites, separated by spaces or commas: ruler, infinitebench, needle, qa, short, preference."""
    lengths: tuple[str, ...] = ("4096",)
    """Lengths in tokens, prompt and answer together (ruler, needle); 4K means 4096. infinitebench truncates to the longest;
    qa counts each document at the shortest that holds it, unless it has --qa-lengths."""
    output: str | None = None
    """Folder of the results. Rerun the same command to resume; --restart starts over."""
    seed: int = 1234
    """Seed of all samples."""
    samples: Count = 100
    """Samples per task and length (ruler)."""
    rank: int | None = None
    """Number of the part that this process does, from 0. Default: torchrun's RANK, or all parts."""
    world_size: int | None = None
    """Number of parts. Default: torchrun's WORLD_SIZE, or 1."""


@dataclass(frozen=True)
class SuiteConfig(Sections):
    """The configuration as a suite sees it: the shared sections, and any suite's section by its type."""

    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    reading: ReadingConfig = field(default_factory=ReadingConfig)

    def section(self, kind: type[Section]) -> Section:
        """The section of a type, ``config.section(RulerConfig)`` for example."""
        return next(section for section in vars(self).values() if isinstance(section, kind))

    @property
    def suites(self) -> list[str]:
        """Names of the selected suites."""
        return names(self.evaluate.tasks)

    @property
    def lengths(self) -> list[int]:
        """Lengths in tokens, ascending.

        Raises:
            ConfigError: one is not a number.
        """
        return numbers_of_tokens("lengths", self.evaluate.lengths)

    @property
    def output(self) -> Path:
        """Folder of the results."""
        assert self.evaluate.output is not None
        return Path(self.evaluate.output)

    @property
    def model(self) -> str:
        """Model folder, or the model's name at a server."""
        assert self.engine.model is not None
        return self.engine.model


def names(values: tuple[str, ...]) -> list[str]:
    """Values that are separated by spaces or commas, each once."""
    return list(dict.fromkeys(part for value in values for part in value.replace(",", " ").split()))


def check_names(option: str, values: tuple[str, ...], known: tuple[str, ...]) -> None:
    """Check the values of a list option.

    Raises:
        ConfigError: one of them is unknown.
    """
    for value in names(values):
        if value not in known:
            raise ConfigError(f"{option} has {value!r}; use {', '.join(known)}")


def numbers_of_tokens(option: str, texts: tuple[str, ...]) -> list[int]:
    """Lengths as an option gives them, in tokens, ascending.

    Raises:
        ConfigError: one is not a number.
    """
    lengths = set()
    for text in names(texts):
        digits, factor = (text[:-1], 1024) if text[-1:] in "kK" else (text, 1)
        if not digits.isdigit() or not int(digits):
            raise ConfigError(f"{option} has {text!r}, which is not a number of tokens; write 4096 or 4K")
        lengths.add(int(digits) * factor)
    return sorted(lengths)
