"""The preference sample: what is stored of it, and the rows that the losses are computed on.

A sample is one long document with its turns. It is stored as pieces, token runs with a mode that says which rows the
run belongs to, so that a document's tokens are stored once however many rows contain them. In storage order::

    context, then for each turn:  prompt, [own prompt], chosen, rejected, short prompt, short chosen, short rejected

``own prompt`` is the turn's question directly after the document, stored from the second turn on, for rows of
independent turns (paper, Eq. 13). Data that came tokenised has its long rows cut into runs the same way.

Shape legend: L = tokens of one row.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag
from typing import Literal

import numpy as np

from megatron_longpo.data.sequence import NO_RESPONSE, IntArray, Row, common_prefix
from megatron_longpo.errors import DataError


class Mode(IntFlag):
    """Role of a piece; the number kept in the index. No row bit at all: the own prompt of an independent turn."""

    OWN_PROMPT = 0
    CHOSEN = 1
    REJECTED = 2
    SHORT_CHOSEN = 4
    SHORT_REJECTED = 8
    RESPONSE = 16
    NO_NLL = 32
    TURN = 64

    @property
    def long(self) -> bool:
        return bool(self & (Mode.CHOSEN | Mode.REJECTED))

    @property
    def short(self) -> bool:
        return bool(self & (Mode.SHORT_CHOSEN | Mode.SHORT_REJECTED))


LONG = Mode.CHOSEN | Mode.REJECTED
SHORT = Mode.SHORT_CHOSEN | Mode.SHORT_REJECTED
# The text schema's modes, in storage order within a turn.
CONTEXT = LONG
PROMPT = LONG | Mode.TURN
CHOSEN_RESPONSE = Mode.CHOSEN | Mode.RESPONSE
REJECTED_RESPONSE = Mode.REJECTED | Mode.RESPONSE
SHORT_PROMPT = SHORT
SHORT_CHOSEN_RESPONSE = Mode.SHORT_CHOSEN | Mode.RESPONSE
SHORT_REJECTED_RESPONSE = Mode.SHORT_REJECTED | Mode.RESPONSE

_ALL_MODES = 127


@dataclass(frozen=True)
class Piece:
    """A run of tokens with its role."""

    tokens: IntArray
    mode: Mode


@dataclass(frozen=True)
class Sample:
    """The pieces of one document, in storage order."""

    pieces: tuple[Piece, ...]

    @classmethod
    def from_arrays(cls, tokens: Sequence[np.ndarray], modes: Sequence[int]) -> Sample:
        return cls(
            tuple(
                Piece(np.asarray(t, dtype=np.int64), Mode(int(m) & _ALL_MODES))
                for t, m in zip(tokens, modes, strict=True)
            )
        )

    def check(self) -> None:
        """Whether the pieces make rows.

        Raises:
            DataError: a side without a response, or without a token before it.
        """
        for side, name in ((Mode.CHOSEN, "chosen"), (Mode.REJECTED, "rejected")):
            pieces = [p for p in self.pieces if p.mode & side]
            if not any(p.mode & Mode.RESPONSE and len(p.tokens) for p in pieces):
                raise DataError(f"the long {name} row has no response token; each side needs at least one")
            first = next(p for p in pieces if len(p.tokens))
            if first.mode & Mode.RESPONSE:
                raise DataError(f"the long {name} row begins with a response; a response needs something before it")

    def length(self, side: Mode) -> int:
        """Tokens of the chained row (or, for a short side, of all its rows) of a side."""
        return sum(len(p.tokens) for p in self.pieces if p.mode & side)

    @property
    def long_length(self) -> int:
        """Tokens of the longer chained row."""
        return max(self.length(Mode.CHOSEN), self.length(Mode.REJECTED))

    @property
    def turns(self) -> int:
        return sum(bool(p.mode & Mode.TURN) for p in self.pieces)

    def turn_pieces(self) -> list[list[Piece]]:
        """Pieces of each turn."""
        turns: list[list[Piece]] = []
        for piece in self.pieces:
            if piece.mode & Mode.TURN:
                turns.append([])
            if turns:
                turns[-1].append(piece)
        return turns


def long_rows(
    sample: Sample,
    *,
    slot: int,
    turns: Literal["chained", "independent"],
    nll_scope: Literal["sequence", "response"],
    sides: Sequence[Mode] = (Mode.CHOSEN, Mode.REJECTED),
) -> list[Row]:
    """Rows that see the whole document.

    Args:
        sample: the sample.
        slot: its number in the batch; its response slots are 2 * slot (chosen) and 2 * slot + 1 (rejected).
        turns: chained, one row a side; independent, one row a side and turn.
        nll_scope: which targets of the chosen rows count in the NLL. A token that several chosen rows have in common
            counts once.
        sides: which sides to make.
    """
    rows = []
    counted: list[IntArray] = []
    for side in sides:
        for pieces in _chained(sample, side) if turns == "chained" else _independent(sample, side):
            chosen = side == Mode.CHOSEN
            row = _row(pieces, slot * 2 + (not chosen), slot, nll_scope if chosen else None)
            if chosen:
                for earlier in counted:
                    row.nll_L[: common_prefix(earlier, row.tokens_L)] = False
                counted.append(row.tokens_L)
            rows.append(row)
    return rows


def short_rows(sample: Sample, *, slot: int) -> list[Row]:
    """Rows that see a turn's short chunk alone: what the LongPO reference scores. Response slots as in ``long_rows``."""
    rows = []
    for turn in sample.turn_pieces():
        for number, side in enumerate((Mode.SHORT_CHOSEN, Mode.SHORT_REJECTED)):
            pieces = [p for p in turn if p.mode & side]
            if pieces:
                rows.append(_row(pieces, slot * 2 + number, slot, None))
    return rows


def _chained(sample: Sample, side: Mode) -> list[list[Piece]]:
    return [[p for p in sample.pieces if p.mode & side]]


def _independent(sample: Sample, side: Mode) -> list[list[Piece]]:
    turns = sample.turn_pieces()
    context = []
    for piece in sample.pieces:
        if piece.mode & Mode.TURN:
            break
        context.append(piece)
    rows = []
    for turn in turns:
        own = [p for p in turn if not p.mode.long and not p.mode.short]
        prompts = own or [p for p in turn if p.mode & side and not p.mode & Mode.RESPONSE]
        rows.append([*context, *prompts, *(p for p in turn if p.mode & side and p.mode & Mode.RESPONSE)])
    return rows


def _row(pieces: Sequence[Piece], response: int, slot: int, nll_scope: str | None) -> Row:
    tokens = np.concatenate([p.tokens for p in pieces])
    responses = np.full(len(tokens), NO_RESPONSE, np.int64)
    nll = np.zeros(len(tokens), np.bool_)
    start = 0
    for piece in pieces:
        here = slice(start, start + len(piece.tokens))
        is_response = bool(piece.mode & Mode.RESPONSE)
        if is_response:
            responses[here] = response
        nll[here] = (nll_scope == "sequence" and not piece.mode & Mode.NO_NLL) or (
            nll_scope == "response" and is_response
        )
        start = here.stop
    return Row(tokens, responses, nll, slot)


# --------------------------------------------------------------------------------------------------
# The published tokenised schema
# --------------------------------------------------------------------------------------------------

TOKENISED_COLUMNS = (
    "chosen_input_ids",
    "chosen_labels",
    "rejected_input_ids",
    "rejected_labels",
    "ref_chosen_input_ids",
    "ref_chosen_labels",
    "ref_rejected_input_ids",
    "ref_rejected_labels",
)
_IGNORED = -100


class BadRow(ValueError):
    """A row that cannot become a sample; ``reason`` is what it is counted under."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def from_tokenised(row: dict[str, object], vocab_size: int) -> Sample:
    """A sample from one row of the published schema (METHOD: lists of ids, labels -100 where there is no loss).

    Padding (attention mask 0) is dropped. What chosen and rejected have in common before their first response is stored
    once. ``chosen_lm_labels``, where given, says which tokens count in the NLL.

    Raises:
        BadRow: missing column, wrong type, ids outside the vocabulary, labels that differ from the ids, no response.
    """
    chosen, chosen_loss, chosen_nll = _masked(row, "chosen", vocab_size, nll=True)
    rejected, rejected_loss, _ = _masked(row, "rejected", vocab_size)
    for name, loss in (("chosen", chosen_loss), ("rejected", rejected_loss)):
        if not loss.any():
            raise BadRow("no_response", f"{name}_labels has no token with a loss")
        if loss[0]:
            raise BadRow("no_prompt", f"{name}_labels counts the first token, which nothing predicts")
    first_loss = min(int(np.argmax(chosen_loss)), int(np.argmax(rejected_loss)))
    shared = min(common_prefix(chosen, rejected), first_loss)
    pieces = [*_runs(chosen[:shared], chosen_loss[:shared], chosen_nll[:shared], LONG)]
    pieces += _runs(chosen[shared:], chosen_loss[shared:], chosen_nll[shared:], Mode.CHOSEN)
    pieces += _runs(rejected[shared:], rejected_loss[shared:], np.ones(len(rejected) - shared, bool), Mode.REJECTED)

    turns = _nested(row, "ref_chosen_input_ids")
    if len(turns) == 0:
        raise BadRow("no_turn", "ref_chosen_input_ids holds no turn")
    for name in ("ref_chosen_labels", "ref_rejected_input_ids", "ref_rejected_labels"):
        if len(_nested(row, name)) != len(turns):
            raise BadRow(
                "turns_differ", f"{name} has {len(_nested(row, name))} turns, ref_chosen_input_ids {len(turns)}"
            )
    for turn in range(len(turns)):
        a, a_loss, _ = _masked(row, "ref_chosen", vocab_size, turn)
        b, b_loss, _ = _masked(row, "ref_rejected", vocab_size, turn)
        if not a_loss.any() or not b_loss.any():
            raise BadRow("no_response", f"turn {turn} of the reference rows has no token with a loss")
        if a_loss[0] or b_loss[0]:
            raise BadRow("no_prompt", f"turn {turn} of the reference rows counts its first token")
        shared = min(common_prefix(a, b), int(np.argmax(a_loss)), int(np.argmax(b_loss)))
        pieces.append(Piece(a[:shared], SHORT | Mode.TURN))
        pieces += _runs(a[shared:], a_loss[shared:], np.ones(len(a) - shared, bool), Mode.SHORT_CHOSEN)
        pieces += _runs(b[shared:], b_loss[shared:], np.ones(len(b) - shared, bool), Mode.SHORT_REJECTED)
    long_responses = {s: sum(map(bool, (loss[1:] & ~loss[:-1]))) for s, loss in enumerate((chosen_loss, rejected_loss))}
    if max(long_responses.values()) < 1:
        raise BadRow("no_response", "no response in the long rows")
    return Sample(tuple(pieces))


def _runs(tokens: IntArray, loss: np.ndarray, nll: np.ndarray, mode: Mode) -> list[Piece]:
    """Cut where the loss or NLL mask changes."""
    if not len(tokens):
        return []
    kind = loss.astype(np.int8) * 2 + nll.astype(np.int8)
    cuts = [0, *(np.flatnonzero(np.diff(kind)) + 1).tolist(), len(tokens)]
    return [
        Piece(
            tokens[a:b],
            mode | (Mode.RESPONSE if loss[a] else Mode(0)) | (Mode(0) if nll[a] else Mode.NO_NLL),
        )
        for a, b in itertools.pairwise(cuts)
    ]


def _nested(row: dict[str, object], name: str) -> list[object]:
    value = row.get(name)
    if value is None:
        raise BadRow("missing_column", f"{name} is missing")
    if isinstance(value, np.ndarray):
        value = list(value)
    if not isinstance(value, list) or (value and not isinstance(value[0], (list, np.ndarray))):
        raise BadRow("wrong_type", f"{name} is not a list of lists, one a turn")
    return value


def _ids(value: object, name: str) -> IntArray:
    if isinstance(value, list) and any(type(v) is not int for v in value):
        raise BadRow("wrong_type", f"{name} holds something that is not a whole number")
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):
        raise BadRow("wrong_type", f"{name} is not a list of whole numbers") from None
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise BadRow("wrong_type", f"{name} is not a list of whole numbers")
    return array.astype(np.int64)


def _masked(
    row: dict[str, object], side: str, vocab_size: int, turn: int | None = None, nll: bool = False
) -> tuple[IntArray, np.ndarray, np.ndarray]:
    """Ids without padding, their loss mask and their NLL mask."""

    def column(name: str, required: bool = True) -> IntArray | None:
        full = f"{side}_{name}"
        value = row.get(full)
        if value is None:
            if required:
                raise BadRow("missing_column", f"{full} is missing")
            return None
        if turn is not None:
            nested = _nested(row, full)
            if turn >= len(nested):
                raise BadRow("turns_differ", f"{full} has {len(nested)} turns only")
            return _ids(nested[turn], f"{full}[{turn}]")
        return _ids(value, full)

    ids, labels = column("input_ids"), column("labels")
    assert ids is not None and labels is not None
    if len(ids) != len(labels):
        raise BadRow("lengths_differ", f"{side}_labels has {len(labels)} entries, {side}_input_ids {len(ids)}")
    lm_labels = column("lm_labels", required=False) if nll else None
    mask = column("attention_mask", required=False)
    for other, name in ((lm_labels, "lm_labels"), (mask, "attention_mask")):
        if other is not None and len(other) != len(ids):
            raise BadRow("lengths_differ", f"{side}_{name} has {len(other)} entries, {side}_input_ids {len(ids)}")
    keep = np.ones(len(ids), bool) if mask is None else mask != 0
    ids, labels = ids[keep], labels[keep]
    if len(ids) < 2:
        raise BadRow("empty", f"{side} has {len(ids)} tokens; a row needs at least 2")
    if ids.min() < 0 or ids.max() >= vocab_size:
        bad = ids[(ids < 0) | (ids >= vocab_size)][0]
        raise BadRow("id_outside_vocabulary", f"{side}_input_ids holds {bad}; ids lie in 0..{vocab_size - 1}")
    loss = labels != _IGNORED
    if not np.array_equal(labels[loss], ids[loss]):
        raise BadRow("labels_differ", f"{side}_labels differs from {side}_input_ids where it has a loss")
    nll_mask = np.ones(len(ids), bool) if lm_labels is None else lm_labels[keep] != _IGNORED
    return ids, loss, nll_mask
