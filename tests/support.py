"""What several tests need: tiny models and data, launches, canonical tensors."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_longpo.data.indexed import Manifest, SampleWriter
from megatron_longpo.data.preference import (
    CHOSEN_RESPONSE,
    CONTEXT,
    PROMPT,
    REJECTED_RESPONSE,
    SHORT_CHOSEN_RESPONSE,
    SHORT_PROMPT,
    SHORT_REJECTED_RESPONSE,
    Mode,
    Piece,
    Sample,
)

ROOT = Path(__file__).parent.parent
VOCABULARY = 101
# What the whole parity matrix runs on, and what else can be converted and trained.
FAMILIES = ("llama", "mistral", "qwen2")
VARIANTS = ("llama3", "mistral-window", "yarn-mistral", "qwen2-yarn", "qwen3", "glm")


def make_model(family: str, folder: Path, *, vocab_size: int = VOCABULARY, seed: int = 0, **extra: Any) -> Path:
    """A tiny random model of a family, saved by transformers."""
    import torch
    import transformers

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    # A scaled RoPE as of a model that was trained on 64 tokens: rows are longer, so that it shows.
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    llama3 = {**yarn, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    special: dict[str, tuple[str, dict[str, Any]]] = {
        "llama": ("Llama", {"tie_word_embeddings": True}),
        "llama3": ("Llama", {"tie_word_embeddings": True, "rope_parameters": llama3}),
        # As many key-value heads as query heads, so that context parallelism has several to a rank.
        "mistral": ("Mistral", {"sliding_window": None, "head_dim": 16, "num_key_value_heads": 4}),
        "mistral-window": ("Mistral", {"sliding_window": 24}),
        "yarn-mistral": ("Mistral", {"sliding_window": 4096, "rope_parameters": {**yarn, "attention_factor": 1.2}}),
        "qwen2": ("Qwen2", {"tie_word_embeddings": False}),
        "qwen2-yarn": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": yarn}),
        "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": False}),
        "glm": ("Glm", {"head_dim": 16, "pad_token_id": 0}),
    }
    name, own = special[family]
    config = getattr(transformers, f"{name}Config")(**{**sizes, **own, **extra})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in parameter_name else 0.0, 0.1)
    model.save_pretrained(folder)
    return folder


def make_chat_model(folder: Path, std: float = 0.15) -> Path:
    """A tiny Llama of random weights for ``make_fast_tokenizer``'s tokenizer, whose answers are no sense and repeatable."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=402,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        eos_token_id=1,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, std)
    model.save_pretrained(folder)
    return folder


def random_sample(rng: np.random.Generator, turns: int, *, context: int, vocab_size: int = VOCABULARY) -> Sample:
    """A sample as the text schema makes them, of random tokens; answers of a turn begin alike now and then."""

    def tokens(n: int) -> np.ndarray:
        return rng.integers(3, vocab_size, n).astype(np.int64)

    document = tokens(context)
    pieces = [Piece(document, CONTEXT)]
    for turn in range(turns):
        prompt = tokens(int(rng.integers(3, 9)))
        pieces.append(Piece(prompt, PROMPT))
        if turn:
            pieces.append(Piece(tokens(int(rng.integers(3, 9))), Mode.OWN_PROMPT))
        start = int(rng.integers(0, context // 2))
        chunk = document[start : start + context // 2]
        opening = tokens(int(rng.integers(0, 3)))
        answers = [np.concatenate([opening, tokens(int(rng.integers(2, 24))), [2]]) for _ in range(2)]
        pieces.append(Piece(answers[0], CHOSEN_RESPONSE))
        pieces.append(Piece(answers[1], REJECTED_RESPONSE))
        pieces.append(Piece(np.concatenate([chunk, prompt]), SHORT_PROMPT))
        pieces.append(Piece(answers[0], SHORT_CHOSEN_RESPONSE))
        pieces.append(Piece(answers[1], SHORT_REJECTED_RESPONSE))
    return Sample(tuple(pieces))


def write_data(prefix: Path, samples: Sequence[Sample], vocab_size: int = VOCABULARY) -> Path:
    """Indexed binaries of samples."""
    manifest = Manifest(
        vocab_size=vocab_size,
        dtype="uint16",
        tokenizer=None,
        tokenizer_hash=None,
        template_hash=None,
        independent_turns=True,
    )
    writer = SampleWriter(prefix, manifest, "test")
    for sample in samples:
        writer.add(sample)
    writer.finish()
    return prefix


def make_data(prefix: Path, samples: int, seed: int = 0, longest: int = 150) -> Path:
    """Random samples of one to three turns and unequal lengths."""
    rng = np.random.default_rng(seed)
    made = [random_sample(rng, 1 + i % 3, context=int(rng.integers(40, longest))) for i in range(samples)]
    return write_data(prefix, made)


def environment(**extra: str) -> dict[str, str]:
    """Environment of a launched process: one thread each, since layouts share two cores."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **extra}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def torchrun(processes: int, *arguments: str) -> list[str]:
    """Command line of a launch on this machine."""
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={processes}",
        "--master-addr=127.0.0.1",
        f"--master-port={free_port()}",
        *arguments,
    ]


def run(
    command: Sequence[str], *, timeout: float = 600, expect: int | None = 0, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command line; its output is in the failure message where the exit status is not as expected."""
    done = subprocess.run(
        list(command), capture_output=True, text=True, timeout=timeout, env=dict(env or environment()), cwd=ROOT
    )
    if expect is not None and done.returncode != expect:
        raise AssertionError(
            f"exit status {done.returncode} of {command}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
        )
    return done


def dense_attention(
    groups: Sequence[Any], query: Any, key: Any, value: Any, scale: float, mask: Any | None = None
) -> Any:
    """Attention of query groups by softmax under a whole mask, [S, Q, D]; zeros for places in no group.

    Args:
        groups: ``sequence.QueryGroup``s.
        mask: [S, S], what may be seen besides.
    """
    import torch

    n, repeat = query.shape[0], query.shape[1] // key.shape[1]
    seen = torch.zeros(n, n, dtype=torch.bool)
    for group in groups:
        for block in group.keys:
            visible = torch.ones(group.end - group.start, block.end - block.start, dtype=torch.bool)
            seen[group.start : group.end, block.start : block.end] = visible.tril() if block.causal else visible
    if mask is not None:
        seen &= mask
    scores = torch.einsum("shd,thd->hst", query, key.repeat_interleave(repeat, 1)) * scale
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0)
    return torch.einsum("hst,thd->shd", weights, value.repeat_interleave(repeat, 1))
