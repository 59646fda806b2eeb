"""Chat template and end tokens of a model folder: read for checks, and set to those that the model was trained with.

As transformers reads them: ``chat_template.jinja`` goes before the entry of ``tokenizer_config.json``, and
``generation_config.json`` before ``config.json``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_longpo.errors import CheckpointError, one_line
from megatron_longpo.runtime.reading import read_bytes, read_json

TEMPLATE = "chat_template.jinja"
_TOKENIZER_CONFIG, _GENERATION_CONFIG = "tokenizer_config.json", "generation_config.json"
_MAX_BYTES = 2**24
# Marks a generation config that transformers derives from config.json again as soon as the two differ.
_DERIVED = "_from_model_config"


def template_of(folder: Path) -> str | None:
    """The chat template of a model folder; of several named ones, the default. None: it has none.

    Raises:
        CheckpointError: a file cannot be read.
    """
    path = folder / TEMPLATE
    if path.is_file():
        try:
            return read_bytes(path, _MAX_BYTES).decode("utf-8").replace("\r\n", "\n")
        except (OSError, ValueError) as error:
            raise _unreadable(path, error) from None
    template = _read(folder / _TOKENIZER_CONFIG).get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def template_hash(template: str) -> str:
    """What manifests identify a template by."""
    return hashlib.sha256(template.encode()).hexdigest()


def set_template(folder: Path, template: str) -> None:
    """Make a template the folder's own, where new readers and where old ones look for it; other named ones stay.

    Raises:
        CheckpointError: tokenizer_config.json cannot be read.
    """
    (folder / TEMPLATE).write_text(template, encoding="utf-8", newline="\n")
    path = folder / _TOKENIZER_CONFIG
    if not path.is_file():
        return
    content = _read(path)
    before = content.get("chat_template")
    if isinstance(before, list):
        others = [t for t in before if isinstance(t, dict) and t.get("name") != "default"]
        content["chat_template"] = [{"name": "default", "template": template}, *others]
    else:
        content["chat_template"] = template
    _write(path, content)


def end_tokens_of(folder: Path) -> list[int]:
    """Ids of the tokens that end an answer of a model, by its generation config or else its config.json."""
    path = folder / _GENERATION_CONFIG
    content = _read(path if path.is_file() else folder / "config.json")
    found = content.get("eos_token_id")
    found = found if isinstance(found, list) else [found]
    return [token for token in found if isinstance(token, int) and not isinstance(token, bool)]


def add_end_tokens(folder: Path, ids: Sequence[int]) -> list[int]:
    """Let a model's answers end at these tokens too.

    Args:
        folder: model folder with its config.json.
        ids: ids of the tokens.

    Returns:
        All its end tokens; those that it had come first.
    """
    before = end_tokens_of(folder)
    after = before + [token for token in ids if token not in before]
    if after == before:
        return before
    path = folder / _GENERATION_CONFIG
    if path.is_file():
        content = {key: value for key, value in _read(path).items() if key != _DERIVED}
    else:
        config = _read(folder / "config.json")
        content = {key: config[key] for key in ("bos_token_id", "pad_token_id") if config.get(key) is not None}
    content["eos_token_id"] = after[0] if len(after) == 1 else after
    _write(path, content)
    return after


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = read_json(path, _MAX_BYTES)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    return content if isinstance(content, dict) else {}


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be read ({one_line(error)}); download the model again")
