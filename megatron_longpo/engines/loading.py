"""Loads models by transformers, and says in one line what is wrong with a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from megatron_longpo.errors import DataError, one_line
from megatron_longpo.runtime import platform

Loaded = TypeVar("Loaded")


def load_model(path: Path, dtype: str) -> Any:
    """A causal language model, on the platform's device and ready to answer.

    Args:
        path: model folder, which has passed ``check_model_folder``.
        dtype: ``auto``, which keeps the stored one, or a torch dtype's name.

    Raises:
        DataError: transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM

    kind: Any = "auto" if dtype == "auto" else getattr(torch, dtype)
    # Without the argument transformers would ask on a terminal, and take a "y" from standard input for consent.
    model = load_or_refuse(
        path,
        lambda: AutoModelForCausalLM.from_pretrained(
            str(path), dtype=kind, local_files_only=True, trust_remote_code=False
        ),
    )
    model.eval()
    model.to(platform.CURRENT.device)
    return model


def load_or_refuse(path: Path, load: Callable[[], Loaded]) -> Loaded:
    """What ``load`` loads from a folder.

    Raises:
        DataError: it cannot be loaded.
    """
    try:
        return load()
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # Whatever is wrong with a folder comes up somewhere in transformers, torch or safetensors.
        raise DataError(
            f"--model {path}: transformers cannot load it ({type(error).__name__}: {one_line(error)}); give a model folder"
        ) from None
