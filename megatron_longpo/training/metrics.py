"""What a step reports: exact reduction over ranks, metrics.jsonl, TensorBoard, W&B, the progress line, curves.png."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist

from megatron_longpo.config import LoggingConfig
from megatron_longpo.runtime import platform
from megatron_longpo.runtime.process_groups import Parallel

# Per-sample metrics that the last pipeline stage reports, in the order of their columns.
SAMPLE_COLUMNS = (
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


def reduce_samples(
    sample_metrics: dict[int, list[float]], batch_size: int, parallel: Parallel, *, has_metrics: bool
) -> dict[str, float]:
    """Means over the global batch (``tokens``: the sum), the same on every rank and for every layout.

    Each sample's metrics are put at its place in the batch and summed over ranks with zeros, so that the mean is always
    taken in one order.

    Args:
        sample_metrics: place in the batch -> SAMPLE_COLUMNS, for the samples of this data-parallel rank.
        batch_size: samples of the global batch.
        parallel: groups.
        has_metrics: whether this rank is one of the last stages, which know them.
    """
    table = gather_samples(sample_metrics, batch_size, len(SAMPLE_COLUMNS), parallel, has_metrics=has_metrics)
    means = table.mean(0).tolist()
    result = dict(zip(SAMPLE_COLUMNS, means, strict=True))
    result["tokens"] = float(table[:, SAMPLE_COLUMNS.index("tokens")].sum())
    return result


def gather_samples(
    sample_metrics: dict[int, list[float]], batch_size: int, columns: int, parallel: Parallel, *, has_metrics: bool
) -> torch.Tensor:
    """Metrics of a whole batch, [batch_size, columns] in fp64, on every rank; see ``reduce_samples``."""
    table = torch.zeros(batch_size, columns, dtype=torch.float64, device=platform.CURRENT.device)
    if has_metrics:
        for place, row in sample_metrics.items():
            table[place] = torch.tensor(row, dtype=torch.float64, device=table.device)
        dist.all_reduce(table, group=parallel.data_group)
    if parallel.pipeline_size > 1:
        dist.broadcast(table, src=parallel.last_stage_rank, group=parallel.pipeline_group)
    return table


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a metrics.jsonl; a line that a killed run left half-written is passed over."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records


def keep_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop what a killed run logged after the checkpoint it resumes from, so that no step is there twice."""
    records = [r for r in read_metrics(path) if r["step"] <= step]
    if path.exists():
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
        os.replace(temporary, path)
    return records


@dataclass
class _Clock:
    start: float
    first_step: int


class Reporter:
    """Writes a run's metrics; does nothing on any rank but the first.

    Args:
        output: the run's folder, or None to write nothing but the progress line.
        train_iters: steps of the whole run, for the time left.
        resumed_step: steps done before; later lines of an old metrics.jsonl are dropped.
        config: what to write.
        run_config: the resolved configuration, for W&B.
        active: whether this rank reports.
    """

    def __init__(
        self,
        output: Path | None,
        *,
        train_iters: int,
        resumed_step: int,
        config: LoggingConfig,
        run_config: dict[str, Any],
        active: bool,
    ) -> None:
        self.output, self.train_iters, self.config, self.active = output, train_iters, config, active
        self.records: list[dict[str, Any]] = []
        self.validations: list[dict[str, Any]] = []
        self._stream: TextIO | None = None
        self._tensorboard: Any = None
        self._wandb: Any = None
        self._clock = _Clock(time.monotonic(), resumed_step)
        if not active or output is None:
            return
        output.mkdir(parents=True, exist_ok=True)
        path = output / "metrics.jsonl"
        self.records = keep_until(path, resumed_step)
        self.validations = keep_until(output / "validation.jsonl", resumed_step or -1)
        self._stream = open(path, "a", encoding="utf-8")  # noqa: SIM115
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(output / "tensorboard"), purge_step=resumed_step + 1)
        if config.wandb_project:
            import wandb

            self._wandb = wandb.init(
                project=config.wandb_project,
                name=config.wandb_exp_name,
                config=run_config,
                dir=str(output),
                resume="allow",
            )

    def step(self, record: dict[str, Any]) -> None:
        """Report one step."""
        if not self.active:
            return
        self.records.append(record)
        if self._stream is not None:
            self._stream.write(json.dumps(record) + "\n")
            self._stream.flush()
        if self._tensorboard is not None:
            for name, value in record.items():
                if name != "step":
                    self._tensorboard.add_scalar(name, value, record["step"])
        if self._wandb is not None:
            self._wandb.log(record, step=record["step"])
        if record["step"] % self.config.log_interval == 0 or record["step"] == self.train_iters:
            print(self._line(record), flush=True)
        if self.output is not None and record["step"] % self.config.plot_interval == 0:
            self.plot()

    def validation(self, record: dict[str, Any]) -> None:
        """Report one evaluation of held-out data."""
        if not self.active:
            return
        self.validations.append(record)
        flat = {f"valid/{k}": v for k, v in record.items() if k not in ("step", "by_length")}
        if self.output is not None:
            with open(self.output / "validation.jsonl", "a", encoding="utf-8") as stream:
                stream.write(json.dumps(record) + "\n")
        if self._tensorboard is not None:
            for name, value in flat.items():
                self._tensorboard.add_scalar(name, value, record["step"])
        if self._wandb is not None:
            self._wandb.log(flat, step=record["step"])
        print(f"after step {record['step']}: {validation_line(record)}", flush=True)
        self.plot()

    def _line(self, r: dict[str, Any]) -> str:
        done = r["step"] - self._clock.first_step
        left = (time.monotonic() - self._clock.start) / max(1, done) * (self.train_iters - r["step"])
        width = len(str(self.train_iters))
        return (
            f"step {r['step']:>{width}}/{self.train_iters} | loss {r['loss']:.4f} | nll {r['nll']:.4f} | margin "
            f"{r['rewards/margins']:+.4f} | acc {r['rewards/accuracies']:.2f} | grad norm {r['grad_norm']:.3f} | lr "
            f"{r['lr']:.2e} | {r['tokens_per_second']:,.0f} tokens/s | {_duration(left)} left"
        )

    def plot(self) -> None:
        """Draw OUTPUT/curves.png."""
        if self.active and self.output is not None and self.records:
            draw_curves(self.records, self.output / "curves.png", self.validations)

    def close(self) -> None:
        self.plot()
        if self._stream is not None:
            self._stream.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def validation_line(r: dict[str, Any]) -> str:
    """Held-out metrics for people."""
    parts = [f"held-out loss {r['loss']:.4f}", f"nll {r['nll']:.4f}"]
    if "rewards/margins" in r:
        parts += [f"margin {r['rewards/margins']:+.4f}", f"acc {r['rewards/accuracies']:.2f}"]
        parts += [f"kl {r['kl/rejected']:+.4f} (chosen {r['kl/chosen']:+.4f}) a token"]
    return " | ".join([*parts, f"{r['samples']} samples"])


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds_ = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{seconds_:02d}" if hours else f"{minutes}:{seconds_:02d}"


def draw_curves(records: list[dict[str, Any]], path: Path, validations: list[dict[str, Any]] | None = None) -> None:
    """Loss, log-probs, rewards, accuracy, gradient norm and speed against steps, as one PNG; held-out metrics as crosses."""
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
