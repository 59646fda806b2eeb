"""vLLM as an engine (extra `vllm`)."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import override

from megatron_longpo.checkpoint.checksums import verified_if_listed
from megatron_longpo.checkpoint.huggingface import check_model_folder, read_hf_config
from megatron_longpo.engines.base import MODEL_ROPE, Engine, Prompt, Reply, Rope, Sampling, model_identity
from megatron_longpo.engines.loading import check_vocabulary
from megatron_longpo.engines.settings import EngineConfig
from megatron_longpo.errors import ConfigError
from megatron_longpo.text.chat import load_tokenizer
from megatron_longpo.text.template_kwargs import parse_template_kwargs


class VLLMEngine(Engine):
    """vLLM in this process, with prefix caching: a document is computed once for all its prompts.

    Args:
        config: model, dtype and number of GPUs.
        longest: longest row in tokens that a changed RoPE must support.

    Raises:
        ConfigError: vLLM is not installed.
    """

    def __init__(self, config: EngineConfig, longest: int) -> None:
        try:
            from vllm import LLM
        except ImportError:
            raise ConfigError(
                "engine=vllm needs vLLM; pip install 'megatron_longpo[vllm]', or choose engine=transformers"
            ) from None
        assert config.model is not None
        check_model_folder(Path(config.model))
        self.tokenizer = load_tokenizer(
            config.model,
            config.chat_template,
            template_seconds=config.template_seconds,
            template_memory_bytes=config.template_memory_bytes,
            template_kwargs=parse_template_kwargs(config.chat_template_kwargs),
        )
        self.thinking = config.thinking
        check_vocabulary(self.tokenizer, Path(config.model))
        self.groups_at_once = config.concurrency
        self._config, self._longest = config, longest
        self._make_llm: Callable[..., Any] = LLM
        # Loaded at the first call, with the RoPE of that call.
        self._llm: Any = None
        self._rope = MODEL_ROPE

    @property
    def identity(self) -> dict[str, Any]:
        assert self._config.model is not None
        return {
            "engine": "vllm",
            "model": model_identity(Path(self._config.model)),
            "dtype": self._config.dtype,
            "template": self.tokenizer.template_hash,
            **self.given_settings,
        }

    def answer(
        self,
        groups: Sequence[Sequence[Prompt]],
        sampling: Sampling,
        rope: Rope = MODEL_ROPE,
    ) -> list[list[Reply]]:
        from vllm import SamplingParams

        llm = self._load(rope)
        limit = llm.llm_engine.model_config.max_model_len
        rows = self.token_rows(groups)
        prompts, parameters = [], []
        for group, tokens in zip(groups, rows, strict=True):
            for prompt, ids in zip(group, tokens, strict=True):
                if len(ids) >= limit:
                    continue
                prompts.append({"prompt_token_ids": ids})
                parameters.append(
                    SamplingParams(
                        max_tokens=self.token_limit(sampling),
                        temperature=sampling.temperature,
                        top_p=sampling.top_p,
                        seed=prompt.seed,
                        stop_token_ids=sorted(self.tokenizer.answer_ends()),
                        skip_special_tokens=True,
                    )
                )
        outputs = iter(llm.generate(prompts, parameters, use_tqdm=False))
        return [
            [_too_long(ids, limit) if len(ids) >= limit else self._reply(next(outputs), sampling) for ids in row]
            for row in rows
        ]

    @override
    def check_ready(self) -> None:
        self._load(MODEL_ROPE)

    def _load(self, rope: Rope) -> Any:
        """The model with this RoPE, reloaded if it is another than before."""
        if self._llm is not None and rope == self._rope:
            return self._llm
        # Freed first: two would not fit.
        self._llm = None
        gc.collect()
        overrides: dict[str, Any] = {}
        if rope.base is not None:
            overrides["rope_theta"] = rope.base
        if rope.scaling is not None:
            overrides["rope_scaling"] = rope.scaling
        if not rope.is_default:
            # Rows go beyond the model's own range.
            overrides["max_position_embeddings"] = self._longest
        with verified_if_listed(Path(str(self._config.model))):
            self._llm = self._make_llm(
                model=self._config.model,
                dtype=self._config.dtype,
                tensor_parallel_size=self._config.tensor_parallel_size,
                gpu_memory_utilization=self._config.gpu_memory_utilization,
                # Of a model that takes a million tokens vLLM would ask memory for all of them, and refuse to start.
                max_model_len=self._config.max_model_len or self._needed_length(rope),
                enable_prefix_caching=True,
                trust_remote_code=False,
                **({"hf_overrides": overrides} if overrides else {}),
            )
        self._rope = rope
        return self._llm

    def _needed_length(self, rope: Rope) -> int | None:
        """The longest row; None, vLLM's own choice, where the model does not say that it takes such rows."""
        assert self._config.model is not None
        taken = read_hf_config(Path(self._config.model)).get("max_position_embeddings")
        fits = not rope.is_default or (isinstance(taken, int) and self._longest <= taken)
        return self._longest if fits else None

    def _reply(self, output: Any, sampling: Sampling) -> Reply:
        completion = output.outputs[0]
        return self.reply(
            # vLLM's text has no special tokens, which marks of thinking may be.
            self.decode(completion.token_ids) if self.special_marks else completion.text,
            sampling,
            finished=completion.finish_reason == "stop",
            prompt_tokens=len(output.prompt_token_ids),
            new_tokens=len(completion.token_ids),
            opened=self.opens_thinking,
        )


def _too_long(ids: list[int], limit: int) -> Reply:
    return Reply(
        text="",
        finished=False,
        prompt_tokens=len(ids),
        new_tokens=0,
        refused=f"{len(ids)} tokens; the engine takes {limit}",
    )
