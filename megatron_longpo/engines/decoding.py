"""Decoding several rows together. Each strategy lays the rows out for the model in its own way:

    Padded    a batch; the padding stands between the shared tokens and each row's own
    Packed    one sequence under a mask, so that the keys of the shared tokens exist, and are read, once
    Stacked   a batch on caches that were read row by row and stacked

Shape legend: R = rows, T = tokens of a row or of all rows packed, V = vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_longpo.engines.base import Sampling
from megatron_longpo.engines.cached_attention import KeyValueCache


@dataclass(frozen=True)
class Row:
    """A prompt in tokens, and the seed of its sampling."""

    ids: list[int]
    seed: int


@dataclass
class Answer:
    """Tokens written for a row.

    Attributes:
        ids: tokens without the one that ended the answer.
        finished: whether the model ended it.
    """

    ids: list[int] = field(default_factory=list)
    finished: bool = False


@dataclass(frozen=True)
class Decoder:
    """What every strategy decodes with.

    Attributes:
        model: transformers model.
        sampling: how tokens are chosen.
        ends: tokens that end an answer.
    """

    model: Any
    sampling: Sampling
    ends: frozenset[int]


class Strategy(ABC):
    """Decodes rows together, one token of each per step.

    Args:
        decoder: model, sampling and end tokens.
        cache: keys and values read before; None for a model that makes its own cache.
    """

    def __init__(self, decoder: Decoder, cache: KeyValueCache | None) -> None:
        self._decoder, self._cache = decoder, cache
        self._device = decoder.model.device

    def decode(self, rows: Sequence[Row]) -> list[Answer]:
        """Write an answer for each row, until all are finished or at the token limit."""
        sampling = self._decoder.sampling
        # A generator per row: what a row draws does not depend on the rows beside it.
        generators = [torch.Generator(device=self._device).manual_seed(row.seed) for row in rows]
        answers = [Answer() for _ in rows]
        inputs = self._first_step(rows)
        while True:
            out = self._decoder.model(**inputs, past_key_values=self._cache, use_cache=True)
            self._cache = out.past_key_values
            tokens_R = choose_tokens(self._logits(out.logits).float(), sampling, generators)
            self._append(tokens_R, answers)
            if all(a.finished or len(a.ids) >= sampling.max_tokens for a in answers):
                return answers
            inputs = self._next_step(tokens_R)

    def _append(self, tokens_R: Tensor, answers: Sequence[Answer]) -> None:
        """Add a token to each answer that is still open."""
        for answer, token in zip(answers, tokens_R.tolist(), strict=True):
            if answer.finished or len(answer.ids) >= self._decoder.sampling.max_tokens:
                continue
            if token in self._decoder.ends:
                answer.finished = True
            else:
                answer.ids.append(token)

    @abstractmethod
    def _first_step(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Model inputs of the tokens that are not in the cache yet."""

    @abstractmethod
    def _next_step(self, tokens_R: Tensor) -> dict[str, Any]:
        """Model inputs of the tokens just chosen."""

    @abstractmethod
    def _logits(self, logits: Tensor) -> Tensor:
        """Logits [R, V] of the last token of each row, from the model's output."""


class Padded(Strategy):
    """Rows as a batch, padded between the shared tokens and their own, so that all end at the same place.

    With several rows the cache is repeated for each of them, so it is of no use afterwards.

    Args:
        decoder: see ``Strategy``.
        cache: keys and values of the first ``shared`` tokens of every row.
        shared: number of tokens in the cache.
    """

    def __init__(self, decoder: Decoder, cache: KeyValueCache | None, *, shared: int) -> None:
        super().__init__(decoder, cache)
        self._shared = shared

    def _first_step(self, rows: Sequence[Row]) -> dict[str, Any]:
        if self._cache is not None and len(rows) > 1 and self._shared:
            self._cache.batch_repeat_interleave(len(rows))
        own = [row.ids[self._shared :] for row in rows]
        width = max(map(len, own))
        ids_RT = torch.zeros(len(rows), width, dtype=torch.long, device=self._device)
        mask_RT = torch.zeros(len(rows), self._shared + width, dtype=torch.long, device=self._device)
        mask_RT[:, : self._shared] = 1
        positions_RT = torch.zeros(len(rows), width, dtype=torch.long, device=self._device)
        for i, row in enumerate(own):
            pad = width - len(row)
            ids_RT[i, pad:] = torch.tensor(row, device=self._device)
            mask_RT[i, self._shared + pad :] = 1
            positions_RT[i, pad:] = torch.arange(self._shared, self._shared + len(row), device=self._device)
        # Without padding no mask is needed, and the fastest kernels take none.
        self._needs_mask = any(len(row) < width for row in own)
        self._mask_RT, self._positions_RT = mask_RT, positions_RT
        return self._inputs(ids_RT)

    def _next_step(self, tokens_R: Tensor) -> dict[str, Any]:
        self._positions_RT = self._positions_RT[:, -1:] + 1
        self._mask_RT = torch.cat([self._mask_RT, self._mask_RT.new_ones(len(tokens_R), 1)], dim=1)
        return self._inputs(tokens_R[:, None])

    def _inputs(self, ids_RT: Tensor) -> dict[str, Any]:
        return {
            "input_ids": ids_RT,
            "attention_mask": self._mask_RT if self._needs_mask else None,
            "position_ids": self._positions_RT,
            "logits_to_keep": 1,
        }

    def _logits(self, logits: Tensor) -> Tensor:
        return logits[:, -1]


class Stacked(Padded):
    """Rows as a batch on a cache that holds all but the last token of each, padded in front (``PromptReader.read_stacked``)."""

    def __init__(self, decoder: Decoder, cache: KeyValueCache) -> None:
        super().__init__(decoder, cache, shared=0)

    def _first_step(self, rows: Sequence[Row]) -> dict[str, Any]:
        # The padding stands as it does in the cache; only the last token of each row is still to be read.
        ids_RT = super()._first_step(rows)["input_ids"]
        self._positions_RT = self._positions_RT[:, -1:]
        return self._inputs(ids_RT[:, -1:])


class Packed(Strategy):
    """Rows as one sequence: shared tokens, then the rows' own tokens one row after the other, then a token of each per step.

    The keys of the shared tokens exist once and are read once per step. A mask lets each row see the shared tokens and
    itself. The cache stays that of one sequence: cropped back to ``shared`` tokens, it serves the next rows.

    Args:
        decoder: see ``Strategy``.
        cache: keys and values of the first ``shared`` tokens of every row.
        shared: number of tokens in the cache.
    """

    def __init__(self, decoder: Decoder, cache: KeyValueCache, *, shared: int) -> None:
        super().__init__(decoder, cache)
        self._shared = shared

    def _first_step(self, rows: Sequence[Row]) -> dict[str, Any]:
        device = self._device
        own = [row.ids[self._shared :] for row in rows]
        lengths_R = torch.tensor([len(row) for row in own], device=device)
        ids_T = torch.tensor([token for row in own for token in row], device=device)
        positions_T = torch.cat(
            [torch.arange(self._shared, self._shared + len(row), device=device) for row in own],
        )
        # Row of each place after the shared tokens.
        self._owner_T = torch.tensor([i for i, row in enumerate(own) for _ in row], device=device)
        causal_TT = torch.ones(len(ids_T), len(ids_T), dtype=torch.bool, device=device).tril()
        self._rows_R = torch.arange(len(rows), device=device)
        self._lengths_R = lengths_R
        return self._inputs(
            ids_T,
            positions_T,
            sees=(self._owner_T[:, None] == self._owner_T[None]) & causal_TT,
            last_R=lengths_R.cumsum(0) - 1,
        )

    def _next_step(self, tokens_R: Tensor) -> dict[str, Any]:
        positions_R = self._shared + self._lengths_R
        self._lengths_R = self._lengths_R + 1
        self._owner_T = torch.cat([self._owner_T, self._rows_R])
        # Each new token sees its whole row, itself included.
        sees = self._rows_R[:, None] == self._owner_T[None]
        return self._inputs(tokens_R, positions_R, sees=sees, last_R=self._rows_R)

    def _inputs(self, ids_T: Tensor, positions_T: Tensor, *, sees: Tensor, last_R: Tensor) -> dict[str, Any]:
        """Model inputs.

        Args:
            ids_T, positions_T: tokens to read.
            sees: [T, places after the shared tokens], whether a token sees a place.
            last_R: index in ``ids_T`` of each row's last token.
        """
        visible = torch.cat([sees.new_ones(len(sees), self._shared), sees], dim=1)
        mask = torch.zeros(visible.shape, dtype=self._decoder.model.dtype, device=self._device)
        mask.masked_fill_(~visible, torch.finfo(mask.dtype).min)
        return {
            "input_ids": ids_T[None],
            "attention_mask": mask[None, None],
            "position_ids": positions_T[None],
            "logits_to_keep": last_R,
        }

    def _logits(self, logits: Tensor) -> Tensor:
        return logits[0]


def choose_tokens(logits_RV: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """The next token of each row, greedily or by nucleus sampling.

    Args:
        logits_RV: logits.
        sampling: temperature and top-p.
        generators: random generator of each row.

    Returns:
        [R] token ids.
    """
    if sampling.temperature == 0:
        return logits_RV.argmax(-1)
    probabilities, order = torch.softmax(logits_RV / sampling.temperature, dim=-1).sort(descending=True)
    # The smallest set of tokens whose probability reaches top_p.
    kept = probabilities * (probabilities.cumsum(-1) - probabilities < sampling.top_p)
    drawn = [torch.multinomial(row, 1, generator=g) for row, g in zip(kept, generators, strict=True)]
    return torch.stack([o[d][0] for o, d in zip(order, drawn, strict=True)])
