"""Configuration of an evaluation: dataclasses by section, read like the training's (``megatron_longpo/config.py``).

A suite's section stands in the suite's file; ``EvaluationConfig`` lists it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_longpo.config import check_part
from megatron_longpo.engines.settings import check_engine
from megatron_longpo.errors import ConfigError
from megatron_longpo.evaluation.registry import SUITES, suite_of
from megatron_longpo.evaluation.sections import SuiteConfig
from megatron_longpo.evaluation.suites.infinitebench import InfiniteBenchConfig
from megatron_longpo.evaluation.suites.needle import NeedleConfig
from megatron_longpo.evaluation.suites.preference import PreferenceConfig
from megatron_longpo.evaluation.suites.qa import QaConfig
from megatron_longpo.evaluation.suites.ruler.suite import RulerConfig
from megatron_longpo.evaluation.suites.short_context import ShortConfig
from megatron_longpo.schema import check_ranges


@dataclass(frozen=True)
class EvaluationConfig(SuiteConfig):
    """The shared sections, and one per suite that has options."""

    ruler: RulerConfig = field(default_factory=RulerConfig)
    infinitebench: InfiniteBenchConfig = field(default_factory=InfiniteBenchConfig)
    needle: NeedleConfig = field(default_factory=NeedleConfig)
    qa: QaConfig = field(default_factory=QaConfig)
    short: ShortConfig = field(default_factory=ShortConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)


def check(config: SuiteConfig) -> None:
    """Check the configuration, without reading files or loading models.

    Raises:
        ConfigError: the first value that breaks a rule.
    """
    if config.evaluate.output is None:
        raise ConfigError("output is not given; name the folder of the results with --output")
    check_ranges(config)
    check_engine(config.engine)
    if not config.suites:
        raise ConfigError(f"tasks is empty; name some of {', '.join(SUITES)}")
    selected = [suite_of(name, "tasks") for name in config.suites]
    for suite in SUITES.values():
        suite.check_options(config)
    for suite in selected:
        suite.check(config)
    check_part(config.evaluate.rank, config.evaluate.world_size)
