"""Configuration of an evaluation: dataclasses by section, read as the training's is (``megatron_longpo/config.py``)."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_longpo.config import Sections, check_part
from megatron_longpo.engines.settings import EngineConfig, check_engine
from megatron_longpo.errors import ConfigError
from megatron_longpo.evaluation import infinitebench, needle, ruler, short_context
from megatron_longpo.schema import check_ranges

# A section has a field with the name of its module.
_INFINITEBENCH_TASKS = infinitebench.TASKS

SUITES = ("ruler", "infinitebench", "needle", "short", "preference")


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured, and where to."""

    tasks: tuple[str, ...] = ("ruler",)
    """Suites, by spaces or commas: ruler, infinitebench, needle, short, preference."""
    lengths: tuple[str, ...] = ("4096",)
    """Tokens of prompt and answer together (ruler, needle); 4K means 4096. The longest is also where infinitebench truncates."""
    output: str | None = None
    """Folder of the results. The same command goes on where it was; --restart begins again."""
    seed: int = 1234
    samples: int = 100
    """Samples a task and length (ruler)."""
    rank: int | None = None
    world_size: int | None = None
    """This part of how many. Default: torchrun's RANK and WORLD_SIZE, or all."""


@dataclass(frozen=True)
class RulerConfig:
    """RULER, and what its haystacks and questions are made of."""

    ruler_tasks: tuple[str, ...] = ruler.TASKS
    """Which of the thirteen."""
    haystack: tuple[str, ...] = ()
    """Texts for essay haystacks (ruler, needle): files, folders or globs, as documents of pair generation."""
    words: str | None = None
    """File of words, one a line, for keys and lists. Default: English words."""
    squad: str | None = None
    """Questions of qa_1: SQuAD's JSON, or rows (.jsonl, .jsonl.gz) with its columns."""
    hotpotqa: str | None = None
    """Questions of qa_2: HotpotQA's JSON, or rows with its columns."""


@dataclass(frozen=True)
class InfiniteBenchConfig:
    """InfiniteBench's English books."""

    infinitebench: str | None = None
    """Folder with the published longbook_sum_eng.jsonl, longbook_qa_eng.jsonl, longbook_choice_eng.jsonl."""
    infinitebench_tasks: tuple[str, ...] = _INFINITEBENCH_TASKS
    infinitebench_samples: int | None = None
    """The first so many rows of each file. Default: all."""
    infinitebench_prompts: str = "chat"
    """Prompts of the benchmark for chat models (those of GPT-4) or, base, for models that continue a text (YaRN-Mistral's)."""


@dataclass(frozen=True)
class NeedleConfig:
    """Needle map: depth by length."""

    needle_depths: int = 11
    """Depths, evenly from 0 to 100 %."""
    needle_trials: int = 5
    """Questions a cell."""
    needle_haystack: str = "shared"
    """shared: a haystack holds a needle at every depth, each asked for by its key, and is read once for all; single: one needle
    a haystack, the classic map."""


@dataclass(frozen=True)
class ShortConfig:
    """Short context, by lm-evaluation-harness (extra `eval`)."""

    short_tasks: tuple[str, ...] = short_context.TASKS
    """mmlu (5-shot), arc_challenge (25), hellaswag (10), winogrande (5)."""
    short_data: str | None = None
    """Folder with local data sets, for machines without a hub (docs/tools.md)."""
    short_limit: int | None = None
    """At most so many questions of each task (of each subject of mmlu)."""
    short_batch_size: int = 4


@dataclass(frozen=True)
class PreferenceConfig:
    """Held-out preference pairs."""

    pairs: str | None = None
    """Prefix of preprocessed pairs."""
    reference_model: str | None = None
    """Hugging Face folder of the short-context model that rewards are measured against. Default: the evaluated model itself."""
    beta: float = 0.1
    context_parallel_size: int = 1
    tensor_model_parallel_size: int = 1


@dataclass(frozen=True)
class EvaluationConfig(Sections):
    """One dataclass a section."""

    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    ruler: RulerConfig = field(default_factory=RulerConfig)
    infinitebench: InfiniteBenchConfig = field(default_factory=InfiniteBenchConfig)
    needle: NeedleConfig = field(default_factory=NeedleConfig)
    short: ShortConfig = field(default_factory=ShortConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)

    @property
    def suites(self) -> list[str]:
        return names(self.evaluate.tasks)

    @property
    def lengths(self) -> list[int]:
        """Ascending.

        Raises:
            ConfigError: not numbers.
        """
        result = []
        for text in names(self.evaluate.lengths):
            digits, factor = (text[:-1], 1024) if text[-1:] in "kK" else (text, 1)
            if not digits.isdigit() or not int(digits):
                raise ConfigError(f"lengths has {text!r}, which is no number of tokens; write 4096 or 4K")
            result.append(int(digits) * factor)
        return sorted(set(result))


def names(values: tuple[str, ...]) -> list[str]:
    """Values that were separated by spaces or commas, each once."""
    return list(dict.fromkeys(part for value in values for part in value.replace(",", " ").split()))


def check(c: EvaluationConfig) -> None:
    """What can be said of a configuration alone.

    Raises:
        ConfigError: the first value that breaks a rule.
    """

    def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
        if value not in allowed:
            raise ConfigError(f"{name} has {value!r}; use {', '.join(allowed)}")

    def positive(name: str, value: int | None) -> None:
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value} must be at least 1")

    e = c.evaluate
    if e.output is None:
        raise ConfigError("output is not given; name the folder of the results with --output")
    check_ranges(c)
    check_engine(c.engine)
    if not c.suites:
        raise ConfigError(f"tasks is empty; name some of {', '.join(SUITES)}")
    for suite in c.suites:
        one_of("tasks", suite, SUITES)
    for task in names(c.ruler.ruler_tasks):
        one_of("ruler_tasks", task, ruler.TASKS)
    for task in names(c.infinitebench.infinitebench_tasks):
        one_of("infinitebench_tasks", task, infinitebench.TASKS)
    for task in names(c.short.short_tasks):
        one_of("short_tasks", task, short_context.TASKS)
    one_of("infinitebench_prompts", c.infinitebench.infinitebench_prompts, tuple(infinitebench.PROMPTS))
    one_of("needle_haystack", c.needle.needle_haystack, needle.KINDS)
    if not c.lengths and any(s in c.suites for s in ("ruler", "needle", "infinitebench")):
        raise ConfigError("lengths is empty; name numbers of tokens such as 4096,8192")
    positive("samples", e.samples)
    positive("infinitebench_samples", c.infinitebench.infinitebench_samples)
    positive("needle_trials", c.needle.needle_trials)
    positive("needle_depths", c.needle.needle_depths)
    positive("short_limit", c.short.short_limit)
    positive("short_batch_size", c.short.short_batch_size)
    positive("context_parallel_size", c.preference.context_parallel_size)
    positive("tensor_model_parallel_size", c.preference.tensor_model_parallel_size)
    wanted = max((infinitebench.MAX_TOKENS[t] for t in names(c.infinitebench.infinitebench_tasks)), default=0)
    if "infinitebench" in c.suites and c.lengths[-1] < wanted + 512:
        raise ConfigError(
            f"lengths={c.lengths[-1]} leaves no text beside answers of {wanted} tokens (infinitebench); give at least "
            f"{wanted + 512}"
        )
    if "infinitebench" in c.suites and c.infinitebench.infinitebench is None:
        raise ConfigError("infinitebench is not given; name the folder of its JSONL files with --infinitebench")
    if "preference" in c.suites and c.preference.pairs is None:
        raise ConfigError("pairs is not given; name the prefix of preprocessed pairs with --pairs")
    if not c.preference.beta > 0:
        raise ConfigError(f"beta={c.preference.beta} must be positive; the paper uses 0.1")
    needs_weights = [s for s in c.suites if s in ("short", "preference")]
    if needs_weights and c.engine.engine == "openai":
        raise ConfigError(
            f"tasks={','.join(needs_weights)} need log-probs of given text, which engine=openai does not give; leave "
            "them out, or use a model folder"
        )
    check_part(e.rank, e.world_size)
