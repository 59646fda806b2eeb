"""What an export carries beside the weights, so that the model is asked as it was trained: chat template, end tokens, RoPE."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_longpo.checkpoint.assets import add_end_tokens, end_tokens_of, set_template, template_hash, template_of
from megatron_longpo.checkpoint.card import read_record
from megatron_longpo.model.shape import ModelShape
from megatron_longpo.text.chat import BUILT_IN_TEMPLATES

_SHOWN_HASH = 12
# How the training data's conversations were rendered, for whoever serves the model.
CHAT_SETTINGS = "chat_settings.json"
_ARGUMENTS = ("chat_template_kwargs", "system_prompt", "template_date")


def carry_training(checkpoint: Path, folder: Path) -> list[str]:
    """Give an exported folder the chat template that the training data were made with, and the tokens that end its answers.

    Args:
        checkpoint: folder of the checkpoint.
        folder: the exported folder with its tokenizer and configuration.

    Returns:
        What was done, a line each; none for a checkpoint that was only converted.

    Raises:
        CheckpointError: a file cannot be read.
    """
    record = read_record(checkpoint)
    if record is None:
        return []
    data = record["data"]
    lines = _carry_template(data, folder)
    before = end_tokens_of(folder)
    after = add_end_tokens(folder, data.get("answer_end_ids") or [])
    if after != before:
        lines.append(
            f"end tokens {after}: those of the training data's answers were added to the model's {before or 'none'}"
        )
    return [*lines, *_carry_arguments(data, folder)]


def _carry_arguments(data: dict[str, Any], folder: Path) -> list[str]:
    """Write what a template does not hold by itself: its arguments, the system message, the date."""
    if data.get("template_hash") is None:
        return []
    content = {key: data.get(key) for key in ("template_hash", *_ARGUMENTS, "answer_end_ids", "special_tokens")}
    (folder / CHAT_SETTINGS).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    given = [f"{key} {json.dumps(data[key], ensure_ascii=False)}" for key in _ARGUMENTS if data.get(key)]
    return [f"ask the model as it was trained ({CHAT_SETTINGS}): {', '.join(given)}"] if given else []


def _carry_template(data: dict[str, Any], folder: Path) -> list[str]:
    wanted, own = data.get("template_hash"), template_of(folder)
    if wanted is None or (own is not None and template_hash(own) == wanted):
        return []
    template = data.get("chat_template") or _built_in(wanted)
    if template is None:
        return [
            f"the training data's chat template ({wanted[:_SHOWN_HASH]}) is not in the run's record, which an earlier version "
            "wrote; the export has the base model's own, so set the template yourself"
        ]
    set_template(folder, template)
    instead = f", in place of the base model's ({template_hash(own)[:_SHOWN_HASH]})" if own else ""
    return [f"the training data's chat template ({wanted[:_SHOWN_HASH]}) goes along{instead}"]


def _built_in(wanted: str) -> str | None:
    """A built-in template by its hash; manifests of version 0.1 have no more."""
    return next((t for t in BUILT_IN_TEMPLATES.values() if template_hash(t) == wanted), None)


def describe(folder: Path, shape: ModelShape, dtype: str, left_out: Sequence[str]) -> list[str]:
    """What an exported folder carries, and which files of the imported model it does not, a line each.

    Args:
        folder: the exported folder.
        shape: shape of the exported model.
        dtype: dtype of its weights.
        left_out: names of files that stay behind.
    """
    template = template_of(folder)
    scaling = dict(shape.rope_scaling or {"rope_type": "default"})
    kind = scaling.pop("rope_type")
    numbers = "".join(f", {name} {value}" for name, value in scaling.items())
    window = f", sliding window {shape.window_size}" if shape.window_size else ""
    base = (shape.base_model or "unknown") + (f" at {shape.base_revision}" if shape.base_revision else "")
    tokenizer = [name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).is_file()]
    lines = [
        f"carries {dtype} weights, RoPE theta {shape.rotary_base:g} ({kind}{numbers}), context "
        f"{shape.max_position_embeddings}{window}, {' and '.join(tokenizer) or 'no tokenizer'}, "
        f"{f'chat template {template_hash(template)[:_SHOWN_HASH]}' if template else 'no chat template'}, end tokens "
        f"{end_tokens_of(folder) or 'none'}; base model {base}"
    ]
    return [*lines, f"left out: {', '.join(left_out)}"] if left_out else lines
