"""Who answers: a transformers model in this process, vLLM, or any server with OpenAI's interface.

One small interface: groups of prompts in, replies out. The prompts of a group share what they begin with, a document say,
which an engine computes once. Each engine has a room of its own: ``transformers_engine``, ``vllm_engine``, ``openai_engine``.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_longpo.errors import LongPOError
from megatron_longpo.text.chat import ChatTokenizer, Message


class EngineError(LongPOError):
    """An engine that cannot answer: a server that stays away, a key that it refuses."""


@dataclass(frozen=True)
class Sampling:
    """How an answer is decoded.

    Attributes:
        max_tokens: of the answer.
        temperature: 0 is greedy.
        top_p: nucleus (arXiv 1904.09751).
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Rope:
    """Another RoPE for a while; None: the model's.

    Attributes:
        base: theta.
        scaling: with ``rope_type``, by Hugging Face's names.
    """

    base: float | None = None
    scaling: dict[str, Any] | None = None

    @property
    def is_default(self) -> bool:
        return self.base is None and self.scaling is None


MODEL_ROPE = Rope()


@dataclass(frozen=True)
class Prompt:
    """What is to be answered.

    Attributes:
        messages: the conversation.
        prefix: what the answer begins with; the engine goes on from there.
        seed: of the sampling; the same prompt with the same seed has the same answer (of in-process engines).
    """

    messages: tuple[Message, ...]
    seed: int = 0
    prefix: str = ""


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        text: without special tokens, stripped.
        finished: whether it ended by itself and not at the token limit.
        prompt_tokens, new_tokens: read and written.
        refused: why the engine would not take the prompt (too long for it, say), or None.
    """

    text: str
    finished: bool
    prompt_tokens: int
    new_tokens: int
    refused: str | None = None


class Engine(ABC):
    """Answers groups of prompts.

    Attributes:
        tokenizer: of the model; measures documents.
        groups_at_once: how many groups are best given together.
        document_batch: documents whose prompts are answered together. If greater than 1, replies may differ in the last bits
            depending on what is batched with them, so the same documents form a batch however the work is split.
    """

    tokenizer: ChatTokenizer
    groups_at_once: int = 1
    document_batch: int = 1

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What makes its answers what they are."""

    @abstractmethod
    def answer(
        self,
        groups: Sequence[Sequence[Prompt]],
        sampling: Sampling,
        rope: Rope = MODEL_ROPE,
    ) -> list[list[Reply]]:
        """Replies to all prompts, in order.

        Raises:
            LongPOError: no answer can be had.
        """


def model_identity(path: Path) -> str:
    """A name for a model folder's content: its config, and of each weight file the size and both ends."""
    digest = hashlib.sha256()
    config = path / "config.json"
    digest.update(config.read_bytes() if config.is_file() else b"")
    for file in sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".bin")):
        size = file.stat().st_size
        with open(file, "rb") as stream:
            head = stream.read(2**20)
            stream.seek(max(0, size - 2**20))
            digest.update(f"{file.name} {size} ".encode() + head + stream.read(2**20))
    return digest.hexdigest()[:24]
