"""Makes the engine that a configuration names."""

from __future__ import annotations

import dataclasses
import os

from megatron_longpo.engines.base import Engine
from megatron_longpo.engines.settings import EngineConfig
from megatron_longpo.runtime.hub import model_folder
from megatron_longpo.runtime.log import log
from megatron_longpo.text.template_kwargs import parse_template_kwargs


def with_folders(config: EngineConfig) -> EngineConfig:
    """The settings with folders in place of models that are named by their place on a hub, which are downloaded.

    Raises:
        CheckpointError: the hub does not give them.
    """
    model, tokenizer = config.model, config.tokenizer
    # The name that a server uses is its own.
    if model is not None and config.engine != "openai":
        model = str(model_folder(model))
    if tokenizer is not None:
        tokenizer = str(model_folder(tokenizer))
    return dataclasses.replace(config, model=model, tokenizer=tokenizer)


def make_engine(config: EngineConfig, seq_length: int, *, keep_prefix: bool = False) -> Engine:
    """Make the engine that a configuration names.

    Args:
        config: the engine and its settings.
        seq_length: longest row in tokens, answers included.
        keep_prefix: see ``TransformersEngine``. vLLM always keeps prefixes.

    Raises:
        ConfigError: the engine is not installed, or its settings do not work.
        DataError: the model or tokenizer cannot be loaded.
    """
    engine = _make(config, seq_length, keep_prefix=keep_prefix)
    if engine.opens_thinking and not engine.thinking.tokens:
        log(
            f"note: the chat template opens thinking ({engine.thinking.opening}), which has no tokens of its own; give it some "
            "with --thinking-tokens, or turn it off with --chat-template-kwargs",
            active=os.environ.get("RANK", "0") == "0",
        )
    return engine


def _make(config: EngineConfig, seq_length: int, *, keep_prefix: bool) -> Engine:
    assert config.model is not None
    # Each engine needs a library that the others do not.
    if config.engine == "openai":
        from megatron_longpo.engines.openai_engine import OpenAIEngine

        return OpenAIEngine(config)
    if config.engine == "vllm":
        from megatron_longpo.engines.vllm_engine import VLLMEngine

        return VLLMEngine(config, seq_length)
    from megatron_longpo.engines.transformers_engine import TransformersEngine

    return TransformersEngine(
        config.model,
        dtype=config.dtype,
        batch_size=config.batch_size,
        prefill_tokens=config.prefill_tokens,
        documents_at_once=config.documents_at_once,
        chat_template=config.chat_template,
        template_seconds=config.template_seconds,
        template_memory_bytes=config.template_memory_bytes,
        template_kwargs=parse_template_kwargs(config.chat_template_kwargs),
        thinking=config.thinking,
        keep_prefix=keep_prefix,
    )
