"""The suites that ``--tasks`` may name."""

from __future__ import annotations

from typing import Any

from megatron_longpo.errors import ConfigError
from megatron_longpo.evaluation.suites.base import Suite
from megatron_longpo.evaluation.suites.infinitebench import InfiniteBenchSuite
from megatron_longpo.evaluation.suites.needle import NeedleSuite
from megatron_longpo.evaluation.suites.preference import PreferenceSuite
from megatron_longpo.evaluation.suites.qa import QaSuite
from megatron_longpo.evaluation.suites.ruler.suite import RulerSuite
from megatron_longpo.evaluation.suites.short_context import ShortContextSuite

SUITES: dict[str, Suite[Any]] = {
    suite.name: suite
    for suite in (
        RulerSuite(),
        InfiniteBenchSuite(),
        NeedleSuite(),
        QaSuite(),
        ShortContextSuite(),
        PreferenceSuite(),
    )
}


def suite_of(name: str, source: str) -> Suite[Any]:
    """The suite of a name.

    Args:
        name: its name.
        source: where the name comes from, for the error.

    Raises:
        ConfigError: there is no such suite.
    """
    if name not in SUITES:
        raise ConfigError(f"{source} has {name!r}; use {', '.join(SUITES)}")
    return SUITES[name]
