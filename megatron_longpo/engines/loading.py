"""Loads models by transformers, and says in one line what is wrong with a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from megatron_longpo.checkpoint.checksums import verified_if_listed
from megatron_longpo.checkpoint.huggingface import read_hf_config
from megatron_longpo.errors import DataError, one_line
from megatron_longpo.runtime import platform
from megatron_longpo.text.chat import ChatTokenizer

Loaded = TypeVar("Loaded")


def load_model(path: Path, dtype: str) -> Any:
    """A causal language model, on the platform's device and ready to answer.

    Args:
        path: model folder, which has passed ``check_model_folder``.
        dtype: ``auto``, which keeps the stored one, or a torch dtype's name.

    Raises:
        DataError: transformers cannot load it.
        DamagedError: a file is not as an export wrote it.
    """
    from transformers import AutoModelForCausalLM

    kind: Any = "auto" if dtype == "auto" else getattr(torch, dtype)
    # Without the argument transformers would ask on a terminal, and take a "y" from standard input for consent.
    with verified_if_listed(path):
        model = load_or_refuse(
            path,
            lambda: AutoModelForCausalLM.from_pretrained(
                str(path), dtype=kind, local_files_only=True, trust_remote_code=False
            ),
        )
    model.eval()
    model.to(platform.CURRENT.device)
    return model


def check_vocabulary(tokenizer: ChatTokenizer, path: Path) -> None:
    """Check that a model has an embedding for the tokens that its tokenizer makes: one beyond them would end a run in its middle.

    Special tokens that no conversation holds may be missing; some tokenizers have a padding token of their own.

    Args:
        tokenizer: the model's tokenizer.
        path: model folder.

    Raises:
        DataError: it has not.
    """
    rows = read_hf_config(path).get("vocab_size")
    if not isinstance(rows, int) or tokenizer.vocab_size <= rows:
        return
    used = {*tokenizer.prompt([{"role": "user", "content": "Where?"}]), *tokenizer.answer_ends()}
    beyond = set(range(rows, tokenizer.vocab_size))
    if beyond & used or not beyond <= tokenizer.special_ids:
        raise DataError(
            f"--model {path}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, and the model {rows} embeddings; give the "
            "folder the model's own tokenizer, or enlarge the embeddings"
        )


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
