"""The interface of an engine: groups of prompts in, replies out.

An engine is a transformers model in this process, vLLM, or any server with OpenAI's interface. The prompts of a group begin
with the same text, for example a document, which an engine computes once. Each engine has a module of its own:
``transformers_engine``, ``vllm_engine``, ``openai_engine``.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_longpo.errors import LongPOError

if TYPE_CHECKING:
    # Only for annotations: it imports torch, which --help should not wait for.
    from megatron_longpo.text.chat import ChatTokenizer, Message

# Bytes at each end of a weight file that go into a model's identity; hashing whole files would take minutes.
_IDENTITY_BYTES = 2**20
_IDENTITY_DIGITS = 24


class EngineError(LongPOError):
    """An engine cannot answer: its server is down, or refuses the key."""


@dataclass(frozen=True)
class Sampling:
    """How an answer is decoded.

    Attributes:
        max_tokens: longest answer in tokens.
        temperature: softmax temperature; 0 decodes greedily.
        top_p: probability mass of nucleus sampling (arXiv 1904.09751).
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Rope:
    """RoPE of one call; None keeps the model's value.

    Attributes:
        base: theta.
        scaling: ``rope_type`` and its numbers, by Hugging Face's names.
    """

    base: float | None = None
    scaling: dict[str, Any] | None = None

    @property
    def is_default(self) -> bool:
        return self.base is None and self.scaling is None


MODEL_ROPE = Rope()


@dataclass(frozen=True)
class Prompt:
    """A conversation to be answered.

    Attributes:
        messages: the conversation.
        seed: sampling seed. In-process engines give the same prompt with the same seed the same answer.
        prefix: first words of the answer; the engine continues from there.
    """

    messages: tuple[Message, ...]
    seed: int = 0
    prefix: str = ""


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        text: the answer, stripped and without special tokens.
        finished: whether the model ended it; False if it was cut at the token limit.
        prompt_tokens, new_tokens: tokens read and written.
        refused: why the engine did not accept the prompt (for example, too long), or None.
    """

    text: str
    finished: bool
    prompt_tokens: int
    new_tokens: int
    refused: str | None = None


class Engine(ABC):
    """Answers groups of prompts.

    Attributes:
        tokenizer: tokenizer of the model; it also measures documents.
        groups_at_once: how many groups are best passed in one call.
        document_batch: documents whose prompts are answered together. If greater than 1, replies may differ in the last bits
            depending on what is batched with them, so the same documents form a batch however the work is split.
    """

    tokenizer: ChatTokenizer
    groups_at_once: int = 1
    document_batch: int = 1

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Everything about the engine that determines its answers."""

    @abstractmethod
    def answer(
        self,
        groups: Sequence[Sequence[Prompt]],
        sampling: Sampling,
        rope: Rope = MODEL_ROPE,
    ) -> list[list[Reply]]:
        """Answer all prompts.

        Args:
            groups: prompts; those of a group may begin alike.
            sampling: how to decode.
            rope: RoPE of this call.

        Returns:
            A reply for each prompt, in the order of the prompts.

        Raises:
            LongPOError: the engine cannot answer.
        """

    def token_rows(self, groups: Sequence[Sequence[Prompt]]) -> list[list[list[int]]]:
        """Token ids of each prompt, its prefix included."""
        return [[self.tokenizer.prompt(p.messages, p.prefix) for p in group] for group in groups]


def model_identity(path: Path) -> str:
    """Hash that identifies the content of a model folder: its config, and size and both ends of each weight file."""
    digest = hashlib.sha256()
    config = path / "config.json"
    digest.update(config.read_bytes() if config.is_file() else b"")
    for file in sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".bin")):
        size = file.stat().st_size
        with open(file, "rb") as stream:
            head = stream.read(_IDENTITY_BYTES)
            stream.seek(max(0, size - _IDENTITY_BYTES))
            digest.update(f"{file.name} {size} ".encode() + head + stream.read(_IDENTITY_BYTES))
    return digest.hexdigest()[:_IDENTITY_DIGITS]
