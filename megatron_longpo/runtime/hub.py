"""Models named by their place on a hub, ``org/name`` or ``org/name@revision``, downloaded into the hub's cache.

Only what a model is made of is downloaded: no code, no pickles where there are safetensors, no other formats.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from megatron_longpo.errors import CheckpointError, one_line
from megatron_longpo.runtime.log import log

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_PICKLES = ("pytorch_model*.bin", "pytorch_model*.bin.index.json")
_COMPANIONS = ("*.json", "*.jinja", "tokenizer.model", "*.tiktoken", "merges.txt", "vocab.txt", "README.md", "LICENSE*")
# Weights in subfolders, and in Mistral's own form, are other copies of the model.
_LEFT_OUT = ("*/*.safetensors", "*/*.json", "*/*.bin", "consolidated*", "adapter_model*", "*.py")
_TEMPLATES = "additional_chat_templates/*.jinja"


def is_hub_name(text: str) -> bool:
    """Whether a text names a model on a hub: it looks like one, and there is no such path."""
    return _NAME.fullmatch(text) is not None and not os.path.exists(text)


def model_folder(text: str, revision: str | None = None) -> Path:
    """The folder of a model: a path as it is, or the snapshot of a hub's model, which is downloaded if it is not in the cache.

    Args:
        text: a path, ``org/name`` or ``org/name@revision``.
        revision: branch, tag or commit, instead of the one in ``text``.

    Raises:
        CheckpointError: the hub cannot be reached, has no such model or revision, or asks for a token.
    """
    if not is_hub_name(text):
        if revision is not None:
            raise CheckpointError(
                f"--revision {revision} belongs to a model of a hub, but {text} is not named like one; write org/name, or leave "
                "--revision out"
            )
        return Path(text)
    name, _, written = text.partition("@")
    if written and revision is not None and written != revision:
        raise CheckpointError(f"{text}: --revision {revision} names another revision; give one of them")
    revision = revision or written or None
    try:
        folder = _download(name, revision, [*_WEIGHTS, *_COMPANIONS, _TEMPLATES])
        if not any(folder.glob("*.safetensors")):
            folder = _download(name, revision, [*_PICKLES, *_COMPANIONS, _TEMPLATES])
    except Exception as error:  # its client and its transport have errors of their own
        raise CheckpointError(
            f"{text}: there is no such folder, and the hub does not give it ({type(error).__name__}: {one_line(error)}); name a "
            "folder, or reach the hub (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE)"
        ) from None
    log(f"{text}: {folder}", active=os.environ.get("RANK", "0") == "0")
    return folder


def _download(name: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=list(_LEFT_OUT)))
