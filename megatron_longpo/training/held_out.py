"""Held-out preference pairs: what is reported of them, over all and by length. Tables in, numbers out.

The short-to-long constraint of LongPO bounds KL[pi_theta(y | x_L) || pi_S(y | x_S)] (arXiv 2502.13922, Section 3). Two estimates
a token, each from answers that one side gave:

    kl/rejected = (log pi_theta(y_L | x_L) - log pi_S(y_L | x_S)) / |y_L|
        the constraint's direction; y_L came from the policy that training began with
    kl/chosen = (log pi_S(y_S | x_S) - log pi_theta(y_S | x_L)) / |y_S|
        the other direction, on the reference's own answers

They are unbiased where the answers were drawn at temperature 1 from the side that stands first, and comparable before and
after training in any case, since the answers are the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_longpo.runtime.files import write_atomically
from megatron_longpo.training.metrics import SAMPLE_COLUMNS

VERSION = 1

# Of the policy's layout, beside the metrics that training reports.
EXTRA_COLUMNS = ("response_tokens/chosen", "response_tokens/rejected")
COLUMNS = (*SAMPLE_COLUMNS, *EXTRA_COLUMNS)
# What is reported as a mean over samples.
REPORTED = (
    *("loss", "nll", "preference", "logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected"),
    *("rewards/margins", "rewards/accuracies", "kl/chosen", "kl/rejected"),
)


def metrics_of(table: np.ndarray) -> dict[str, np.ndarray]:
    """Each reported figure of each sample.

    Args:
        table: [samples, COLUMNS].
    """
    column = {name: table[:, i] for i, name in enumerate(COLUMNS)}
    chosen = np.maximum(column["response_tokens/chosen"], 1)
    rejected = np.maximum(column["response_tokens/rejected"], 1)
    column["kl/chosen"] = (column["ref/chosen"] - column["logps/chosen"]) / chosen
    column["kl/rejected"] = (column["logps/rejected"] - column["ref/rejected"]) / rejected
    return {name: column[name] for name in (*REPORTED, "tokens")}


def length_bin(tokens: float) -> int:
    """Smallest power of two that holds a row."""
    return 1 << max(0, int(tokens) - 1).bit_length()


def summary(table: np.ndarray, *, has_reference: bool = True) -> dict[str, Any]:
    """Means over all samples, and under ``by_length`` over those whose chosen row has at most so many tokens (and more than
    half of it).

    Args:
        table: [samples, COLUMNS].
        has_reference: whether there was one (not for sft, which has the NLL alone).
    """
    metrics = metrics_of(table)
    names = REPORTED if has_reference else ("loss", "nll", "logps/chosen")
    bins = np.array([length_bin(n) for n in metrics["tokens"]])

    def means(of: np.ndarray) -> dict[str, float]:
        return {name: float(metrics[name][of].mean()) for name in names}

    everything = np.ones(len(table), dtype=bool)
    return {
        "samples": len(table),
        **means(everything),
        "by_length": {
            str(b): {"samples": int((bins == b).sum()), **means(bins == b)} for b in sorted(set(bins.tolist()))
        },
    }


def kept_rows(numbers: Sequence[int], table: np.ndarray) -> list[dict[str, Any]]:
    """What is kept of samples as they come, so that a run that is broken off need not compute them again.

    Args:
        numbers: of the samples.
        table: [samples, COLUMNS].
    """
    return [
        {
            "key": f"preference/pair/0/{n}",
            "index": n,
            "score": float(row[COLUMNS.index("loss")]),
            "figures": row.tolist(),
        }
        for n, row in zip(numbers, table, strict=True)
    ]


def kept_metrics(rows: Iterable[dict[str, Any]]) -> dict[int, list[float]]:
    """Figures by number of what ``kept_rows`` made; rows of other columns are passed over."""
    return {row["index"]: row["figures"] for row in rows if len(row.get("figures", ())) == len(COLUMNS)}


def write_rows(table: np.ndarray, path: Path, pairs: str) -> None:
    """Figures of each sample as rows, as the other suites keep their answers.

    Args:
        table: [samples, COLUMNS].
        path: of the JSONL file.
        pairs: hash of the data, so that comparisons know the same samples.
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
        for i in range(len(table))
    ]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
