"""The card of an exported model, README.md: what it was trained on, how, and what was measured during training."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_longpo.config import data_sources
from megatron_longpo.errors import CheckpointError, one_line
from megatron_longpo.model.shape import ModelShape
from megatron_longpo.runtime.reading import read_json
from megatron_longpo.runtime.tables import markdown_table

# The card of an exported model.
CARD = "README.md"
# Files of a training checkpoint beside its weights.
RECORD = "training.json"
RUN_CONFIG = "run.yaml"

_SHOWN_METRICS = (
    "loss",
    "nll",
    "preference",
    "rewards/margins",
    "rewards/accuracies",
    "rewards/chosen",
    "rewards/rejected",
)
# The metrics of the first and of the last 1/_NUM_PARTS of the steps are averaged.
_NUM_PARTS = 10
_SUMMARIES = {
    "longpo": "Trained with LongPO ([arXiv 2502.13922](https://arxiv.org/abs/2502.13922)) on pairs of answers to instructions "
    "about long documents. The chosen answer was written from the relevant chunk of the document, the rejected one from the "
    "whole document.",
    "dpo": "Trained with DPO ([arXiv 2305.18290](https://arxiv.org/abs/2305.18290)) on pairs of answers to instructions about "
    "long documents.",
    "solopo": "Trained with SoLoPO ([arXiv 2505.11166](https://arxiv.org/abs/2505.11166)) on pairs of answers to instructions "
    "about chunks of long documents, with equal rewards of the chosen answer on chunk and document.",
    "sft": "Fine-tuned on the chosen answers to instructions about long documents.",
}


# Terms of the loss, which the records of version 0.1 do not have.
_TERMS_OF_0_1 = {
    "longpo": {"uses_preference": True, "uses_nll": True},
    "dpo": {"uses_preference": True, "uses_nll": False},
    "sft": {"uses_preference": False, "uses_nll": True},
}


def training_record(
    *,
    step: int,
    train_iters: int,
    layout: str,
    manifest: dict[str, Any],
    records: list[dict[str, Any]],
    terms: dict[str, bool] | None = None,
) -> dict[str, Any]:
    """What a training checkpoint stores for the model card.

    Args:
        step: optimizer steps done.
        train_iters: optimizer steps of the whole run.
        layout: parallel layout.
        manifest: manifest of the data, as plain values.
        records: metrics of all steps, as in metrics.jsonl; the means over the first and the last tenth are kept.
        terms: whether the loss has a preference term (``uses_preference``) and an NLL (``uses_nll``), and whether the preference
            is that of the short rows (``prefers_short``).
    """
    num_steps = max(1, len(records) // _NUM_PARTS)
    ends = {"first": records[:num_steps], "last": records[-num_steps:]}
    return {
        "step": step,
        "train_iters": train_iters,
        "layout": layout,
        "data": manifest,
        "metrics": {end: _means(part) for end, part in ends.items() if part},
        "of": num_steps,
        **({} if terms is None else {"terms": terms}),
    }


def _means(records: list[dict[str, Any]]) -> dict[str, float]:
    """Means of all metrics, each over the records that have it; fingerprints and counts have none."""
    values: dict[str, list[float]] = {}
    for record in records:
        for key, value in record.items():
            if isinstance(value, (int, float)) and key != "skipped" and not key.startswith("fingerprint/"):
                values.setdefault(key, []).append(value)
    return {key: sum(found) / len(found) for key, found in values.items()}


def read_record(checkpoint: Path) -> dict[str, Any] | None:
    """What ``training_record`` gave a training checkpoint; None for a checkpoint that was only converted.

    Raises:
        CheckpointError: it cannot be read.
    """
    path = checkpoint / RECORD
    if not path.is_file():
        return None
    try:
        record = read_json(path)
        data = record["data"]
        for name in ("chat_template", "template_hash"):
            if not isinstance(data.get(name), str | None):
                raise ValueError(f"{name} is no text")
        ends = data.get("answer_end_ids") or []
        if not isinstance(ends, list) or not all(type(i) is int for i in ends):
            raise ValueError("answer_end_ids are no token ids")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({one_line(error)}); remove the file to export without a card"
        ) from None
    return record


def write_card(checkpoint: Path, output: Path, shape: ModelShape, dtype: str) -> None:
    """Write OUTPUT/README.md for a trained checkpoint. A checkpoint that was only converted keeps its model's own.

    The base model's card, if it has one, becomes BASE_MODEL_README.md.

    Args:
        checkpoint: folder of the checkpoint.
        output: folder of the exported model.
        shape: shape of the exported model.
        dtype: dtype of the exported weights.

    Raises:
        CheckpointError: the record of the training checkpoint cannot be read.
    """
    record = read_record(checkpoint)
    if record is None:
        return
    path = checkpoint / RECORD
    try:
        config = yaml.safe_load((checkpoint / RUN_CONFIG).read_text(encoding="utf-8"))
        text = card(shape, dtype, record, config)
    except (
        *(OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError),
        *(yaml.YAMLError, RecursionError),
    ) as error:
        raise CheckpointError(
            f"{path}: cannot be read, or does not fit {RUN_CONFIG} ({one_line(error)}); remove the file to export without a card"
        ) from None
    readme = output / CARD
    if readme.is_file():
        os.replace(readme, output / "BASE_MODEL_README.md")
    readme.write_text(text, encoding="utf-8")


def card(shape: ModelShape, dtype: str, record: dict[str, Any], config: dict[str, Any]) -> str:
    """The card in Markdown, with the front matter that model hubs read.

    Args:
        shape: shape of the exported model.
        dtype: dtype of the exported weights.
        record: what ``training_record`` returned.
        config: resolved configuration of the run, as plain values.
    """
    base, objective = shape.base_model or "unknown", config["objective"]["objective"]
    front_matter = {
        "base_model": base,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["long-context", "preference-optimization", objective],
    }
    lines = ["---", yaml.safe_dump(front_matter, sort_keys=False).rstrip(), "---", ""]
    lines += [f"# {base}, trained on longer context", "", _SUMMARIES[objective], ""]
    lines += ["## Training", "", *_settings_table(_training(shape, dtype, record, config)), ""]
    lines += ["## Data", "", *_settings_table(_data(record["data"], config)), ""]
    if record["metrics"]:
        lines += ["## Training metrics", "", *_metrics_table(record), ""]
    lines += ["## Configuration", "", "```yaml", yaml.safe_dump(config, sort_keys=False).rstrip(), "```"]
    return "\n".join(lines) + "\n"


def _training(
    shape: ModelShape, dtype: str, record: dict[str, Any], config: dict[str, Any]
) -> list[tuple[str, object]]:
    optimizer, training, kind = config["optimizer"], config["training"], config["objective"]["objective"]
    scaling = shape.rope_scaling or {"rope_type": "default"}
    return [
        ("base model", (shape.base_model or "unknown") + (f" at {shape.base_revision}" if shape.base_revision else "")),
        ("objective", _objective(config["objective"], record.get("terms") or _TERMS_OF_0_1[kind])),
        ("optimizer steps", f"{record['step']} of {record['train_iters']}"),
        ("global batch size", f"{training['global_batch_size']} samples"),
        ("learning rate", f"{optimizer['lr']:g}, {optimizer['lr_decay_style']}"),
        ("training precision", "bf16 with fp32 gradients and master weights" if training["bf16"] else "fp32"),
        ("parallel layout", record["layout"]),
        ("RoPE", f"theta {shape.rotary_base:g}, " + ", ".join(f"{k} {v}" for k, v in scaling.items())),
        ("context length", f"{shape.max_position_embeddings} tokens"),
        ("longest training row", f"{record['data']['longest']} tokens"),
        ("dtype of the weights", dtype),
    ]


def _objective(objective: dict[str, Any], terms: dict[str, bool]) -> str:
    text = str(objective["objective"])
    if terms["uses_preference"]:
        text += f", beta {objective['beta']:g}, {objective['loss_type']}"
    if terms["uses_preference"] and terms["uses_nll"]:
        text += f", preference weight {objective['preference_weight']:g}"
    if terms["uses_nll"]:
        text += f", NLL over the {objective['nll_scope']}"
    # A run of an earlier commit has no such key.
    if objective.get("rpo_alpha"):
        text += f", {objective['rpo_alpha']:g} times the NLL per token of the chosen answers"
    if terms.get("prefers_short"):
        text += f", {objective['solo_alpha']:g} times the distance of rewards"
    return text


def _data(manifest: dict[str, Any], config: dict[str, Any]) -> list[tuple[str, object]]:
    # "rejected" is the key in files.
    skipped = ", ".join(f"{count} {reason}" for reason, count in manifest["rejected"].items())
    sources = data_sources(_words(config["data"].get("data_path")))
    several = len(sources) > 1
    names = [Path(s.prefix).name + (f" (weight {s.weight:g})" if s.weight is not None else "") for s in sources]
    return [
        *([("data sets", ", ".join(names))] if several else []),
        ("samples", manifest["samples"]),
        ("answer pairs", manifest["turns"]),
        ("tokens", manifest["tokens"]),
        ("skipped input", skipped or "none"),
        ("turns of a sample", config["data"]["turns"]),
        ("tokenizer", manifest["tokenizer"] or "none; the data came tokenised"),
        ("chat template", f"SHA-256 `{manifest['template_hash']}`" if manifest.get("template_hash") else "unknown"),
        ("system message", manifest.get("system_prompt") or "none"),
        ("template arguments", json.dumps(manifest.get("chat_template_kwargs") or {})),
        ("date in the template", manifest.get("template_date") or "none"),
        ("preprocessing", ", ".join(f"{k} {v}" for k, v in manifest.get("settings", {}).items()) or "no settings"),
        ("SHA-256 of the data" + (" sets' checksums" if several else ""), f"`{manifest['bin_sha256']}`"),
    ]


def _words(data_path: str | list[str] | None) -> str | tuple[str, ...]:
    """``data_path`` as data_sources takes it, from the YAML of a run."""
    return tuple(data_path) if isinstance(data_path, list) else str(data_path)


def _settings_table(rows: Sequence[tuple[str, object]]) -> list[str]:
    return markdown_table(("", ""), [(name, str(value)) for name, value in rows])


def _metrics_table(record: dict[str, Any]) -> list[str]:
    first, last, num_steps = record["metrics"]["first"], record["metrics"]["last"], record["of"]
    shown = [name for name in _SHOWN_METRICS if name in first and name in last]
    steps = "step" if num_steps == 1 else f"{num_steps} steps"
    head = ("mean over the", f"first {steps}", f"last {steps}")
    return markdown_table(head, [(name, f"{first[name]:.4f}", f"{last[name]:.4f}") for name in shown])
