"""The Hugging Face folder that is imported: whether it is one plain model, and which model of which revision it is."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_longpo.errors import CheckpointError

_ADAPTER = "adapter_config.json"
# Key of config.json by which transformers 5 reads the weights from another file than usual.
_WEIGHTS_KEY = "transformers_weights"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CACHE_PREFIX, _SNAPSHOTS = "models--", "snapshots"
# Where `hf download --local-dir` records what it downloaded: the commit is a file's first line.
_DOWNLOADS = Path(".cache") / "huggingface" / "download"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_LINE = 100


@dataclass(frozen=True)
class ModelName:
    """Which model it is.

    Attributes:
        name: name on a hub, or the folder's.
        revision: commit, branch or tag on the hub; None if the folder does not tell.
    """

    name: str
    revision: str | None = None


def check_plain(folder: Path, config: dict[str, Any]) -> None:
    """Check that a folder's weights are the whole model, so that every loader makes the same of it.

    Args:
        folder: model folder.
        config: its config.json.

    Raises:
        CheckpointError: it is an adapter, holds one beside a model, or its config.json names a file of weights.
    """
    if (folder / _ADAPTER).is_file():
        raise _adapter_error(folder)
    if config.get(_WEIGHTS_KEY) is not None:
        raise CheckpointError(
            f"{folder / 'config.json'}: {_WEIGHTS_KEY}={config[_WEIGHTS_KEY]!r} names a file of weights of its own, which only "
            "transformers 5 reads; save the model again with save_pretrained"
        )


def _adapter_error(folder: Path) -> CheckpointError:
    base: Any = None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        base = json.loads((folder / _ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    of = f" of {base}" if isinstance(base, str) and len(base) < 200 else ""
    if any(folder.glob("model*.safetensors")) or any(folder.glob("pytorch_model*.bin")):
        return CheckpointError(
            f"{folder / _ADAPTER}: an adapter{of} lies beside a whole model, and transformers would load either, depending on "
            "whether peft is installed; if the model was merged already, remove adapter_config.json and the adapter's weights, "
            "else merge it first (PEFT's merge_and_unload)"
        )
    return CheckpointError(
        f"{folder / _ADAPTER}: the folder is an adapter{of}, not a model; merge it first (PEFT's merge_and_unload) and import "
        "the result"
    )


def name_of(folder: Path, config: dict[str, Any]) -> ModelName:
    """Name and revision of a model: as its place in a hub's cache says, else its config.json, else the folder's name.

    Args:
        folder: model folder.
        config: its config.json.
    """
    resolved = folder.resolve()
    snapshots = resolved.parent
    if snapshots.name == _SNAPSHOTS and snapshots.parent.name.startswith(_CACHE_PREFIX):
        name = snapshots.parent.name.removeprefix(_CACHE_PREFIX).replace("--", "/")
        return ModelName(name, resolved.name)
    written = config.get("_name_or_path")
    # A path on somebody's disk says no more than the folder's name.
    is_hub_name = isinstance(written, str) and _HUB_NAME.fullmatch(written) is not None
    return ModelName(str(written) if is_hub_name else resolved.name, _downloaded_revision(resolved))


def _downloaded_revision(folder: Path) -> str | None:
    """The commit of a folder that was downloaded as a whole, if all files are of the same."""
    commits = set()
    for path in (folder / _DOWNLOADS).glob("*.metadata"):
        try:
            with open(path, encoding="utf-8") as stream:
                commits.add(stream.readline(_MAX_LINE).strip())
        except (OSError, UnicodeDecodeError):
            return None
    return commits.pop() if len(commits) == 1 and all(map(_COMMIT.fullmatch, commits)) else None
