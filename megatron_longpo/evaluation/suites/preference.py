"""Held-out preference pairs, by the trainer's own forward: reward accuracy, margins, NLL, and the KL estimates of
``training/held_out.py``.

Unlike the other suites, all processes compute each sample together, under the layout that the options ask for; see
``evaluation/preferences.py``. samples.jsonl has one row per sample and metric.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from typing_extensions import override

from megatron_longpo.errors import ConfigError
from megatron_longpo.evaluation.sections import SuiteConfig
from megatron_longpo.evaluation.suites.base import Launch, Metrics, ReadySuite, Suite
from megatron_longpo.runtime.tables import Table
from megatron_longpo.schema import Count, Range

if TYPE_CHECKING:
    from megatron_longpo.engines.base import Engine


@dataclass(frozen=True)
class PreferenceConfig:
    """Held-out preference pairs."""

    pairs: str | None = None
    """Prefix of preprocessed pairs."""
    reference_model: str | None = None
    """Hugging Face folder of the short-context model that rewards are measured against. Default: the evaluated model itself."""
    beta: Annotated[float, Range(gt=0, fix="the paper uses 0.1")] = 0.1
    """beta of the rewards."""
    context_parallel_size: Count = 1
    """Ranks that share a sequence."""
    tensor_model_parallel_size: Count = 1
    """Ranks that share a layer's weights."""

    @property
    def model_parallel_size(self) -> int:
        """Ranks that compute a sample together."""
        return self.context_parallel_size * self.tensor_model_parallel_size


class PreferenceSuite(Suite[None]):
    """Metrics of held-out preference pairs."""

    name = "preference"
    in_percent = False
    settings_alike = ("version", "reference", "beta")

    @override
    def check(self, config: SuiteConfig) -> None:
        super().check(config)
        if config.section(PreferenceConfig).pairs is None:
            raise ConfigError("pairs is not given; name the prefix of preprocessed pairs with --pairs")

    @override
    def prepare(self, launch: Launch) -> None:
        """Check everything that can be known before the process group starts."""
        # Imported where it is needed: it brings torch, megatron-core and the trainer.
        from megatron_longpo.evaluation.preferences import check_inputs

        check_inputs(launch)

    @override
    def begin(self, launch: Launch, inputs: None, engine: Engine | None) -> ReadySuite:
        from megatron_longpo.evaluation.preferences import ReadyPreferences, identity

        return ReadyPreferences(launch.config, launch.open_folder(self, identity(launch.config)))

    @override
    def tables(self, metrics: Metrics) -> list[Table]:
        """All samples, and by length."""
        bins = metrics["by_length"]
        rows = [["samples", str(metrics["samples"]), *(str(of_bin["samples"]) for of_bin in bins.values())]]
        rows += [
            [name, f"{metrics[name]:.4f}", *(f"{of_bin[name]:.4f}" for of_bin in bins.values())]
            for name in metrics
            if name not in ("samples", "by_length")
        ]
        return [Table("Held-out preferences", ["figure", "all", *(f"to {tokens} tokens" for tokens in bins)], rows)]
