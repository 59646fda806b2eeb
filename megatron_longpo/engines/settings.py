"""Configuration of an engine; generation and evaluation have the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_longpo.config import check_numbers
from megatron_longpo.errors import ConfigError


@dataclass(frozen=True)
class EngineConfig:
    """Who answers."""

    engine: Literal["transformers", "vllm", "openai"] = "transformers"
    """transformers: this machine, CPU or GPU; vllm: likewise (extra `vllm`); openai: any server with that interface."""
    model: str | None = None
    """Model folder; for openai the model's name at the server."""
    tokenizer: str | None = None
    """Tokenizer folder, where the model is none (openai)."""
    chat_template: str | None = None
    """A file, or one of mistral, mistral-v3, llama-2, chatml, plain (none). Default: the tokenizer's own."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    batch_size: int = 4
    """transformers: prompts that are answered together."""
    documents_at_once: int = 1
    """transformers: documents whose prompts may be answered together, to fill a batch."""
    prefill_tokens: int = 8192
    """transformers: a long prompt is read in pieces of this many tokens."""
    tensor_parallel_size: int = 1
    """vllm: GPUs."""
    base_url: str = "http://127.0.0.1:8000/v1"
    """openai: the server."""
    api_key_variable: str = "OPENAI_API_KEY"
    """openai: environment variable with the key. The key itself is written nowhere."""
    concurrency: int = 16
    """openai: requests under way at once; vllm: documents given at once."""
    timeout_seconds: float = 600.0
    """openai: without anything coming from the server."""
    retries: int = 8
    """openai: of a request that fails for a reason that may pass, with growing pauses."""


def check_engine(e: EngineConfig) -> None:
    """An engine by itself; evaluation has the same.

    Raises:
        ConfigError: the first value that breaks a rule.
    """
    if e.model is None:
        raise ConfigError("model is not given; name a model folder (or, for openai, the server's model) with --model")
    check_numbers(e)
    if not e.base_url.startswith(("http://", "https://")):
        raise ConfigError(f"base_url={e.base_url} must begin with http:// or https://")
    if not e.timeout_seconds > 0:
        raise ConfigError(f"timeout_seconds={e.timeout_seconds} must be positive")
    if "@" in e.base_url:
        raise ConfigError(
            f"base_url holds a name or a key before @; it would be written down: put the key into the environment variable "
            f"{e.api_key_variable}"
        )
    if e.engine == "openai" and e.tokenizer is None:
        raise ConfigError("engine=openai needs tokenizer, the folder of the served model's, to measure texts with")
