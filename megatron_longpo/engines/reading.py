"""Reading prompts into caches of keys and values: in pieces, and from what the last prompt left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_longpo.data.sequence import common_prefix
from megatron_longpo.engines.cached_attention import KeyValueCache, roomy_cache

# A shorter common beginning, such as a template's, is not worth reusing.
_MINIMUM_REUSED_TOKENS = 64


def crop(cache: KeyValueCache, length: int) -> None:
    """Keep only the first ``length`` tokens of a cache."""
    surplus = cache.get_seq_length() - length
    if surplus > 0:
        # A negative number removes tokens from the end in every version of transformers.
        cache.crop(-surplus)


class PromptReader:
    """Reads prompts into caches.

    Args:
        model: transformers model.
        prefill_tokens: tokens per forward; a longer prompt is read in pieces.
        roomy: use caches with room for more tokens (``roomy_cache``). Other models make their caches themselves.
        keep: keep the cache of the last prompt, and read of the next one only what that does not already hold.
    """

    def __init__(self, model: Any, *, prefill_tokens: int, roomy: bool, keep: bool) -> None:
        self._model, self._prefill_tokens = model, prefill_tokens
        self._roomy, self._keep = roomy, keep
        # Tokens that the kept cache begins with. It may hold more after them.
        self._kept: tuple[list[int], KeyValueCache] | None = None

    def new_cache(self) -> KeyValueCache | None:
        """An empty cache, or None if the model makes its own."""
        return roomy_cache() if self._roomy else None

    def read(self, ids: Sequence[int], cache: KeyValueCache | None = None) -> KeyValueCache:
        """Read tokens into a new cache, or after what ``cache`` holds."""
        current: Any = self.new_cache() if cache is None else cache
        done = 0 if current is None else current.get_seq_length()
        for start in range(0, len(ids), self._prefill_tokens):
            piece = torch.tensor([list(ids[start : start + self._prefill_tokens])], device=self._model.device)
            positions = torch.arange(done, done + piece.shape[1], device=self._model.device)[None]
            out = self._model(
                input_ids=piece, position_ids=positions, past_key_values=current, use_cache=True, logits_to_keep=1
            )
            current = out.past_key_values
            done += piece.shape[1]
        return current  # type: ignore[no-any-return]

    def read_reusing(self, ids: list[int]) -> KeyValueCache:
        """Cache of exactly these tokens, read from where the kept cache stops agreeing with them.

        The result is kept for the next call, so the caller must crop what it appends, or call ``forget``.
        """
        if not self._keep:
            return self.read(ids)
        cache, done = None, 0
        if self._kept is not None:
            before, cache = self._kept
            done = common_prefix(before, ids)
            self._kept = None
            if done < _MINIMUM_REUSED_TOKENS:
                cache, done = None, 0
            else:
                crop(cache, done)
        if cache is None or done < len(ids):
            cache = self.read(ids[done:], cache)
        self._kept = (ids, cache)
        return cache

    def forget(self) -> None:
        """Drop the kept cache: it no longer fits the model, or its memory is needed."""
        self._kept = None

    def read_stacked(self, rows: Sequence[list[int]]) -> KeyValueCache:
        """Read rows one by one and stack their caches into one, padded in front so that all end at the same place."""
        caches: list[list[Any]] = []
        for row in rows:
            cache = self.read_reusing(row)
            # The kept cache is cropped and continued by the next row, so this row's part is copied out of it.
            caches.append([(layer.keys.clone(), layer.values.clone()) for layer in cache.layers])
        longest = max(map(len, rows))
        result = self.new_cache()
        assert result is not None
        for number in range(len(caches[0])):
            keys = _stack([layers[number][0] for layers in caches], longest)
            values = _stack([layers[number][1] for layers in caches], longest)
            result.update(keys, values, number)
            for layers in caches:
                # Free each copy as soon as it is stacked.
                layers[number] = None
        return result


def _stack(rows: Sequence[Tensor], length: int) -> Tensor:
    """Tensors [1, G, K, D] of different K as one [R, G, length, D], padded in front."""
    return torch.cat([F.pad(x, (0, 0, length - x.shape[-2], 0)) for x in rows])
