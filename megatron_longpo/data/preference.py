"""The preference sample: how it is stored, and the rows that the losses are computed on.

A sample is one long document with its turns. It is stored as pieces, runs of tokens with a mode that says which rows the run
belongs to, so that the tokens of a document are stored once however many rows contain them. In storage order::

    context, then for each turn:  prompt, [own prompt], chosen, rejected, short prompt, short chosen, short rejected

``own prompt`` is the turn's question directly after the document, for rows of independent turns (paper, Eq. 13); it is stored
from the second turn on, and for the first where it differs. What is in an answer and has no loss (empty thinking, results of
tools) is a piece of its side without ``RESPONSE``. The long rows of data that was already tokenised are cut into runs likewise.

Shape legend: L = tokens of one row.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntFlag
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_longpo.data.sequence import NO_RESPONSE, IntArray, Row, common_prefix
from megatron_longpo.errors import DataError


class Mode(IntFlag):
    """Role of a piece, stored as a number in the index. A piece without any row bit is an own prompt.

    Attributes:
        CHOSEN, REJECTED: belongs to the long row of that side.
        SHORT_CHOSEN, SHORT_REJECTED: belongs to the short row of that side.
        RESPONSE: tokens of an answer.
        NO_NLL: does not count in the NLL.
        TURN: begins a turn.
    """

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
        """Whether the piece belongs to a long row."""
        return bool(self & (Mode.CHOSEN | Mode.REJECTED))

    @property
    def short(self) -> bool:
        """Whether the piece belongs to a short row."""
        return bool(self & (Mode.SHORT_CHOSEN | Mode.SHORT_REJECTED))


LONG = Mode.CHOSEN | Mode.REJECTED
SHORT = Mode.SHORT_CHOSEN | Mode.SHORT_REJECTED
# Modes of the text schema, in storage order within a turn.
CONTEXT = LONG
PROMPT = LONG | Mode.TURN
CHOSEN_RESPONSE = Mode.CHOSEN | Mode.RESPONSE
REJECTED_RESPONSE = Mode.REJECTED | Mode.RESPONSE
SHORT_PROMPT = SHORT
SHORT_CHOSEN_RESPONSE = Mode.SHORT_CHOSEN | Mode.RESPONSE
SHORT_REJECTED_RESPONSE = Mode.SHORT_REJECTED | Mode.RESPONSE

# The modes that pieces have. NO_NLL is only in data that was already tokenised.
KNOWN_MODES = frozenset(
    mode | no_nll
    for no_nll in (Mode(0), Mode.NO_NLL)
    for mode in (
        Mode.OWN_PROMPT,
        CONTEXT,
        PROMPT,
        *(side | response for side in (Mode.CHOSEN, Mode.REJECTED) for response in (Mode(0), Mode.RESPONSE)),
        SHORT_PROMPT,
        SHORT_PROMPT | Mode.TURN,
        *(
            side | response
            for side in (Mode.SHORT_CHOSEN, Mode.SHORT_REJECTED)
            for response in (Mode(0), Mode.RESPONSE)
        ),
    )
)

# All bits of a mode: the index stores signed bytes.
_ALL_MODES = 127


@dataclass(frozen=True)
class Piece:
    """A run of tokens with its role."""

    tokens: IntArray
    mode: Mode


@dataclass(frozen=True)
class Sample:
    """The pieces of one document, in storage order.

    Attributes:
        pieces: the pieces.
        weight: factor of the sample's loss.
    """

    pieces: tuple[Piece, ...]
    weight: float = 1.0

    @classmethod
    def from_arrays(cls, tokens: Sequence[np.ndarray], modes: Sequence[int]) -> Sample:
        """Sample from the tokens and modes of its pieces, as the index has them."""
        return cls(
            tuple(
                Piece(np.asarray(t, dtype=np.int64), Mode(int(m) & _ALL_MODES))
                for t, m in zip(tokens, modes, strict=True)
            )
        )

    def check(self) -> None:
        """Check that the pieces make rows.

        Raises:
            DataError: a side has no response, or begins with one.
        """
        for side, name in ((Mode.CHOSEN, "chosen"), (Mode.REJECTED, "rejected")):
            pieces = [p for p in self.pieces if p.mode & side]
            if not any(p.mode & Mode.RESPONSE and len(p.tokens) for p in pieces):
                raise DataError(f"the long {name} row has no response token; each side needs at least one")
            first = next(p for p in pieces if len(p.tokens))
            if first.mode & Mode.RESPONSE:
                raise DataError(f"the long {name} row begins with a response; a response needs something before it")

    def length(self, side: Mode) -> int:
        """Number of tokens in the chained row of a side, or, for a short side, in all its rows."""
        return sum(len(p.tokens) for p in self.pieces if p.mode & side)

    @property
    def long_length(self) -> int:
        """Number of tokens in the longer chained row."""
        return max(self.length(Mode.CHOSEN), self.length(Mode.REJECTED))

    @property
    def turns(self) -> int:
        """Number of turns."""
        return sum(bool(p.mode & Mode.TURN) for p in self.pieces)

    def turn_pieces(self) -> list[list[Piece]]:
        """Pieces of each turn; those before the first turn are left out."""
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
        slot: number of the sample in the batch; its response slots are 2 * slot (chosen) and 2 * slot + 1 (rejected).
        turns: ``chained`` makes one row per side, ``independent`` one per side and turn.
        nll_scope: which targets of the chosen rows count in the NLL: all, or only responses. A token that several chosen rows
            share counts once.
        sides: sides to make rows of.
    """
    rows = []
    counted: list[IntArray] = []
    for side in sides:
        for pieces in _chained(sample, side) if turns == "chained" else _independent(sample, side):
            chosen = side == Mode.CHOSEN
            row = _row(pieces, response=slot * 2 + (not chosen), slot=slot, nll_scope=nll_scope if chosen else None)
            if chosen:
                for earlier in counted:
                    row.nll_L[: common_prefix(earlier, row.tokens_L)] = False
                counted.append(row.tokens_L)
            rows.append(row)
    return rows


def short_rows(sample: Sample, *, slot: int) -> list[Row]:
    """Rows that see only a turn's chunk: what the LongPO reference scores. Response slots are those of ``long_rows``."""
    rows = []
    for turn in sample.turn_pieces():
        for number, side in enumerate((Mode.SHORT_CHOSEN, Mode.SHORT_REJECTED)):
            pieces = [p for p in turn if p.mode & side]
            if pieces:
                rows.append(_row(pieces, response=slot * 2 + number, slot=slot, nll_scope=None))
    return rows


def _chained(sample: Sample, side: Mode) -> list[list[Piece]]:
    """Pieces of the row in which all turns follow one another."""
    return [[p for p in sample.pieces if p.mode & side]]


def _independent(sample: Sample, side: Mode) -> list[list[Piece]]:
    """Pieces of the rows in which each turn follows the document by itself."""
    turns = sample.turn_pieces()
    context = []
    for piece in sample.pieces:
        if piece.mode & Mode.TURN:
            break
        context.append(piece)
    rows = []
    for turn in turns:
        own = [p for p in turn if not p.mode.long and not p.mode.short]
        # The chained prompt gives way to the turn's own. What else has no loss (empty thinking, results of tools) stays in place.
        rows.append([*context, *own, *(p for p in turn if p.mode & side and not (own and p.mode & Mode.TURN))])
    return rows


def _row(pieces: Sequence[Piece], *, response: int, slot: int, nll_scope: str | None) -> Row:
    """Concatenate pieces to a row; its responses are added to sum ``response``, its NLL to mean ``slot``."""
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
    return Row(tokens_L=tokens, response_L=responses, nll_L=nll, sample=slot)


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
# Read where they are there.
OPTIONAL_COLUMNS = (
    *("chosen_attention_mask", "rejected_attention_mask", "ref_chosen_attention_mask", "ref_rejected_attention_mask"),
    "chosen_lm_labels",
)
_IGNORED = -100


class BadRow(ValueError):
    """A row that cannot become a sample.

    Args:
        reason: name that it is counted under.
        detail: what is wrong, for people.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def weight_of(row: Mapping[str, object]) -> float:
    """Weight of an input row's loss: its key ``weight``, or 1.

    Raises:
        BadRow: it is not a finite number of at least 0.
    """
    weight = row.get("weight")
    if weight is None:
        return 1.0
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise BadRow("bad_weight", f"weight={weight!r} is not a finite number of at least 0")
    return float(weight)


def from_tokenised(row: dict[str, object], vocab_size: int) -> Sample:
    """Make a sample of one row of the published schema: lists of ids, and labels that are -100 where there is no loss.

    Padding (attention mask 0) is dropped. Tokens that chosen and rejected share before their first response are stored once.
    ``chosen_lm_labels``, if given, says which tokens count in the NLL.

    Args:
        row: columns of the row.
        vocab_size: upper bound of the ids, exclusive.

    Raises:
        BadRow: a column is missing or of the wrong type, an id is outside the vocabulary, labels differ from the ids, or there
            is no response.
    """
    chosen = _masked(row, "chosen", vocab_size, nll=True)
    rejected = _masked(row, "rejected", vocab_size)
    for name, tokens in (("chosen", chosen), ("rejected", rejected)):
        if not tokens.loss.any():
            raise BadRow("no_response", f"{name}_labels has no token with a loss")
        if tokens.loss[0]:
            raise BadRow("no_prompt", f"{name}_labels counts the first token, which nothing predicts")
    shared = min(common_prefix(chosen.ids, rejected.ids), chosen.first_loss, rejected.first_loss)
    pieces = [*_runs(chosen.before(shared), LONG)]
    pieces += _runs(chosen.after(shared), Mode.CHOSEN)
    pieces += _runs(rejected.after(shared), Mode.REJECTED)

    turns = _nested(row, "ref_chosen_input_ids")
    if len(turns) == 0:
        raise BadRow("no_turn", "ref_chosen_input_ids holds no turn")
    for name in ("ref_chosen_labels", "ref_rejected_input_ids", "ref_rejected_labels"):
        if len(_nested(row, name)) != len(turns):
            raise BadRow(
                "turns_differ", f"{name} has {len(_nested(row, name))} turns, ref_chosen_input_ids {len(turns)}"
            )
    for turn in range(len(turns)):
        short_chosen = _masked(row, "ref_chosen", vocab_size, turn)
        short_rejected = _masked(row, "ref_rejected", vocab_size, turn)
        if not short_chosen.loss.any() or not short_rejected.loss.any():
            raise BadRow("no_response", f"turn {turn} of the reference rows has no token with a loss")
        if short_chosen.loss[0] or short_rejected.loss[0]:
            raise BadRow("no_prompt", f"turn {turn} of the reference rows counts its first token")
        shared = common_prefix(short_chosen.ids, short_rejected.ids)
        shared = min(shared, short_chosen.first_loss, short_rejected.first_loss)
        pieces.append(Piece(short_chosen.ids[:shared], SHORT | Mode.TURN))
        pieces += _runs(short_chosen.after(shared), Mode.SHORT_CHOSEN)
        pieces += _runs(short_rejected.after(shared), Mode.SHORT_REJECTED)
    return Sample(tuple(pieces))


@dataclass(frozen=True)
class _Masked:
    """Tokens of a row without padding.

    Attributes:
        ids: token ids.
        loss: whether a token belongs to a response.
        nll: whether a token counts in the NLL.
    """

    ids: IntArray
    loss: NDArray[np.bool_]
    nll: NDArray[np.bool_]

    @property
    def first_loss(self) -> int:
        """Place of the first response token."""
        return int(np.argmax(self.loss))

    def before(self, place: int) -> _Masked:
        return _Masked(ids=self.ids[:place], loss=self.loss[:place], nll=self.nll[:place])

    def after(self, place: int) -> _Masked:
        return _Masked(ids=self.ids[place:], loss=self.loss[place:], nll=self.nll[place:])


def _runs(tokens: _Masked, mode: Mode) -> list[Piece]:
    """Cut tokens into pieces where a mask changes."""
    if not len(tokens.ids):
        return []
    kind = tokens.loss.astype(np.int8) * 2 + tokens.nll.astype(np.int8)
    cuts = [0, *(np.flatnonzero(np.diff(kind)) + 1).tolist(), len(kind)]
    pieces = []
    for start, end in itertools.pairwise(cuts):
        response = Mode.RESPONSE if tokens.loss[start] else Mode(0)
        no_nll = Mode(0) if tokens.nll[start] else Mode.NO_NLL
        pieces.append(Piece(tokens.ids[start:end], mode | response | no_nll))
    return pieces


def _nested(row: dict[str, object], name: str) -> list[object]:
    """A column with one list per turn."""
    value = row.get(name)
    if value is None:
        raise BadRow("missing_column", f"{name} is missing")
    if isinstance(value, np.ndarray):
        value = list(value)
    if not isinstance(value, list) or (value and not isinstance(value[0], (list, np.ndarray))):
        raise BadRow("wrong_type", f"{name} is not a list of lists, one a turn")
    return value


def _ids(value: object, name: str) -> IntArray:
    """A list of whole numbers as an array."""
    if isinstance(value, list) and any(type(v) is not int for v in value):
        raise BadRow("wrong_type", f"{name} holds something that is not a whole number")
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):
        raise BadRow("wrong_type", f"{name} is not a list of whole numbers") from None
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise BadRow("wrong_type", f"{name} is not a list of whole numbers")
    return array.astype(np.int64)


def _check_mask(name: str, mask: IntArray | None, keep: NDArray[np.bool_], labels: IntArray) -> None:
    """Raise BadRow for an attention mask that hides more than padding: what is left would be another text."""
    if mask is None:
        return
    if (mask[keep] != 1).any():
        raise BadRow("wrong_type", f"{name} holds {int(np.max(mask[keep]))}; a mask is 0 (padding) or 1")
    places = np.flatnonzero(keep)
    if len(places) and places[-1] - places[0] + 1 != len(places):
        raise BadRow(
            "mask_with_holes", f"{name} is 0 between tokens; only padding at the beginning or end can be left out"
        )
    if (labels[~keep] != _IGNORED).any():
        raise BadRow("labels_differ", f"{name} hides a token whose label counts")


def _masked(row: dict[str, object], side: str, vocab_size: int, turn: int | None = None, nll: bool = False) -> _Masked:
    """Tokens of one side of a row.

    Args:
        row: columns of the row.
        side: beginning of the columns' names.
        vocab_size: upper bound of the ids, exclusive.
        turn: number of the turn, for columns with one list per turn.
        nll: read the NLL mask from ``lm_labels``, if there is such a column.
    """

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
    _check_mask(f"{side}_attention_mask", mask, keep, labels)
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
    return _Masked(ids=ids, loss=loss, nll=nll_mask)
