"""vLLM as an engine (extra `vllm`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_longpo.engines.base import MODEL_ROPE, Engine, Prompt, Reply, Rope, Sampling, model_identity
from megatron_longpo.engines.settings import EngineConfig
from megatron_longpo.errors import ConfigError
from megatron_longpo.text.chat import load_tokenizer


class VLLMEngine(Engine):
    """vLLM in this process, with prefix caching: a document is computed once for all its prompts.

    Args:
        config: model, dtype, GPUs.
        longest: tokens of a row for which a changed RoPE is to do.

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
        self.tokenizer = load_tokenizer(config.model, config.chat_template)
        self.groups_at_once = config.concurrency
        self._config, self._longest = config, longest
        self._llm: Any = None
        self._made = Rope()
        self._make: Callable[..., Any] = LLM

    @property
    def identity(self) -> dict[str, Any]:
        assert self._config.model is not None
        return {
            "engine": "vllm",
            "model": model_identity(Path(self._config.model)),
            "dtype": self._config.dtype,
            "template": self.tokenizer.template_hash,
        }

    def _model(self, rope: Rope) -> Any:
        if self._llm is None or rope != self._made:
            import gc

            # One at a time: two would not fit.
            self._llm = None
            gc.collect()
            overrides: dict[str, Any] = {}
            if rope.base is not None:
                overrides["rope_theta"] = rope.base
            if rope.scaling is not None:
                overrides["rope_scaling"] = rope.scaling
            if not rope.is_default:
                # Beyond the model's own range; answers and template besides.
                overrides["max_position_embeddings"] = self._longest
            more = {"hf_overrides": overrides} if overrides else {}
            self._llm = self._make(
                model=self._config.model,
                dtype=self._config.dtype,
                tensor_parallel_size=self._config.tensor_parallel_size,
                enable_prefix_caching=True,
                **more,
            )
            self._made = rope
        return self._llm

    def answer(
        self,
        groups: Sequence[Sequence[Prompt]],
        sampling: Sampling,
        rope: Rope = MODEL_ROPE,
    ) -> list[list[Reply]]:
        from vllm import SamplingParams

        llm = self._model(rope)
        longest = llm.llm_engine.model_config.max_model_len
        rows = [[self.tokenizer.prompt(list(p.messages), p.prefix) for p in group] for group in groups]
        prompts, parameters = [], []
        for group, tokens in zip(groups, rows, strict=True):
            for p, ids in zip(group, tokens, strict=True):
                if len(ids) >= longest:
                    continue
                prompts.append({"prompt_token_ids": ids})
                parameters.append(
                    SamplingParams(
                        max_tokens=sampling.max_tokens,
                        temperature=sampling.temperature,
                        top_p=sampling.top_p,
                        seed=p.seed,
                        stop_token_ids=sorted(self.tokenizer.answer_ends()),
                        skip_special_tokens=True,
                    )
                )
        outputs = iter(llm.generate(prompts, parameters, use_tqdm=False))
        replies = []
        for tokens in rows:
            row = []
            for ids in tokens:
                if len(ids) >= longest:
                    why = f"{len(ids)} tokens; the engine takes {longest}"
                    row.append(Reply("", False, len(ids), 0, refused=why))
                    continue
                out = next(outputs)
                done = out.outputs[0]
                row.append(
                    Reply(
                        done.text.strip(), done.finish_reason == "stop", len(out.prompt_token_ids), len(done.token_ids)
                    )
                )
            replies.append(row)
        return replies
