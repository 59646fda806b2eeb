"""The card of an exported model, README.md: what it was made of, how, and what was measured on the way."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml

from megatron_longpo.errors import CheckpointError
from megatron_longpo.model.shape import ModelShape

# Beside a training checkpoint's weights: what the card says of the run.
RECORD = "training.json"
RUN_CONFIG = "run.yaml"
_SHOWN = ("loss", "nll", "preference", "rewards/margins", "rewards/accuracies", "rewards/chosen", "rewards/rejected")


def training_record(
    *, step: int, train_iters: int, layout: str, manifest: dict[str, Any], records: list[dict[str, Any]]
) -> dict[str, Any]:
    """What a training checkpoint keeps for its card.

    Args:
        step, train_iters: optimizer steps done and of the whole run.
        layout: parallel layout.
        manifest: of the data, as plain values.
        records: of all steps, as in metrics.jsonl; the means of the first and the last tenth are kept.
    """
    tenth = max(1, len(records) // 10)
    ends = {"first": records[:tenth], "last": records[-tenth:]}
    means = {end: _means(part) for end, part in ends.items() if part}
    return {"step": step, "train_iters": train_iters, "layout": layout, "data": manifest, "metrics": means, "of": tenth}


def _means(records: list[dict[str, Any]]) -> dict[str, float]:
    """Means of all metrics, each over the records that have it."""
    values: dict[str, list[float]] = {}
    for record in records:
        for key, value in record.items():
            if isinstance(value, (int, float)):
                values.setdefault(key, []).append(value)
    return {key: sum(found) / len(found) for key, found in values.items()}


def write_card(checkpoint: Path, output: Path, shape: ModelShape, dtype: str) -> None:
    """Write OUTPUT/README.md of a trained checkpoint; a converted one keeps its model's own.

    The base model's own card, where it came along, becomes BASE_MODEL_README.md.

    Raises:
        CheckpointError: the training checkpoint's record cannot be read.
    """
    path = checkpoint / RECORD
    if not path.is_file():
        return
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        config = yaml.safe_load((checkpoint / RUN_CONFIG).read_text(encoding="utf-8"))
        text = card(shape, dtype, record, config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); remove it to export without a card") from None
    readme = output / "README.md"
    if readme.is_file():
        os.replace(readme, output / "BASE_MODEL_README.md")
    readme.write_text(text, encoding="utf-8")


def card(shape: ModelShape, dtype: str, record: dict[str, Any], config: dict[str, Any]) -> str:
    """Markdown with the front matter that model hubs read."""
    base = shape.base_model or "unknown"
    data, objective, training = record["data"], config["objective"], config["training"]
    front = {
        "base_model": base,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["long-context", "preference-optimization", objective["objective"]],
    }
    scaling = shape.rope_scaling or {"rope_type": "default"}
    rows = [
        ("base model", base),
        ("objective", _objective(objective)),
        ("steps", f"{record['step']} of {record['train_iters']}, {training['global_batch_size']} samples each"),
        ("learning rate", f"{config['optimizer']['lr']:g}, {config['optimizer']['lr_decay_style']}"),
        ("precision in training", "bf16 with fp32 gradients and master weights" if training["bf16"] else "fp32"),
        ("layout", record["layout"]),
        ("RoPE", f"theta {shape.rotary_base:g}, " + ", ".join(f"{k} {v}" for k, v in scaling.items())),
        ("context", f"{shape.max_position_embeddings} tokens claimed; longest row trained on {data['longest']}"),
        ("weights", dtype),
    ]
    counted = [
        ("samples", data["samples"]),
        ("pairs (turns)", data["turns"]),
        ("tokens", data["tokens"]),
        ("kept aside", ", ".join(f"{n} {reason}" for reason, n in data["rejected"].items()) or "none"),
        ("turns", config["data"]["turns"]),
        ("tokenizer", data["tokenizer"] or "came tokenised"),
        ("sha256 of the binary", f"`{data['bin_sha256']}`"),
    ]
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).rstrip(),
        "---",
        "",
        f"# {base}, trained on longer context",
        "",
    ]
    lines += [
        "The model was trained on pairs of its own answers: the better one was given on a part of a document, the other on all "
        "of it (LongPO, arXiv 2502.13922).",
        "",
    ]
    lines += ["## Training", "", *_table(("", ""), rows), ""]
    lines += ["## Data", "", *_table(("", ""), counted), ""]
    if record["metrics"]:
        first, last = record["metrics"]["first"], record["metrics"]["last"]
        n = record["of"]
        shown = [(k, f"{first[k]:.4f}", f"{last[k]:.4f}") for k in _SHOWN if k in first and k in last]
        lines += [
            "## Figures of the training",
            "",
            *_table(("mean over", f"first {n} steps", f"last {n} steps"), shown),
            "",
        ]
    text = yaml.safe_dump(config, sort_keys=False).rstrip()
    lines += ["## Configuration", "", "```yaml", text, "```"]
    return "\n".join(lines) + "\n"


def _objective(o: dict[str, Any]) -> str:
    if o["objective"] == "sft":
        return f"sft, NLL over the {o['nll_scope']}"
    text = f"{o['objective']}, beta {o['beta']:g}, {o['loss_type']}"
    if o["objective"] == "longpo":
        text += f", preference weight {o['preference_weight']:g}, NLL over the {o['nll_scope']}"
    return text


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(str(x).replace("|", "\\|") for x in row) + " |" for row in rows]
