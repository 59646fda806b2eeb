"""Profile some steps: a torch profile with the step's phases, and on CUDA a snapshot of the allocator's memory."""

from __future__ import annotations

from pathlib import Path

import torch.profiler

from megatron_longpo.config import LoggingConfig
from megatron_longpo.runtime import platform
from megatron_longpo.runtime.log import log

FOLDER = "profile"


class Profiler:
    """Profiles the steps after profile_step_start up to profile_step_end on the ranks of profile_ranks.

    The traces open in chrome://tracing and ui.perfetto.dev, the memory snapshots in pytorch.org/memory_viz. Phases appear in the
    traces under the names that the trainer gives to ``record_function``.

    Args:
        config: what is profiled.
        output: the run's folder; None: nothing is profiled.
        rank: rank of this process.
    """

    def __init__(self, config: LoggingConfig, output: Path | None, rank: int) -> None:
        self._config, self._rank = config, rank
        self._folder = (
            output / FOLDER if output is not None and config.profile and rank in config.profile_ranks else None
        )
        self._profile: torch.profiler.profile | None = None
        self._first = 0

    def update(self, step: int) -> None:
        """Begin or end the profile if it is time to; called between steps.

        Args:
            step: optimizer steps done.
        """
        is_inside = self._config.profile_step_start <= step < self._config.profile_step_end
        if self._folder is not None and self._profile is None and is_inside:
            self._first = step + 1
            platform.CURRENT.start_memory_history()
            self._profile = torch.profiler.profile()
            self._profile.start()
        elif self._profile is not None and not is_inside:
            self._write(step)

    def close(self, step: int) -> None:
        """Write a profile that the run's end cuts short.

        Args:
            step: optimizer steps done.
        """
        if self._profile is not None:
            self._write(step)

    def _write(self, step: int) -> None:
        assert self._folder is not None and self._profile is not None
        self._profile.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"steps_{self._first}-{step}_rank_{self._rank}"
        trace = self._folder / f"{name}.json.gz"
        self._profile.export_chrome_trace(str(trace))
        platform.CURRENT.write_memory_snapshot(self._folder / f"{name}_memory.pickle")
        self._profile = None
        log(f"profile: {trace}")
