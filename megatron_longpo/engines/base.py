"""The interface of an engine: groups of prompts in, replies out.

An engine is a transformers model in this process, vLLM, or any server with OpenAI's interface. The prompts of a group begin
with the same text, for example a document, which an engine computes once. Each engine has a module of its own:
``transformers_engine``, ``vllm_engine``, ``openai_engine``.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_longpo.engines.thinking import NO_THINKING, Thinking
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

    @property
    def with_prefix_in_question(self) -> Prompt:
        """The same where an answer cannot be begun: its beginning ends the question, as in RULER."""
        if not self.prefix:
            return self
        *before, last = self.messages
        return replace(self, messages=(*before, {**last, "content": last["content"] + self.prefix}), prefix="")


# Why a reply is no answer: the engine did not take the prompt; a server gave none; the model wrote nothing, or only thinking.
NoAnswer = Literal["refused", "declined", "empty", "only_thinking"]


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        text: the answer, stripped, without thinking and special tokens.
        finished: whether the model ended it; False if it was cut at the token limit.
        prompt_tokens, new_tokens: tokens read and written, thinking included.
        refused: why the engine did not accept the prompt (for example, too long), or None.
        declined: why a server gave no answer to a prompt that it accepted (a filter, or the model's own refusal), or None.
        thinking_tokens: tokens of thinking.
    """

    text: str
    finished: bool
    prompt_tokens: int
    new_tokens: int
    refused: str | None = None
    declined: str | None = None
    thinking_tokens: int = 0

    @property
    def no_answer(self) -> NoAnswer | None:
        """Why there is no answer, or None if there is one."""
        if self.refused is not None:
            return "refused"
        if self.declined is not None:
            return "declined"
        if self.text:
            return None
        return "only_thinking" if self.thinking_tokens else "empty"


class Engine(ABC):
    """Answers groups of prompts.

    Attributes:
        tokenizer: tokenizer of the model; it also measures documents.
        groups_at_once: how many groups are best passed in one call.
        document_batch: documents whose prompts are answered together. If greater than 1, replies may differ in the last bits
            depending on what is batched with them, so the same documents form a batch however the work is split.
        thinking: how thinking is told from answers.
    """

    tokenizer: ChatTokenizer
    thinking: Thinking = NO_THINKING
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

    def check_ready(self) -> None:  # noqa: B027 - an engine that is made with its model is ready
        """Fail now if the engine cannot answer; called before work that takes long and needs no answers.

        Raises:
            LongPOError: it cannot.
        """

    def as_asked(self, prompt: Prompt) -> Prompt:
        """The prompt as the model gets it: if the model thinks first, the beginning of its answer ends the question instead."""
        if prompt.prefix and (self.thinking.tokens or self.opens_thinking):
            return prompt.with_prefix_in_question
        return prompt

    def token_rows(self, groups: Sequence[Sequence[Prompt]]) -> list[list[list[int]]]:
        """Token ids of each prompt, its prefix included."""
        return [[self.tokenizer.prompt(p.messages, p.prefix) for p in map(self.as_asked, group)] for group in groups]

    def token_limit(self, sampling: Sampling) -> int:
        """Most tokens of an answer and its thinking."""
        return sampling.max_tokens + self.thinking.tokens

    @cached_property
    def opens_thinking(self) -> bool:
        """Whether the chat template ends a prompt with the mark that opens thinking."""
        prompt = self.tokenizer.render([{"role": "user", "content": "QUESTION"}], add_generation_prompt=True)
        return prompt.rstrip().endswith(self.thinking.opening)

    @cached_property
    def special_marks(self) -> dict[int, str]:
        """Marks of thinking that are special tokens, which decoding leaves out: id -> mark."""
        marks = (self.thinking.opening, self.thinking.closing)
        encoded = {mark: self.tokenizer.encode(mark, continues=False) for mark in marks}
        return {ids[0]: mark for mark, ids in encoded.items() if len(ids) == 1 and ids[0] in self.tokenizer.special_ids}

    def decode(self, ids: Sequence[int]) -> str:
        """Text of an answer's tokens, without special tokens other than marks of thinking."""
        parts, first = [], 0
        for place, token in enumerate(ids):
            if token in self.special_marks:
                parts += [self.tokenizer.decode(ids[first:place]), self.special_marks[token]]
                first = place + 1
        return "".join([*parts, self.tokenizer.decode(ids[first:])])

    def reply(
        self, text: str, sampling: Sampling, *, finished: bool, prompt_tokens: int, new_tokens: int, opened: bool
    ) -> Reply:
        """The reply for what the model wrote.

        Args:
            text: what it wrote, thinking included.
            sampling: limit of the answer, which is cut there if thinking has tokens of its own: it may have left some of them.
            finished: whether the model ended it.
            prompt_tokens, new_tokens: tokens read and written.
            opened: whether the prompt opened thinking.
        """
        thinking, answer = self.thinking.part(text, opened=opened)
        if self.thinking.tokens:
            ids = self.tokenizer.encode(answer, continues=True)
            if len(ids) > sampling.max_tokens:
                answer, finished = self.tokenizer.decode(ids[: sampling.max_tokens]).strip(), False
        return Reply(
            text=answer,
            finished=finished,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            thinking_tokens=len(self.tokenizer.encode(thinking, continues=True)),
        )

    @property
    def given_settings(self) -> dict[str, Any]:
        """The part of the identity that stands in it only where it is given, so that work of earlier versions goes on."""
        given: dict[str, Any] = {}
        if self.tokenizer.template_kwargs:
            given["chat_template_kwargs"] = dict(self.tokenizer.template_kwargs)
        if self.thinking != NO_THINKING:
            marks = [self.thinking.opening, self.thinking.closing]
            given["thinking"] = {"tokens": self.thinking.tokens, "marks": marks}
        return given


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
