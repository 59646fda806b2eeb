"""Configuration of an engine, which generation and evaluation have in common."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_longpo.engines.thinking import Thinking
from megatron_longpo.errors import ConfigError
from megatron_longpo.schema import Count, ModelSizeFactor, NaturalNumber, PositiveFiniteFloat, Range, check_ranges
from megatron_longpo.text.template_kwargs import parse_template_kwargs


@dataclass(frozen=True)
class EngineConfig:
    """The engine that answers prompts."""

    engine: Literal["transformers", "vllm", "openai"] = "transformers"
    """transformers: in this process, on CPU or GPU; vllm: likewise (extra `vllm`); openai: a server with OpenAI's interface."""
    model: str | None = None
    """Model folder, or a model of the hub, org/name or org/name@revision; for openai the server's name of the model."""
    tokenizer: str | None = None
    """Tokenizer folder. Needed where the model is not a folder (openai)."""
    chat_template: str | None = None
    """Template file, or one of mistral, mistral-v3, llama-2, chatml, plain (no template). Default: the tokenizer's own."""
    chat_template_kwargs: str | None = None
    """Arguments of the chat template as a JSON object, such as '{"enable_thinking": false}'; a server gets them, too."""
    thinking_tokens: NaturalNumber = 0
    """Tokens that the model may spend on thinking before an answer, beside the answer's own. Thinking is taken off the answer."""
    thinking_marks: tuple[str, ...] = ("<think>", "</think>")
    """The marks before and after thinking."""
    template_seconds: PositiveFiniteFloat = 10.0
    """Longest time that the chat template may take to render a conversation."""
    template_memory_bytes: Annotated[int, Range(ge=2**26)] = 2**31
    """Most memory that the chat template may take for that, in bytes, beyond what the process has."""
    model_size_factor: ModelSizeFactor = 1.0
    """Factor by which a model may exceed the limits of its numbers (SECURITY.md), such as 4096 layers."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of weights and activations. auto: as stored."""
    batch_size: Count = 4
    """transformers: prompts answered together."""
    documents_at_once: Count = 1
    """transformers: documents whose prompts may be answered together to fill a batch."""
    prefill_tokens: Count = 8192
    """transformers: tokens that are read at once; a longer prompt is read in chunks of this size."""
    tensor_parallel_size: Count = 1
    """vllm: number of GPUs."""
    gpu_memory_utilization: Annotated[float, Range(gt=0, le=1, fix="vLLM's own default is 0.9")] = 0.9
    """vllm: part of a GPU's memory that weights and cached keys and values may take."""
    max_model_len: Count | None = None
    """vllm: longest row in tokens, answer included, for which memory must suffice. Default: the longest row that is asked for, if
    the model takes such rows, else what the model takes."""
    base_url: str = "http://127.0.0.1:8000/v1"
    """openai: address of the server."""
    api_key_variable: str = "OPENAI_API_KEY"
    """openai: environment variable that holds the key. The key itself is never written anywhere."""
    concurrency: Count = 16
    """openai: requests in flight at once; vllm: documents submitted at once."""
    timeout_seconds: PositiveFiniteFloat = 600.0
    """openai: longest wait for the server's next byte."""
    request_seconds: PositiveFiniteFloat | None = None
    """openai: longest time for a request, from connecting to the last byte of the answer. Default: twice timeout_seconds."""
    max_reply_bytes: Count = 2**24
    """openai: largest answer in bytes, after decompression."""
    retry_after_seconds: Annotated[float, Range(ge=0, lt=math.inf, fix="the default is 600")] = 600.0
    """openai: longest wait that a server's Retry-After is granted."""
    retries: NaturalNumber = 8
    """openai: retries of a request that failed for a temporary reason, with growing pauses."""

    @property
    def thinking(self) -> Thinking:
        """How thinking is told from answers."""
        opening, closing = self.thinking_marks
        return Thinking(self.thinking_tokens, opening, closing)


def check_engine(engine: EngineConfig) -> None:
    """Check an engine's options.

    Raises:
        ConfigError: the first value that breaks a rule.
    """
    check_ranges(engine)
    if engine.model is None:
        raise ConfigError("model is not given; name a model folder (or, for openai, the server's model) with --model")
    parse_template_kwargs(engine.chat_template_kwargs)
    marks = [mark.strip() for mark in engine.thinking_marks]
    if len(marks) != 2 or not all(marks) or marks[0] == marks[1]:
        raise ConfigError(
            f"thinking_marks={' '.join(engine.thinking_marks)!r} must be two different texts, the one before and the one after "
            "thinking; give both, such as <think> </think>"
        )
    if not engine.base_url.startswith(("http://", "https://")):
        raise ConfigError(f"base_url={engine.base_url} must begin with http:// or https://; add one of them")
    if "@" in engine.base_url:
        raise ConfigError(
            "base_url has a user name or a key before @, which would end up in files; put the key into the environment "
            f"variable {engine.api_key_variable}"
        )
    if engine.engine == "openai" and engine.tokenizer is None:
        raise ConfigError(
            "engine=openai needs tokenizer to measure texts; name the tokenizer folder of the served model with --tokenizer"
        )
