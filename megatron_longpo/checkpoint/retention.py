"""Which checkpoints of a run stay, in its folder and in a store."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from megatron_longpo.config import CheckpointConfig


@dataclass(frozen=True)
class Retention:
    """A rule by which old checkpoints are removed.

    Attributes:
        keep_last: newest checkpoints that stay; None: all.
        retain_interval: checkpoints of steps divisible by it stay for good; None: no others stay.
    """

    keep_last: int | None
    retain_interval: int | None = None

    @classmethod
    def of(cls, config: CheckpointConfig) -> Retention:
        """The rule of a configuration. As in Megatron-LM, save_retain_interval by itself keeps only the newest of the others."""
        keep_last = config.keep_last
        if keep_last is None and config.save_retain_interval is not None:
            keep_last = 1
        return cls(keep_last, config.save_retain_interval)

    def removable(self, steps: Iterable[int], *, spare: Collection[int] = ()) -> list[int]:
        """Steps whose checkpoints may go, oldest first.

        Args:
            steps: steps of the checkpoints that are there.
            spare: steps whose checkpoints stay in any case.
        """
        if self.keep_last is None:
            return []
        old = sorted(set(steps))[: -self.keep_last]
        return [s for s in old if s not in spare and not (self.retain_interval and s % self.retain_interval == 0)]
