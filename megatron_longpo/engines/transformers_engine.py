"""A transformers model that answers in this process: shared prefixes are read once, prefixes kept, rows decoded together."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_longpo.checkpoint.huggingface import check_model_folder
from megatron_longpo.data.sequence import common_prefix
from megatron_longpo.engines.base import MODEL_ROPE, Engine, Prompt, Reply, Rope, Sampling, model_identity
from megatron_longpo.engines.cached_attention import roomy_cache, use_cached_attention
from megatron_longpo.engines.decoding import Answer, Decoder, Packed, Padded, Row, Stacked
from megatron_longpo.engines.loading import check_vocabulary, load_model
from megatron_longpo.engines.reading import PromptReader, crop
from megatron_longpo.engines.thinking import NO_THINKING, Thinking
from megatron_longpo.errors import DataError, one_line
from megatron_longpo.model.families import config_for_export, shape_from_hf
from megatron_longpo.model.rotary import changed_scaling
from megatron_longpo.runtime import platform
from megatron_longpo.runtime.reading import read_json
from megatron_longpo.text.chat import load_tokenizer
from megatron_longpo.text.template_guard import TEMPLATE_MEMORY_BYTES, TEMPLATE_SECONDS

# Own tokens of packed rows: their mask has as many lines and columns.
LONGEST_PACKED = 4096
# Tokens of stacked rows, padding included: for a moment their keys and values exist twice.
LONGEST_STACKED = 65536


class TransformersEngine(Engine):
    """A transformers model in this process, on the platform's device.

    What the prompts of a group begin with is read once, in pieces, and all of them share its keys and values. They are
    decoded together, ``batch_size`` at a time. If the shared part is the larger one, as with a document, the rows are
    ``Packed`` and its keys are read once per step; otherwise they are ``Padded``.

    Args:
        path: model folder with a tokenizer.
        dtype: dtype of the weights; ``auto`` keeps the stored one.
        batch_size, prefill_tokens, documents_at_once: see ``EngineConfig``.
        chat_template: used instead of the tokenizer's own.
        template_seconds: longest time that the template may take.
        template_memory_bytes: most memory that it may take for that, beyond what the process has.
        template_kwargs: arguments of the template.
        thinking: how thinking is told from answers.
        keep_prefix: keep what was read last, and read of the next prompt only what differs. Replies may then depend in their
            last bits on earlier prompts.

    Raises:
        DataError: transformers cannot load a model from the folder.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        dtype: str = "auto",
        batch_size: int = 4,
        prefill_tokens: int = 8192,
        documents_at_once: int = 1,
        chat_template: str | None = None,
        template_seconds: float = TEMPLATE_SECONDS,
        template_memory_bytes: int = TEMPLATE_MEMORY_BYTES,
        template_kwargs: Mapping[str, Any] | None = None,
        thinking: Thinking = NO_THINKING,
        keep_prefix: bool = False,
    ) -> None:
        self._path = Path(path)
        if not self._path.is_dir():
            raise DataError(f"--model {path}: no such folder; give a model folder")
        check_model_folder(self._path)
        self.tokenizer = load_tokenizer(
            path,
            chat_template,
            template_seconds=template_seconds,
            template_memory_bytes=template_memory_bytes,
            template_kwargs=template_kwargs,
        )
        self.thinking = thinking
        check_vocabulary(self.tokenizer, self._path)
        self.model: Any = load_model(self._path, dtype)
        if not platform.CURRENT.is_cuda:
            use_cached_attention(self.model)
        self.batch_size, self.prefill_tokens = batch_size, prefill_tokens
        self.document_batch = self.groups_at_once = documents_at_once
        self._rope = MODEL_ROPE
        # A model with a state has no keys that could be shared or padded.
        self._can_share = not getattr(self.model, "_is_stateful", False)
        # Other models keep only part of their keys, build their own masks, or use a key's place in memory as its position.
        self._can_pack = self._can_share and _attends_to_everything(self.model)
        self._keeps = keep_prefix and self._can_pack and roomy_cache() is not None
        self._reader = PromptReader(self.model, prefill_tokens=prefill_tokens, roomy=self._can_pack, keep=self._keeps)
        if self._keeps:
            # Prompts are read one by one, but decoded together.
            self.groups_at_once = max(batch_size, documents_at_once)
        ends = self.model.generation_config.eos_token_id
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        if not all(type(end) is int for end in ends):
            raise DataError(
                f"--model {path}: eos_token_id={one_line(repr(ends), 100)} must be ids of tokens; correct config.json or "
                "generation_config.json"
            )
        # What the model was trained to end with, and what its template puts after an answer.
        self._ends = self.tokenizer.answer_ends() | frozenset(ends)

    @property
    def identity(self) -> dict[str, Any]:
        # The batch changes the last bits, and thereby now and then a greedy token.
        return {
            "engine": "transformers",
            "model": model_identity(self._path),
            "dtype": str(self.model.dtype),
            "batch_size": self.batch_size,
            "prefill_tokens": self.prefill_tokens,
            "documents_at_once": self.document_batch,
            "template": self.tokenizer.template_hash,
            **self.given_settings,
        }

    def answer(
        self,
        groups: Sequence[Sequence[Prompt]],
        sampling: Sampling,
        rope: Rope = MODEL_ROPE,
    ) -> list[list[Reply]]:
        self._set_rope(rope)
        decoder = Decoder(self.model, replace(sampling, max_tokens=self.token_limit(sampling)), self._ends)
        rows = [
            [Row(ids, prompt.seed) for ids, prompt in zip(tokens, group, strict=True)]
            for tokens, group in zip(self.token_rows(groups), groups, strict=True)
        ]
        with torch.inference_mode():
            if self._keeps and all(len(group) == 1 for group in rows):
                answers = [[answer] for answer in self._decode_singles(decoder, [row for (row,) in rows])]
            elif self._keeps or len(rows) == 1 or any(_shared_tokens(group) for group in rows):
                answers = [self._decode_group(decoder, group) for group in rows]
            else:
                # Nothing is shared, so batches are filled across groups.
                flat = iter(self._decode_group(decoder, [row for group in rows for row in group]))
                answers = [[next(flat) for _ in group] for group in rows]
        return [
            [self._reply(row, answer, sampling) for row, answer in zip(*pair, strict=True)]
            for pair in zip(rows, answers, strict=True)
        ]

    def _reply(self, row: Row, answer: Answer, sampling: Sampling) -> Reply:
        return self.reply(
            self.decode(answer.ids),
            sampling,
            finished=answer.finished,
            prompt_tokens=len(row.ids),
            new_tokens=len(answer.ids),
            opened=self.opens_thinking,
        )

    def _set_rope(self, rope: Rope) -> None:
        if rope == self._rope:
            return
        config = copy.deepcopy(self.model.config)
        if not rope.is_default:
            source = self._path / "config.json"
            plain = read_json(source)
            shape = shape_from_hf(plain, str(source))
            numbers = dict(rope.scaling or {})
            changed = shape.replace(
                rotary_base=rope.base or shape.rotary_base,
                rope_scaling=changed_scaling(shape, numbers.pop("rope_type", None), numbers, "answers"),
            )
            config = type(config)(**config_for_export(plain, changed, "float32", str(source)))
        inner = self.model.model
        inner.rotary_emb = type(inner.rotary_emb)(config=config).to(self.model.device)
        self._rope = rope
        # Kept keys were rotated with the old RoPE.
        self._reader.forget()

    def _decode_group(self, decoder: Decoder, rows: Sequence[Row]) -> list[Answer]:
        shared = _shared_tokens(rows) if self._can_share else 0
        if shared:
            return self._decode_after_prefix(decoder, rows, shared)
        return self._decode_apart(decoder, rows)

    def _decode_apart(self, decoder: Decoder, rows: Sequence[Row]) -> list[Answer]:
        """Rows that share nothing, in padded batches."""
        # Nothing continues from the kept cache, and its memory is needed.
        self._reader.forget()
        # A batch is read in one piece, so rows longer than a piece are read and decoded one by one.
        is_long = max(len(row.ids) for row in rows) > self.prefill_tokens
        answers = []
        for batch in _batches(rows, self.batch_size if self._can_share and not is_long else 1):
            cache, shared = self._reader.new_cache(), 0
            if len(batch) == 1 and len(batch[0].ids) > self.prefill_tokens:
                shared = len(batch[0].ids) - 1
                cache = self._reader.read(batch[0].ids[:shared])
            answers += Padded(decoder, cache, shared=shared).decode(batch)
        return answers

    def _decode_after_prefix(self, decoder: Decoder, rows: Sequence[Row], shared: int) -> list[Answer]:
        """Rows that begin with the same ``shared`` tokens, which are read once."""
        cache = self._reader.read_reusing(rows[0].ids[:shared])
        answers = []
        batches = list(_batches(rows, self.batch_size))
        for number, batch in enumerate(batches):
            own = sum(len(row.ids) - shared for row in batch)
            if self._can_pack and (len(batch) == 1 or own <= LONGEST_PACKED):
                # The cache stays that of one row: cropped, it serves the next batch.
                strategy = Packed if len(batch) > 1 else Padded
                answers += strategy(decoder, cache, shared=shared).decode(batch)
                crop(cache, shared)
            elif number + 1 < len(batches):
                answers += Padded(decoder, copy.deepcopy(cache), shared=shared).decode(batch)
            else:
                # The last batch may spoil the cache.
                self._reader.forget()
                answers += Padded(decoder, cache, shared=shared).decode(batch)
        return answers

    def _decode_singles(self, decoder: Decoder, rows: Sequence[Row]) -> list[Answer]:
        """Rows that are read one by one, each from what the one before left, and decoded together."""
        answers = []
        for batch in self._stackable(rows):
            if len(batch) == 1:
                answers += self._decode_single(decoder, batch[0])
            else:
                cache = self._reader.read_stacked([row.ids[:-1] for row in batch])
                answers += Stacked(decoder, cache).decode(batch)
        return answers

    def _decode_single(self, decoder: Decoder, row: Row) -> list[Answer]:
        shared = len(row.ids) - 1
        return Padded(decoder, self._reader.read_reusing(row.ids[:shared]), shared=shared).decode([row])

    def _stackable(self, rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
        """Runs of rows whose stacked cache is not too large."""
        first = 0
        while first < len(rows):
            size = 1
            while first + size < len(rows) and size < self.batch_size:
                longest = max(len(row.ids) for row in rows[first : first + size + 1])
                if longest * (size + 1) > LONGEST_STACKED:
                    break
                size += 1
            yield rows[first : first + size]
            first += size


def _attends_to_everything(model: Any) -> bool:
    """Whether every layer attends to all earlier tokens, with rotary positions that are passed in."""
    layer_types = getattr(model.config, "layer_types", None) or ()
    has_window = getattr(model.config, "sliding_window", None) and not layer_types
    return (
        not has_window
        and all(kind == "full_attention" for kind in layer_types)
        and hasattr(getattr(model, "model", None), "rotary_emb")
    )


def _batches(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    for first in range(0, len(rows), size):
        yield rows[first : first + size]


def _shared_tokens(rows: Sequence[Row]) -> int:
    """Tokens that all rows begin with, or 0 unless these are at least half of every row.

    Each row keeps at least one token of its own: decoding continues from it.
    """
    if len(rows) < 2:
        return 0
    shortest = min(len(row.ids) for row in rows)
    shared = min(shortest - 1, *(common_prefix(rows[0].ids, row.ids) for row in rows[1:]))
    return shared if 2 * shared >= max(len(row.ids) for row in rows) else 0
