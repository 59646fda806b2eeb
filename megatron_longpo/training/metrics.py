"""What a step reports: exact means over ranks, metrics.jsonl, trackers, the progress line, curves.png."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_longpo.checkpoint.card import RUN_CONFIG
from megatron_longpo.config import Config
from megatron_longpo.errors import one_line
from megatron_longpo.runs.records import METRICS, VALIDATION, read_metric_lines
from megatron_longpo.runs.records import read_metrics as read_metrics
from megatron_longpo.runtime import platform
from megatron_longpo.runtime.files import write_atomically
from megatron_longpo.runtime.json_lines import encode_line
from megatron_longpo.runtime.log import log
from megatron_longpo.runtime.process_groups import Parallel
from megatron_longpo.runtime.progress import duration
from megatron_longpo.training.objective import ObjectiveSpec
from megatron_longpo.training.trackers import Tracker

# Seconds of training per second that the curves take to draw.
_LEAST_TRAINING_PER_DRAWING = 20
# Metrics of a sample that metrics.jsonl has, in the order of its keys. Values are looked up by name everywhere, so this order
# decides nothing else.
SAMPLE_METRICS = (
    "loss",
    "nll",
    "preference",
    "logps/chosen",
    "logps/rejected",
    "ref/chosen",
    "ref/rejected",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "tokens",
)


# Metrics of held-out data that are reported as means over samples.
REPORTED = (
    *("loss", "nll", "preference", "logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected"),
    *("rewards/margins", "rewards/accuracies", "kl/chosen", "kl/rejected"),
)
# Those of them that there are without a reference, and those without a preference term.
REPORTED_WITHOUT_REFERENCE = tuple(name for name in REPORTED if not name.startswith("kl/"))
REPORTED_WITHOUT_PREFERENCE = ("loss", "nll", "logps/chosen")


def names_reported(objective: ObjectiveSpec) -> tuple[str, ...]:
    """Names of the metrics of held-out data that are reported with an objective."""
    if not objective.uses_preference:
        return REPORTED_WITHOUT_PREFERENCE
    return REPORTED_WITHOUT_REFERENCE if objective.reference_rows is None else REPORTED


@dataclass(frozen=True)
class SampleMetrics:
    """Metrics of some samples of a global batch.

    Attributes:
        places: places of the samples in the global batch.
        values: name -> [B] values in fp64, in the order of ``places``.
    """

    places: Sequence[int]
    values: Mapping[str, Tensor]

    def before(self, count: int) -> SampleMetrics:
        """Only those whose place is less than ``count``."""
        kept = [index for index, place in enumerate(self.places) if place < count]
        if len(kept) == len(self.places):
            return self
        # Which are kept is known on the host: slices wait for nothing.
        values = {name: torch.cat([v[:0], *(v[i : i + 1] for i in kept)]) for name, v in self.values.items()}
        return SampleMetrics([self.places[i] for i in kept], values)


def reduce_samples(found: Sequence[SampleMetrics], batch_size: int, parallel: Parallel) -> dict[str, float]:
    """Means over the global batch (of ``tokens`` the sum), identical on every rank and for every layout; collective.

    Each sample's metrics are put at its place in the batch and summed over ranks with zeros, so that the mean is always
    taken in the same order.

    Args:
        found: metrics of the samples of this data-parallel rank; only those of the last pipeline stage are read.
        batch_size: samples of the global batch.
        parallel: degrees and groups.
    """
    # On CUDA the host waits here, once in a step.
    table = _gather_table(found, SAMPLE_METRICS, batch_size, parallel)
    means, totals = torch.stack([table.mean(0), table.sum(0)]).tolist()
    tokens = totals[SAMPLE_METRICS.index("tokens")]
    return {**dict(zip(SAMPLE_METRICS, means, strict=True)), "tokens": tokens}


def gather_samples(
    found: Sequence[SampleMetrics], names: Sequence[str], batch_size: int, parallel: Parallel
) -> dict[str, Tensor]:
    """Named metrics of a whole global batch, each [batch_size] in fp64, on every rank; see ``reduce_samples``."""
    table = _gather_table(found, names, batch_size, parallel)
    return dict(zip(names, table.unbind(1), strict=True))


def _gather_table(found: Sequence[SampleMetrics], names: Sequence[str], batch_size: int, parallel: Parallel) -> Tensor:
    """[batch_size, names] in fp64. The only place where metrics have columns instead of names."""
    table = torch.zeros(batch_size, len(names), dtype=torch.float64, device=platform.CURRENT.device)
    if parallel.is_last_stage:
        rows = [torch.stack([metrics.values[name] for name in names], dim=1) for metrics in found if metrics.places]
        if rows:
            places = np.array([place for metrics in found for place in metrics.places], np.int64)
            table.index_copy_(0, platform.CURRENT.to_device({"places": places})["places"], torch.cat(rows))
        dist.all_reduce(table, group=parallel.data_group)
    if parallel.pipeline_size > 1:
        dist.broadcast(table, src=parallel.last_stage_rank, group=parallel.pipeline_group)
    return table


def keep_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop what a killed run logged after the checkpoint that it resumes from, so that no step appears twice."""
    found = read_metric_lines(path)
    kept = [line for line in found.lines if line.record["step"] <= step]
    if found.skipped:
        log(f"{path}: {found.skipped} line(s) that hold no metrics are dropped")
    if path.exists():
        write_atomically(path, b"".join(line.raw for line in kept))
    return [line.record for line in kept]


class Reporter:
    """Logs a run; does nothing on any rank but the first.

    Args:
        output: the run's folder; None: only the progress line is logged.
        train_iters: steps of the whole run, for the time left.
        resumed_step: steps that an earlier launch finished; later lines of its metrics.jsonl are dropped.
        config: the resolved configuration; its ``logging`` section says what is written.
        active: whether this rank reports.
        trackers: opened trackers.
    """

    def __init__(
        self,
        output: Path | None,
        *,
        train_iters: int,
        resumed_step: int,
        config: Config,
        active: bool,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self.output, self.train_iters, self.config, self.active = output, train_iters, config.logging, active
        self.records: list[dict[str, Any]] = []
        self.validations: list[dict[str, Any]] = []
        self._stream: TextIO | None = None
        self._trackers = trackers
        self._began, self._first_step = time.monotonic(), resumed_step
        # When the curves were drawn last, and how long that took.
        self._drawn, self._drawing_seconds = -math.inf, 0.0
        self._goes_on, self._is_behind = config.faults.on_save_failure == "continue", False
        if not active or output is None:
            return
        output.mkdir(parents=True, exist_ok=True)
        (output / RUN_CONFIG).write_text(config.as_yaml(), encoding="utf-8")
        path = output / METRICS
        self.records = keep_until(path, resumed_step)
        self.validations = keep_until(output / VALIDATION, resumed_step or -1)
        self._stream = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def step(self, record: dict[str, Any]) -> None:
        """Report one step."""
        if not self.active:
            return
        self.records.append(record)
        self._write(record)
        # A fingerprint is compared, never drawn.
        values = {n: v for n, v in record.items() if n != "step" and not n.startswith("fingerprint/")}
        for tracker in self._trackers:
            tracker.log(values, record["step"])
        if record["step"] % self.config.log_interval == 0 or record["step"] == self.train_iters:
            log(self._line(record), fields={"event": "step", **record, **self._progress(record["step"])})
        if record["step"] % self.config.plot_interval == 0 and self._drawing_is_cheap():
            self.plot()

    def _write(self, record: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl; with on_save_failure=continue, write what is missing with a later one."""
        if self._stream is None:
            return
        try:
            if self._is_behind:
                # A line may be there in part.
                self._stream.close()
                path = Path(self._stream.name)
                write_atomically(path, b"".join(encode_line(each) for each in self.records))
                self._stream = open(path, "a", encoding="utf-8")  # noqa: SIM115
            else:
                self._stream.write(encode_line(record).decode())
                self._stream.flush()
            self._is_behind = False
        except OSError as error:
            if not self._goes_on:
                raise
            if not self._is_behind:
                log(
                    f"{self._stream.name}: cannot be written ({error.strerror}); its lines follow when it can be",
                    level=logging.WARNING,
                )
            self._is_behind = True

    def validation(self, record: dict[str, Any]) -> None:
        """Report one evaluation of the held-out data."""
        if not self.active:
            return
        self.validations.append(record)
        flat = {f"valid/{k}": v for k, v in record.items() if k not in ("step", "by_length")}
        if self.output is not None:
            self._write_validation(self.output / VALIDATION, record)
        for tracker in self._trackers:
            tracker.log(flat, record["step"])
        log(f"after step {record['step']}: {validation_line(record)}", fields={"event": "held-out", **record})
        self.plot()

    def _write_validation(self, path: Path, record: dict[str, Any]) -> None:
        try:
            with open(path, "a", encoding="utf-8") as stream:
                stream.write(encode_line(record).decode())
        except OSError as error:
            if not self._goes_on:
                raise
            log(f"{path}: cannot be written ({error.strerror}), and lacks a line", level=logging.WARNING)

    def has_validation(self, step: int) -> bool:
        """Whether the held-out data were evaluated after this step."""
        return any(record["step"] == step for record in self.validations)

    def _line(self, r: dict[str, Any]) -> str:
        left = self._progress(r["step"])["seconds_left"]
        width = len(str(self.train_iters))
        if "skipped" in r:
            # Some of its values are not there, since they are not finite.
            return f"step {r['step']:>{width}}/{self.train_iters} | skipped | {duration(left)} left"
        return (
            f"step {r['step']:>{width}}/{self.train_iters} | loss {r['loss']:.4f} | nll {r['nll']:.4f} | margin "
            f"{r['rewards/margins']:+.4f} | acc {r['rewards/accuracies']:.2f} | grad norm {r['grad_norm']:.3f} | lr "
            f"{r['lr']:.2e} | {r['tokens_per_second']:,.0f} tokens/s | {duration(left)} left"
        )

    def _progress(self, step: int) -> dict[str, float]:
        done = step - self._first_step
        left = (time.monotonic() - self._began) / max(1, done) * (self.train_iters - step)
        return {"train_iters": self.train_iters, "seconds_left": round(left, 1)}

    def _drawing_is_cheap(self) -> bool:
        """Whether the curves would take little of the time since they were drawn last: they take a second or two, which small
        models train many steps in."""
        return time.monotonic() - self._drawn >= _LEAST_TRAINING_PER_DRAWING * self._drawing_seconds

    def plot(self) -> None:
        """Draw OUTPUT/curves.png. A run does not fail because of its curves."""
        if self.active and self.output is not None and self.records:
            path, began = self.output / "curves.png", time.monotonic()
            try:
                draw_curves(self.records, path, self.validations)
            except Exception as error:
                log(f"{path}: cannot be drawn ({type(error).__name__}: {one_line(error)}); training continues")
            self._drawn = time.monotonic()
            self._drawing_seconds = self._drawn - began

    def close(self) -> None:
        """Draw the last curves and close what is open."""
        self.plot()
        if self._stream is not None:
            with contextlib.suppress(OSError) if self._is_behind else contextlib.nullcontext():
                self._stream.close()
        for tracker in self._trackers:
            tracker.close()


def validation_line(r: dict[str, Any]) -> str:
    """One line with the metrics of an evaluation of held-out data."""
    parts = [f"held-out loss {r['loss']:.4f}", f"nll {r['nll']:.4f}"]
    if "rewards/margins" in r:
        parts += [f"margin {r['rewards/margins']:+.4f}", f"acc {r['rewards/accuracies']:.2f}"]
    if "kl/rejected" in r:
        parts += [f"kl per token {r['kl/rejected']:+.4f} (chosen {r['kl/chosen']:+.4f})"]
    return " | ".join([*parts, f"{r['samples']} samples"])


def draw_curves(records: list[dict[str, Any]], path: Path, validations: list[dict[str, Any]] | None = None) -> None:
    """Plot loss, log-probs, rewards, accuracy, gradient norm and speed over steps as one PNG; held-out metrics as crosses."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [r["step"] for r in records]
    panels: list[tuple[str, tuple[str, ...]]] = [
        ("loss", ("loss", "nll")),
        ("preference loss", ("preference",)),
        ("rewards", ("rewards/chosen", "rewards/rejected", "rewards/margins")),
        ("reward accuracy", ("rewards/accuracies",)),
        ("log-probs of responses", ("logps/chosen", "logps/rejected", "ref/chosen", "ref/rejected")),
        ("gradient norm", ("grad_norm",)),
        ("learning rate", ("lr",)),
        ("tokens/s", ("tokens_per_second",)),
    ]
    figure, axes = pyplot.subplots(2, 4, figsize=(18, 7), constrained_layout=True)
    for axis, (title, names) in zip(axes.flat, panels, strict=True):
        for name in names:
            axis.plot(
                steps, [r.get(name, float("nan")) for r in records], label=name, marker="." if len(steps) < 40 else ""
            )
        for i, name in enumerate(names):
            held_out = [(r["step"], r[name]) for r in validations or () if name in r]
            if held_out:
                axis.plot(*zip(*held_out, strict=True), "x--", color=f"C{i}", label=f"{name}, held out", alpha=0.8)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if len(axis.get_lines()) > 1:
            axis.legend(fontsize=8)
    temporary = path.with_name(path.name + ".tmp.png")
    figure.savefig(temporary, dpi=80)
    pyplot.close(figure)
    os.replace(temporary, path)
