"""A transformers model that answers in this process: shared prefixes read once, kept prefixes, decoding in batches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_longpo.engines.base import MODEL_ROPE, Engine, Prompt, Reply, Rope, Sampling, model_identity
from megatron_longpo.engines.cached_attention import roomy_cache, use_cached_attention
from megatron_longpo.errors import DataError
from megatron_longpo.runtime import platform
from megatron_longpo.text.chat import load_tokenizer


class TransformersEngine(Engine):
    """A transformers model in this process, on the GPU where there is one.

    What the prompts of a group begin with is read once, in pieces; its keys and values are shared by all of them. They
    are answered together, ``batch_size`` at a time. Where what they share is the larger part, a document, they are one
    sequence for the model, a token of each prompt a step, under a mask by which each sees what is shared and itself: the
    shared keys are there once, and read once a step. Elsewhere they are a padded batch.

    Args:
        path: model folder with tokenizer.
        dtype: of the weights; ``auto``: as stored.
        batch_size, prefill_tokens, documents_at_once: see ``EngineConfig``.
        chat_template: instead of the tokenizer's.
        keep_prefix: keep what was read last, and of the next prompt read only what it does not begin with. Replies may then
            depend in their last bits on what was asked before them.

    Raises:
        DataError: the folder holds no model that transformers loads.
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
        keep_prefix: bool = False,
    ) -> None:
        from transformers import AutoModelForCausalLM

        if not Path(path).is_dir():
            raise DataError(f"--model {path}: there is no such folder; give a model folder")
        self.tokenizer = load_tokenizer(path, chat_template)
        self.batch_size, self.prefill_tokens = batch_size, prefill_tokens
        self.document_batch = self.groups_at_once = documents_at_once
        try:
            kind: Any = "auto" if dtype == "auto" else getattr(torch, dtype)
            self.model: Any = AutoModelForCausalLM.from_pretrained(str(path), dtype=kind, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            detail = " ".join(str(error).split())[:300]
            raise DataError(f"--model {path}: transformers cannot load it ({detail}); give a model folder") from None
        self.model.eval()
        self.model.to(platform.CURRENT.device)
        if not platform.CURRENT.is_cuda:
            use_cached_attention(self.model)
        self._path = Path(path)
        self._rope = Rope()
        kinds = getattr(self.model.config, "layer_types", None) or ()
        window = getattr(self.model.config, "sliding_window", None) and not kinds
        plain = (
            not window
            and all(kind == "full_attention" for kind in kinds)
            and hasattr(getattr(self.model, "model", None), "rotary_emb")
        )
        # Others keep part of their keys alone, mask by themselves, or go by a key's place in memory.
        self._can_pack = plain and not getattr(self.model, "_is_stateful", False)
        self._keeps = keep_prefix and plain and roomy_cache() is not None
        if self._keeps:
            # Read one by one, they are decoded together.
            self.groups_at_once = max(batch_size, documents_at_once)
        # Tokens whose keys and values are kept, and the cache, which may go on beyond them.
        self._kept: tuple[list[int], Any] | None = None
        # What has a state has nothing that could be shared or padded.
        self._can_share = not getattr(self.model, "_is_stateful", False)
        ends = self.model.generation_config.eos_token_id
        # What the model says that ends an answer, and what its template ends one with.
        self._ends = self.tokenizer.answer_ends() | frozenset([ends] if isinstance(ends, int) else ends or ())

    @property
    def identity(self) -> dict[str, Any]:
        # Batches change the last bits, and so now and then a greedy token.
        return {
            "engine": "transformers",
            "model": model_identity(self._path),
            "dtype": str(self.model.dtype),
            "batch_size": self.batch_size,
            "prefill_tokens": self.prefill_tokens,
            "documents_at_once": self.document_batch,
            "template": self.tokenizer.template_hash,
        }

    def answer(
        self,
        groups: Sequence[Sequence[Prompt]],
        sampling: Sampling,
        rope: Rope = MODEL_ROPE,
    ) -> list[list[Reply]]:
        self._set_rope(rope)
        rows = [[self.tokenizer.prompt(list(p.messages), p.prefix) for p in group] for group in groups]
        seeds = [[p.seed for p in group] for group in groups]
        if self._keeps and all(len(group) == 1 for group in rows):
            return self._answer_singly([group[0] for group in rows], [s[0] for s in seeds], sampling)
        if self._keeps or any(_is_mostly_shared(group) for group in rows) or len(rows) == 1:
            return [self._answer_group(r, s, sampling) for r, s in zip(rows, seeds, strict=True)]
        # Nothing to share: batches are filled over the groups.
        flat = self._answer_group([r for group in rows for r in group], [x for s in seeds for x in s], sampling)
        replies = iter(flat)
        return [[next(replies) for _ in group] for group in rows]

    def _set_rope(self, rope: Rope) -> None:
        if rope == self._rope:
            return
        import copy

        config = copy.deepcopy(self.model.config)
        if not rope.is_default:
            from megatron_longpo.model.families import config_for_export, shape_from_hf
            from megatron_longpo.model.rotary import changed_scaling

            plain = json.loads((self._path / "config.json").read_text(encoding="utf-8"))
            shape = shape_from_hf(plain, str(self._path / "config.json"))
            numbers = dict(rope.scaling or {})
            changed = shape.replace(
                rotary_base=rope.base or shape.rotary_base,
                rope_scaling=changed_scaling(shape, numbers.pop("rope_type", None), numbers, "answers"),
            )
            exported = config_for_export(plain, changed, "float32", str(self._path / "config.json"))
            config = type(config)(**exported)
        inner = self.model.model
        inner.rotary_emb = type(inner.rotary_emb)(config=config).to(self.model.device)
        self._rope = rope
        self._kept = None

    def _answer_group(self, rows: Sequence[list[int]], seeds: Sequence[int], sampling: Sampling) -> list[Reply]:
        replies: list[Reply] = []
        shared = _common_prefix(rows) if self._can_share and _is_mostly_shared(rows) else 0
        size = self.batch_size if self._can_share else 1
        if not shared and max(map(len, rows)) > self.prefill_tokens:
            # Long rows that share nothing are read one by one, in pieces: a batch of them would be one piece.
            size = 1
        with torch.inference_mode():
            cache = self._read_on(rows[0][:shared]) if len(rows) > 1 and shared else None
            if cache is None:
                # Nothing is read on from what is kept, and it is in the way.
                shared, self._kept = 0, None
            for first in range(0, len(rows), size):
                batch = list(rows[first : first + size])
                last = first + size >= len(rows)
                own = sum(len(row) - shared for row in batch)
                packed = len(batch) > 1 and shared > 0 and own <= _LONGEST_PACKED and self._can_pack
                # A cache that stays one row is cut back afterwards; one that becomes several is copied for the next batch.
                stays = cache is not None and self._can_pack and (packed or len(batch) == 1)
                mine = cache if last or stays else _copy(cache)
                if last and not stays:
                    self._kept = None
                decode = self._decode_packed if packed else self._decode
                replies += decode(batch, shared, mine, sampling, list(seeds[first : first + size]))
                if stays:
                    _crop(cache, shared)
        return replies

    def _read(self, ids: Sequence[int], cache: Any = None) -> Any:
        """The cache with one row more read, in pieces."""
        cache = self._new_cache() if cache is None else cache
        done = 0 if cache is None else cache.get_seq_length()
        for start in range(0, len(ids), self.prefill_tokens):
            piece = torch.tensor([list(ids[start : start + self.prefill_tokens])], device=self.model.device)
            positions = torch.arange(done, done + piece.shape[1], device=self.model.device)[None]
            out = self.model(
                input_ids=piece, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            cache = out.past_key_values
            done += piece.shape[1]
        return cache

    def _new_cache(self) -> Any:
        # Other models make what they need themselves.
        return roomy_cache() if self._can_pack else None

    def _answer_singly(self, rows: list[list[int]], seeds: list[int], sampling: Sampling) -> list[list[Reply]]:
        """Rows that are read one after the other, each from what the one before left, and decoded together."""
        replies: list[list[Reply]] = []
        with torch.inference_mode():
            first = 0
            cache: Any = None
            while first < len(rows):
                size = 1
                while first + size < len(rows) and size < self.batch_size:
                    longest = max(map(len, rows[first : first + size + 1]))
                    if longest * (size + 1) > _LONGEST_STACKED:
                        break
                    size += 1
                batch, own = rows[first : first + size], seeds[first : first + size]
                first += size
                if len(batch) == 1:
                    # The cache before is not needed beside the next one.
                    cache = None
                    cache = self._read_on(batch[0][:-1])
                    found = self._decode(batch, len(batch[0]) - 1, cache, sampling, own)
                else:
                    found = self._decode(batch, 0, None, sampling, own, self._stacked(batch))
                replies += [[r] for r in found]
        return replies

    def _stacked(self, rows: list[list[int]]) -> Any:
        """A cache of several rows but for their last tokens, each ending at the same place."""
        read: list[list[Any]] = []
        for row in rows:
            cache = self._read_on(row[:-1])
            # What is kept is cut and read on from; this row's part is taken out of it.
            read.append([(layer.keys.clone(), layer.values.clone()) for layer in cache.layers])
        longest = max(map(len, rows)) - 1
        result = self._new_cache()
        for number in range(len(read[0])):
            parts = []
            for which in (0, 1):
                pieces = [layers[number][which] for layers in read]
                parts.append(torch.cat([F.pad(x, (0, 0, longest - x.shape[-2], 0)) for x in pieces]))
            result.update(*parts, number)
            for layers in read:
                # Not needed twice.
                layers[number] = None
        return result

    def _read_on(self, ids: list[int]) -> Any:
        """The cache with a row read, from what is kept where that begins alike."""
        if not self._keeps:
            return self._read(ids)
        cache, done = None, 0
        if self._kept is not None:
            before, cache = self._kept
            done = next(
                (i for i, (x, y) in enumerate(zip(before, ids, strict=False)) if x != y), min(len(before), len(ids))
            )
            self._kept = None
            if done < _LEAST_KEPT:
                cache, done = None, 0
            elif cache.get_seq_length() > done:
                _crop(cache, done)
        if done < len(ids):
            cache = self._read(ids[done:], cache)
        self._kept = (ids, cache)
        return cache

    def _decode_packed(
        self, rows: list[list[int]], shared: int, cache: Any, sampling: Sampling, seeds: list[int]
    ) -> list[Reply]:
        """Rows as one sequence: [shared | own tokens of the rows, row after row | one new token of each, step after step]."""
        device, count = self.model.device, len(rows)
        own = [row[shared:] for row in rows]
        ids = torch.tensor([[t for row in own for t in row]], device=device)
        positions = torch.cat([torch.arange(shared, shared + len(row), device=device) for row in own])[None]
        # Whose each place after the shared part is; a place sees what is shared, and what is its row's up to itself.
        owner = torch.tensor([i for i, row in enumerate(own) for _ in row], device=device)
        width = len(owner)
        sees = (owner[:, None] == owner[None]) & torch.ones(width, width, dtype=torch.bool, device=device).tril()
        last = torch.tensor([len(row) for row in own], device=device).cumsum(0) - 1
        steps = torch.tensor([len(row) for row in own], device=device)
        generators = [torch.Generator(device=device).manual_seed(seed) for seed in seeds]
        written: list[list[int]] = [[] for _ in rows]
        finished = [False] * count
        everyone = torch.arange(count, device=device)
        while True:
            visible = torch.cat([sees.new_ones(len(sees), shared), sees], dim=1)
            mask = torch.zeros(visible.shape, dtype=self.model.dtype, device=device)
            mask.masked_fill_(~visible, torch.finfo(mask.dtype).min)
            out = self.model(
                input_ids=ids,
                attention_mask=mask[None, None],
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=last,
            )
            cache = out.past_key_values
            tokens = _pick(out.logits[0].float(), sampling, generators)
            if self._write(tokens, written, finished, sampling):
                break
            ids, positions = tokens[None], (shared + steps)[None]
            steps = steps + 1
            owner = torch.cat([owner, everyone])
            # Each new token sees all of its row, itself included.
            sees = everyone[:, None] == owner[None]
            last = everyone
        return self._replies(rows, written, finished)

    def _write(self, tokens: Tensor, written: list[list[int]], finished: list[bool], sampling: Sampling) -> bool:
        """Take up one more token of each row that goes on; says whether none does."""
        for i, token in enumerate(tokens.tolist()):
            if finished[i] or len(written[i]) >= sampling.max_tokens:
                continue
            if token in self._ends:
                finished[i] = True
            else:
                written[i].append(token)
        return all(f or len(w) >= sampling.max_tokens for f, w in zip(finished, written, strict=True))

    def _replies(self, rows: list[list[int]], written: list[list[int]], finished: list[bool]) -> list[Reply]:
        return [
            Reply(self.tokenizer.decode(w).strip(), f, len(row), len(w))
            for row, w, f in zip(rows, written, finished, strict=True)
        ]

    def _decode(
        self,
        rows: list[list[int]],
        shared: int,
        cache: Any,
        sampling: Sampling,
        seeds: list[int],
        stacked: Any = None,
    ) -> list[Reply]:
        """Rows as a batch, padded between the shared part and their own, so that all end at one place.

        ``stacked``: a cache of them all but for their last tokens, padded in front.
        """
        device, count = self.model.device, len(rows)
        if shared == 0 and stacked is None and count == 1 and len(rows[0]) > self.prefill_tokens:
            cache, shared = self._read(rows[0][:-1]), len(rows[0]) - 1
        if cache is None:
            cache = self._new_cache()
        elif count > 1:
            cache.batch_repeat_interleave(count)
        own = [row[shared:] for row in rows]
        width = max(map(len, own))
        ids = torch.zeros(count, width, dtype=torch.long, device=device)
        mask = torch.zeros(count, shared + width, dtype=torch.long, device=device)
        mask[:, :shared] = 1
        positions = torch.zeros(count, width, dtype=torch.long, device=device)
        for i, row in enumerate(own):
            pad = width - len(row)
            ids[i, pad:] = torch.tensor(row, device=device)
            mask[i, shared + pad :] = 1
            positions[i, pad:] = torch.arange(shared, shared + len(row), device=device)
        even = all(len(row) == width for row in own)
        if stacked is not None:
            # The padding stands as it does in the cache; of each row the last token is still to be read.
            cache, ids, positions = stacked, ids[:, -1:], positions[:, -1:]
        generators = [torch.Generator(device=device).manual_seed(seed) for seed in seeds]
        written: list[list[int]] = [[] for _ in rows]
        finished = [False] * count
        while True:
            out = self.model(
                input_ids=ids,
                # Without padding no mask is needed, and the fastest kernels take none.
                attention_mask=None if even else mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = out.past_key_values
            tokens = _pick(out.logits[:, -1].float(), sampling, generators)
            if self._write(tokens, written, finished, sampling):
                break
            ids = tokens[:, None]
            positions = positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(count, 1)], dim=1)
        return self._replies(rows, written, finished)


# The mask of packed rows has this many lines at most.
_LONGEST_PACKED = 4096

# Rows that are read one by one are decoded together up to so many tokens, padding included: their keys and values are there
# twice for a moment.
_LONGEST_STACKED = 65536

# Fewer tokens that begin alike are read again: a template's, say.
_LEAST_KEPT = 64


def _common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Tokens that all rows begin with, less one: every row must have one of its own to go on from."""
    shortest = min(map(len, rows))
    same = next((i for i in range(shortest) if any(row[i] != rows[0][i] for row in rows[1:])), shortest)
    return max(0, min(same, shortest - 1))


def _is_mostly_shared(rows: Sequence[Sequence[int]]) -> bool:
    """Whether what the rows begin with is longer than what each goes on with."""
    return len(rows) > 1 and 2 * _common_prefix(rows) >= max(map(len, rows))


def _crop(cache: Any, length: int) -> None:
    """Keep the first tokens of a cache alone."""
    if cache.get_seq_length() > length:
        # Negative: so many from the end, whatever the version of transformers.
        cache.crop(length - cache.get_seq_length())


def _copy(cache: Any) -> Any:
    import copy

    return copy.deepcopy(cache)


def _pick(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities, order = torch.softmax(logits / sampling.temperature, dim=-1).sort(descending=True)
    # The smallest set of tokens whose probability reaches top_p.
    kept = probabilities * (probabilities.cumsum(-1) - probabilities < sampling.top_p)
    drawn = [torch.multinomial(row, 1, generator=g) for row, g in zip(kept, generators, strict=True)]
    return torch.stack([o[d][0] for o, d in zip(order, drawn, strict=True)])
