"""Lays rows of tokens out as one flat sequence: shared prefixes, attention blocks, shards.

Several rows (for LongPO the chosen and the rejected long row of a sample) become ONE sequence in which the tokens that they
share are stored, and computed, once. The rows form a tree of segments::

    rows        t0 t1 t2 t3 | a b c          chosen
                t0 t1 t2 t3 | x y            rejected

    sequence    [t0 t1 t2] [t3 a b] [t3 x]
                  trunk     branch   branch

The trunk is the common prefix without its last token. Each branch begins with that last common token, because the token that
follows it, and with it the loss at its position, differs between the branches. So every place of the sequence predicts exactly
one next token. A branch attends to its ancestors in full and to itself causally, and its position numbers continue those of
its parent. Trees may be deeper than two levels: turns on the same document share the trunk, and the two answers of a turn
share its question. Rows with nothing in common are separate roots.

Everything here is numpy on the host, and only ``shard`` knows about ranks.

Shape legend: L = tokens of one row, S = tokens of the flat sequence, N = positions with a loss, E = entries (a position
of one response; a shared position has one entry for each row that it belongs to).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megatron_longpo.runtime.balance import assign, round_up

IntArray = NDArray[np.int64]

NO_RESPONSE = -1
# A branch point costs a merge of two attention blocks: sharing fewer tokens costs more than it saves.
MINIMUM_SHARED_TOKENS = 16
# A tile much smaller than this costs more in calls than it gives in balance.
_SMALLEST_TILE = 16


@dataclass(frozen=True)
class Row:
    """One row of tokens with its losses.

    Attributes:
        tokens_L: token ids.
        response_L: slot of the response sum that each token, as a target, is added to, or ``NO_RESPONSE``.
        nll_L: whether each token, as a target, counts in the NLL mean of ``sample``.
        sample: slot of the NLL mean.

    Raises:
        ValueError: fewer than two tokens, or arrays of different lengths.
    """

    tokens_L: IntArray
    response_L: IntArray
    nll_L: NDArray[np.bool_]
    sample: int

    def __post_init__(self) -> None:
        if len(self.tokens_L) < 2:
            raise ValueError(f"a row of {len(self.tokens_L)} tokens predicts nothing; rows need at least 2 tokens")
        if not len(self.tokens_L) == len(self.response_L) == len(self.nll_L):
            raise ValueError(
                f"a row has {len(self.tokens_L)} tokens, {len(self.response_L)} response slots and {len(self.nll_L)} entries "
                "in its NLL mask; they must be as many"
            )


@dataclass(frozen=True)
class Segment:
    """Places ``[start, start + length)`` of the flat sequence.

    Attributes:
        start, length: the places.
        parent: number of the parent segment, or -1 for a root.
        position: position number of the first token within the rows that the segment belongs to.
    """

    start: int
    length: int
    parent: int
    position: int

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class KeyBlock:
    """Keys ``[start, end)`` of a ``QuerySpan``. A causal block has as many keys as there are queries."""

    start: int
    end: int
    causal: bool


@dataclass(frozen=True)
class QuerySpan:
    """Queries ``[start, end)`` and all keys that they see. Several key blocks are merged by their log-sum-exps."""

    start: int
    end: int
    keys: tuple[KeyBlock, ...]

    @property
    def pairs(self) -> int:
        """Number of query-key pairs, to which the cost of attention is proportional."""
        n = self.end - self.start
        return sum(n * (n + 1) // 2 if k.causal else n * (k.end - k.start) for k in self.keys)


@dataclass(frozen=True)
class SequenceLayout:
    """The flat sequence of a set of rows, before sharding. Labels are shifted here, and only here.

    Attributes:
        tokens_S, targets_S, positions_S: input token, next token and position number of each place.
        segments: the tree.
        response_places_E, response_slots_E: places whose target log-prob is added to a response sum, and the slot of that sum.
        nll_places, nll_slots: places whose target log-prob counts in an NLL mean, and the slot of that mean; a shared place
            counts once.
        nll_tokens: number of NLL places of each sample slot.
        response_tokens: number of tokens of each response slot.
        rows: number of rows laid out.
        query_spans: attention as blocks.
    """

    tokens_S: IntArray
    targets_S: IntArray
    positions_S: IntArray
    segments: tuple[Segment, ...]
    response_places_E: IntArray
    response_slots_E: IntArray
    nll_places: IntArray
    nll_slots: IntArray
    nll_tokens: IntArray
    response_tokens: IntArray
    rows: int
    query_spans: tuple[QuerySpan, ...] = field(default=())

    @property
    def length(self) -> int:
        """Number of places."""
        return len(self.tokens_S)

    @property
    def attention_pairs(self) -> int:
        """Number of query-key pairs."""
        return sum(span.pairs for span in self.query_spans)


def lay_out(
    rows: Sequence[Row],
    *,
    prefix_sharing: bool,
    num_samples: int,
    num_responses: int,
    minimum_shared: int = MINIMUM_SHARED_TOKENS,
) -> SequenceLayout:
    """Lay rows out as one sequence.

    Args:
        rows: the rows; those that share a prefix of at least ``minimum_shared`` tokens share segments.
        prefix_sharing: if off, every row is a root of its own, which is the oracle of the shared layout.
        num_samples: number of NLL slots.
        num_responses: number of response slots.
        minimum_shared: shortest prefix that is worth a branch point; any value gives the same losses.
    """
    builder = _Builder(minimum_shared)
    if prefix_sharing:
        builder.grow(list(rows), list(range(len(rows))), 0, -1)
    else:
        for index, row in enumerate(rows):
            builder.add_segment([index], 0, len(row.tokens_L) - 1, -1)
    return builder.finish(rows, num_samples, num_responses)


class _Builder:
    """Grows the tree of segments; rows are known by their numbers."""

    def __init__(self, minimum_shared: int) -> None:
        self.minimum_shared = max(1, minimum_shared)
        self.segments: list[Segment] = []
        self.rows_of_segment: list[list[int]] = []
        self.length = 0

    def add_segment(self, members: list[int], begin: int, end: int, parent: int) -> int:
        """Append tokens ``[begin, end)`` of the rows ``members`` as a segment, and return its number."""
        self.segments.append(Segment(self.length, end - begin, parent, begin))
        self.rows_of_segment.append(members)
        self.length += end - begin
        return len(self.segments) - 1

    def grow(self, rows: list[Row], members: list[int], begin: int, parent: int) -> None:
        """Lay out the rows ``members``, which are equal before ``begin``, below segment ``parent``."""
        if len(members) == 1:
            row = rows[members[0]]
            if len(row.tokens_L) - 1 > begin:
                self.add_segment(members, begin, len(row.tokens_L) - 1, parent)
            return
        shared = min(_shared_pairs(rows[members[0]], rows[m], begin) for m in members[1:])
        if shared >= self.minimum_shared:
            parent = self.add_segment(members, begin, begin + shared, parent)
            begin += shared
        # Rows that end here have nothing left; the others are grouped by what comes next. A group may hold several rows: two
        # answers share a question below the document that all rows share.
        left = [m for m in members if len(rows[m].tokens_L) - 1 > begin]
        while left:
            head, rest = left[0], left[1:]
            sharing = [m for m in rest if _shared_pairs(rows[head], rows[m], begin) >= self.minimum_shared]
            if sharing:
                self.grow(rows, [head, *sharing], begin, parent)
            else:
                self.add_segment([head], begin, len(rows[head].tokens_L) - 1, parent)
            left = [m for m in rest if m not in sharing]

    def finish(self, rows: Sequence[Row], num_samples: int, num_responses: int) -> SequenceLayout:
        """Fill in tokens, targets and losses of all segments."""
        tokens = np.zeros(self.length, np.int64)
        targets = np.zeros(self.length, np.int64)
        positions = np.zeros(self.length, np.int64)
        places: list[IntArray] = []
        slots: list[IntArray] = []
        nll: set[tuple[int, int]] | None = None
        nll_mask = np.full((self.length,), -1, np.int64)
        for segment, members in zip(self.segments, self.rows_of_segment, strict=True):
            here = slice(segment.start, segment.end)
            first = rows[members[0]].tokens_L
            tokens[here] = first[segment.position : segment.position + segment.length]
            targets[here] = first[segment.position + 1 : segment.position + 1 + segment.length]
            positions[here] = np.arange(segment.position, segment.position + segment.length)
            as_target = slice(segment.position + 1, segment.position + 1 + segment.length)
            for member in members:
                response = rows[member].response_L[as_target]
                has_loss = np.flatnonzero(response != NO_RESPONSE)
                places.append(has_loss + segment.start)
                slots.append(response[has_loss])
                counted = np.flatnonzero(rows[member].nll_L[as_target]) + segment.start
                taken = nll_mask[counted]
                if np.any((taken != -1) & (taken != rows[member].sample)):
                    # Two samples share this segment (the same document twice): rare, so kept out of the fast path.
                    nll = nll or set()
                    nll.update((int(p), rows[member].sample) for p in counted)
                else:
                    nll_mask[counted] = rows[member].sample
        nll_places = np.flatnonzero(nll_mask != -1).astype(np.int64)
        nll_slots = nll_mask[nll_places]
        if nll is not None:
            pairs = sorted(nll | {(int(p), int(s)) for p, s in zip(nll_places, nll_slots, strict=True)})
            nll_places = np.array([p for p, _ in pairs], np.int64)
            nll_slots = np.array([s for _, s in pairs], np.int64)
        response_slots = np.concatenate(slots) if slots else np.zeros(0, np.int64)
        return SequenceLayout(
            tokens_S=tokens,
            targets_S=targets,
            positions_S=positions,
            segments=tuple(self.segments),
            response_places_E=np.concatenate(places) if places else np.zeros(0, np.int64),
            response_slots_E=response_slots,
            nll_places=nll_places,
            nll_slots=nll_slots,
            nll_tokens=np.bincount(nll_slots, minlength=num_samples).astype(np.int64),
            response_tokens=np.bincount(response_slots, minlength=num_responses).astype(np.int64),
            rows=len(rows),
            query_spans=query_spans(self.segments),
        )


def common_prefix(a: Sequence[int] | IntArray, b: Sequence[int] | IntArray) -> int:
    """Number of tokens that two rows begin with alike."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(np.asarray(a[:n]) != np.asarray(b[:n]))
    return int(differs[0]) if len(differs) else n


def _shared_pairs(a: Row, b: Row, begin: int) -> int:
    """Number of places from ``begin`` on that have the same token and the same next token in both rows."""
    return max(0, common_prefix(a.tokens_L[begin:], b.tokens_L[begin:]) - 1)


def query_spans(segments: Sequence[Segment]) -> tuple[QuerySpan, ...]:
    """Attention of a tree of segments as blocks.

    A segment that directly follows its parent in memory continues the parent's causal block. Trunk and first branch are
    therefore one causal block, and two rows cost one merge instead of two.
    """
    # First place of the causal chain that each segment belongs to.
    starts: list[int] = []
    # By first place of a chain: its end, and the ranges of its ancestors.
    ends: dict[int, int] = {}
    prefix: dict[int, tuple[tuple[int, int], ...]] = {}
    for segment in segments:
        parent = segment.parent
        if parent >= 0 and segments[parent].end == segment.start:
            start = starts[parent]
        else:
            start = segment.start
            prefix[start] = () if parent < 0 else _ancestor_ranges(segments, starts, prefix, parent)
        starts.append(start)
        ends[start] = segment.end
    spans = []
    for start, end in ends.items():
        if end == start:
            continue
        full = [KeyBlock(a, b, causal=False) for a, b in prefix[start] if b > a]
        spans.append(QuerySpan(start, end, (*full, KeyBlock(start, end, causal=True))))
    return tuple(spans)


def _ancestor_ranges(
    segments: Sequence[Segment], starts: list[int], prefix: dict[int, tuple[tuple[int, int], ...]], parent: int
) -> tuple[tuple[int, int], ...]:
    chain = starts[parent]
    return (*prefix[chain], (chain, segments[parent].end))


# --------------------------------------------------------------------------------------------------
# Shards
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Range:
    """Places ``[start, start + length)`` of the sequence, stored from local place ``local`` on."""

    start: int
    length: int
    local: int


@dataclass(frozen=True)
class Shard:
    """The part of a sequence that one context-parallel rank holds.

    Attributes:
        padded_length: length of the whole sequence with its padding.
        ranges: places that the rank holds, in local order; padding is at places >= ``layout.length``.
        tokens, positions: [S/cp] input tokens and position numbers.
        loss_places_N: local places that have a loss.
        targets_N: target tokens of these places.
        response_index_E, response_slots_E: indices into N, and the response sums that they are added to.
        nll_index, nll_slots: indices into N, and the NLL sums that they are added to.
    """

    padded_length: int
    ranges: tuple[Range, ...]
    tokens: IntArray
    positions: IntArray
    loss_places_N: IntArray
    targets_N: IntArray
    response_index_E: IntArray
    response_slots_E: IntArray
    nll_index: IntArray
    nll_slots: IntArray


def keys_per_place(query_spans: Sequence[QuerySpan], length: int) -> IntArray:
    """Number of keys that the query at each place sees; padding sees none."""
    seen = np.zeros(length, np.int64)
    for span in query_spans:
        for block in span.keys:
            n = span.end - span.start
            seen[span.start : span.end] += np.arange(1, n + 1) if block.causal else block.end - block.start
    return seen


def assign_places(layout: SequenceLayout, *, multiple: int, parts: int, tiles: int) -> list[tuple[Range, ...]]:
    """Assign places to context-parallel ranks, the same number to each, so that linear layers are balanced.

    With one tile per rank the sequence is cut in order. With several, attention is balanced too: tiles are assigned by the
    number of their query-key pairs, the most expensive first, each to the least loaded rank that still has room. In a causal
    sequence two tiles per rank give the usual zigzag. Branches, whose queries all see the whole trunk, are why pairs are counted.

    Args:
        layout: the whole sequence.
        multiple: the tiles of all ranks together have a multiple of this many places.
        parts: number of ranks.
        tiles: tiles per rank; short sequences get fewer.

    Returns:
        The ranges of each rank.
    """
    while tiles > 1 and layout.length < parts * tiles * _SMALLEST_TILE:
        tiles //= 2
    whole = round_up(layout.length, multiple * tiles)
    size = whole // (parts * tiles)
    if tiles == 1:
        return [(Range(part * size, size, 0),) for part in range(parts)]
    cost = keys_per_place(layout.query_spans, whole).reshape(-1, size).sum(1)
    tiles_of_rank = assign(cost.tolist(), parts, equal_counts=True)
    return [tuple(Range(tile * size, size, i * size) for i, tile in enumerate(mine)) for mine in tiles_of_rank]


def shard(layout: SequenceLayout, ranges: Sequence[Range], padded: int) -> Shard:
    """Cut out the part of a sequence that one rank holds.

    Args:
        layout: the whole sequence.
        ranges: the rank's places (``assign_places``).
        padded: length of the whole sequence with its padding.
    """
    size = sum(r.length for r in ranges)
    tokens = np.zeros(size, np.int64)
    positions = np.zeros(size, np.int64)
    # Local place of each place of the sequence, -1 where another rank holds it.
    local_of = np.full(padded, -1, np.int64)
    for r in ranges:
        real = min(max(layout.length - r.start, 0), r.length)
        tokens[r.local : r.local + real] = layout.tokens_S[r.start : r.start + real]
        positions[r.local : r.local + real] = layout.positions_S[r.start : r.start + real]
        local_of[r.start : r.start + r.length] = np.arange(r.local, r.local + r.length)
    response_local = local_of[layout.response_places_E]
    nll_local = local_of[layout.nll_places]
    in_response, in_nll = response_local >= 0, nll_local >= 0
    response_local, nll_local = response_local[in_response], nll_local[in_nll]
    loss_places = np.unique(np.concatenate([response_local, nll_local]))
    global_of = np.zeros(size, np.int64)
    for r in ranges:
        global_of[r.local : r.local + r.length] = np.arange(r.start, r.start + r.length)
    return Shard(
        padded_length=padded,
        ranges=tuple(ranges),
        tokens=tokens,
        positions=positions,
        loss_places_N=loss_places,
        targets_N=layout.targets_S[global_of[loss_places]],
        response_index_E=np.searchsorted(loss_places, response_local),
        response_slots_E=layout.response_slots_E[in_response],
        nll_index=np.searchsorted(loss_places, nll_local),
        nll_slots=layout.nll_slots[in_nll],
    )


def local_spans(query_spans: Sequence[QuerySpan], ranges: Sequence[Range]) -> tuple[QuerySpan, ...]:
    """Query spans of the places that a rank holds: queries in local places, keys in places of the whole sequence.

    Part of a causal block sees the places before that part in full, and itself causally.
    """
    result = []
    for r in ranges:
        for span in query_spans:
            start, end = max(span.start, r.start), min(span.end, r.start + r.length)
            if start >= end:
                continue
            keys: list[KeyBlock] = []
            for block in span.keys:
                if not block.causal:
                    keys.append(block)
                    continue
                # The keys of a causal block are the span's own places.
                if start > block.start:
                    keys.append(KeyBlock(block.start, start, causal=False))
                keys.append(KeyBlock(start, end, causal=True))
            result.append(QuerySpan(start - r.start + r.local, end - r.start + r.local, tuple(keys)))
    return tuple(result)
