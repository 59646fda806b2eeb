"""Held-out preference pairs: evaluate them, and summarise the metrics over all samples and by length.

The short-to-long constraint of LongPO bounds KL[pi_theta(y | x_L) || pi_S(y | x_S)] (arXiv 2502.13922, Section 3). Two
estimates per token, each from answers that one side gave:

    kl/rejected = (log pi_theta(y_L | x_L) - log pi_S(y_L | x_S)) / |y_L|
        the direction of the constraint; y_L came from the policy that training began with
    kl/chosen = (log pi_S(y_S | x_S) - log pi_theta(y_S | x_L)) / |y_S|
        the other direction, on the reference's own answers

They are unbiased if the answers were drawn at temperature 1 from the side named first. In any case they are comparable before
and after training, since the answers are the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_longpo.model.gpt import PolicyModel
from megatron_longpo.runtime.files import write_atomically
from megatron_longpo.runtime.process_groups import Parallel
from megatron_longpo.runtime.progress import Progress
from megatron_longpo.training.batch_runner import BatchRunner
from megatron_longpo.training.data_set import DataSet
from megatron_longpo.training.metrics import REPORTED, SAMPLE_METRICS, gather_samples, names_reported
from megatron_longpo.training.plan import RunPlan
from megatron_longpo.training.reference import Reference

VERSION = 1

# Metrics of a held-out sample: those of training, and the lengths of its responses in tokens.
METRICS = (*SAMPLE_METRICS, "response_tokens/chosen", "response_tokens/rejected")

# Files keep the metrics of a sample as a list of numbers, in this order. It belongs to the format: only append to it.
_ORDER_IN_FILES = (
    *("loss", "nll", "preference", "logps/chosen", "logps/rejected", "ref/chosen", "ref/rejected"),
    *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "tokens"),
    *("response_tokens/chosen", "response_tokens/rejected"),
)

# Metrics by name, each [samples].
Table = dict[str, np.ndarray]


class HeldOut:
    """Evaluates the held-out data with the policy as it is; needs no optimizer.

    Args:
        plan: plan of the run.
        parallel: degrees and groups.
        data: the held-out data, or None: nothing is evaluated.
        chunks: the policy's model chunks.
        runner: runs global batches through them.
        reference: the prepared reference.
    """

    def __init__(
        self,
        plan: RunPlan,
        parallel: Parallel,
        *,
        data: DataSet | None,
        chunks: Sequence[PolicyModel],
        runner: BatchRunner,
        reference: Reference,
    ) -> None:
        self.plan, self.parallel = plan, parallel
        self.data, self.chunks, self.runner, self.reference = data, chunks, runner, reference

    def should_evaluate(self, step: int) -> bool:
        """Whether the held-out data are to be evaluated after this step: before the first, every eval_interval, and at the
        end."""
        if self.data is None:
            return False
        interval = self.plan.config.training.eval_interval
        return step in (0, self.plan.train_iters) or (interval is not None and step % interval == 0)

    def evaluate(
        self,
        kept: Mapping[int, Mapping[str, float]] | None = None,
        keep: Callable[[Sequence[int], Table], None] | None = None,
    ) -> Table:
        """Metrics of the held-out samples, identical on every rank and for every layout; collective.

        The weights do not change.

        Args:
            kept: metrics from an interrupted run, keyed by sample number and identical on all ranks; these samples are
                skipped.
            keep: called after each batch with the numbers of its samples and their metrics.

        Returns:
            The metrics of METRICS by name, each [samples].
        """
        data, kept, training = self.data, kept or {}, self.plan.config.training
        assert data is not None, "there is no held-out data"
        size = training.global_batch_size
        count = len(data) if training.eval_iters is None else min(len(data), training.eval_iters * size)
        table = {name: np.zeros(count) for name in METRICS}
        for number, metrics in kept.items():
            if number < count:
                for name in METRICS:
                    table[name][number] = metrics[name]
        left = [number for number in range(count) if number not in kept]
        with Progress(
            "validation",
            count,
            done=count - len(left),
            unit="samples",
            active=self.parallel.rank == 0,
            last_line=False,
        ) as progress:
            for start in range(0, len(left), size):
                numbers = left[start : start + size]
                found = self._evaluate_batch(data, numbers)
                for name, values in found.items():
                    table[name][numbers] = values
                if keep is not None:
                    keep(numbers, found)
                progress.add(len(numbers), tokens=int(found["tokens"].sum()))
        return table

    def _evaluate_batch(self, data: DataSet, numbers: list[int]) -> Table:
        reference = self.reference.logps(data, numbers)
        batches = self.runner.lay_out(data, numbers, reference)
        found = self.runner.forward_backward(self.chunks, batches, count=len(numbers), forward_only=True)
        gathered = gather_samples(found, METRICS, len(numbers), self.parallel)
        return {name: values.cpu().numpy() for name, values in gathered.items()}

    def summary(self) -> dict[str, Any]:
        """Evaluate, and summarise; collective."""
        return summary(self.evaluate(), names_reported(self.plan.objective))


def metrics_of(table: Table) -> Table:
    """The reported metrics of each sample, and its ``tokens``.

    Args:
        table: what ``HeldOut.evaluate`` returns.
    """
    chosen = np.maximum(table["response_tokens/chosen"], 1)
    rejected = np.maximum(table["response_tokens/rejected"], 1)
    metrics = {
        **table,
        "kl/chosen": (table["ref/chosen"] - table["logps/chosen"]) / chosen,
        "kl/rejected": (table["logps/rejected"] - table["ref/rejected"]) / rejected,
    }
    return {name: metrics[name] for name in (*REPORTED, "tokens")}


def length_bin(tokens: float) -> int:
    """Smallest power of two that is at least ``tokens``."""
    return 1 << max(0, int(tokens) - 1).bit_length()


def summary(table: Table, names: Sequence[str] = REPORTED) -> dict[str, Any]:
    """Means over all samples and, under ``by_length``, over the samples of each power-of-two bin of the chosen row's length.

    Args:
        table: what ``HeldOut.evaluate`` returns.
        names: metrics that are reported.
    """
    metrics = metrics_of(table)
    bins = np.array([length_bin(n) for n in metrics["tokens"]])

    def means(chosen: np.ndarray) -> dict[str, float]:
        return {name: float(metrics[name][chosen].mean()) for name in names}

    everything = np.ones(len(bins), dtype=bool)
    return {
        "samples": len(bins),
        **means(everything),
        "by_length": {
            str(b): {"samples": int((bins == b).sum()), **means(bins == b)} for b in sorted(set(bins.tolist()))
        },
    }


def kept_rows(numbers: Sequence[int], table: Table) -> list[dict[str, Any]]:
    """Rows that keep the metrics of samples, so that an interrupted run need not compute them again.

    Args:
        numbers: numbers of the samples.
        table: their metrics.
    """
    return [
        {
            "key": f"preference/pair/0/{n}",
            "index": n,
            "score": float(table["loss"][i]),
            "figures": [float(table[name][i]) for name in _ORDER_IN_FILES],
        }
        for i, n in enumerate(numbers)
    ]


def kept_metrics(rows: Iterable[dict[str, Any]]) -> dict[int, dict[str, float]]:
    """Metrics by sample number from what ``kept_rows`` made; rows of another format are skipped."""

    def read() -> Iterator[tuple[int, dict[str, float]]]:
        for row in rows:
            if len(row.get("figures", ())) == len(_ORDER_IN_FILES):
                yield row["index"], dict(zip(_ORDER_IN_FILES, row["figures"], strict=True))

    return dict(read())


def write_rows(table: Table, path: Path, pairs: str) -> None:
    """Write one row per sample and reported metric, in the format in which the other suites keep their answers.

    Args:
        table: metrics of all samples.
        path: path of the JSONL file.
        pairs: hash of the data, by which comparisons recognise the same samples.
    """
    metrics = metrics_of(table)
    rows = [
        {
            "key": f"preference/{name}/0/{i}",
            "task": name,
            "length": 0,
            "index": i,
            "score": float(metrics[name][i]),
            "digest": f"{pairs[:12]}/{i}",
            "tokens": int(metrics["tokens"][i]),
        }
        for name in REPORTED
        for i in range(len(metrics["tokens"]))
    ]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
