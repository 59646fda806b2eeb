"""What a run computes, whatever the layout: places, visible query-key pairs and losses of its samples, from the trainer's own
layout of rows.

Rows are those of data that is there, or made up from a length. Chosen and rejected share their prefix, so a sample of length
L has about L places and L^2 / 2 pairs, not twice as many.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_longpo.config import Config, data_sources
from megatron_longpo.data.indexed import PreferenceData
from megatron_longpo.data.preference import Mode, Sample, short_rows
from megatron_longpo.data.sampler import assign_batch
from megatron_longpo.data.sequence import Row, SequenceLayout, assign_places, keys_per_place
from megatron_longpo.errors import ConfigError
from megatron_longpo.model.blocks import blocks_of
from megatron_longpo.model.shape import ModelShape
from megatron_longpo.simulation.data import made_up_sample
from megatron_longpo.training.batch import TILES, policy_layout
from megatron_longpo.training.objective import spec_of

# Samples of a data set that are laid out, evenly over its lengths.
_LAID_OUT = 24
# Global batches that are drawn to see how evenly samples can be assigned.
_BATCHES = 8


@dataclass(frozen=True)
class Rows:
    """The rows of one sample as one sequence.

    Attributes:
        places: places of the sequence.
        pairs: visible query-key pairs, a sliding window considered.
        known_losses: places whose log-prob has a gradient that is known before the forward (NLL only).
        later_losses: the other places with a loss.
        longest: tokens of the longest row.
        chosen: tokens of the chosen row: what tokens per second count.
        short_places, short_pairs: the same of the short rows, which LongPO's reference scores.
        layout: the sequence, for the balance of ``allgather``; None if that does not matter.
    """

    places: int
    pairs: int
    known_losses: int
    later_losses: int
    longest: int
    chosen: int
    short_places: int
    short_pairs: int
    layout: SequenceLayout | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, sample: Sample, config: Config, shape: ModelShape) -> Rows:
        """Lay a sample out as the trainer does."""
        layout = policy_layout([sample], data=config.data, objective=config.objective)
        spec = spec_of(config.objective.objective, config.objective.loss_type)
        of_response, of_nll = np.zeros((2, layout.length), bool)
        of_response[layout.response_places_E] = spec.uses_preference
        of_nll[layout.nll_places] = spec.uses_nll
        short_places, short_pairs = _shared(short_rows(sample, slot=0))
        return cls(
            places=layout.length,
            pairs=visible_pairs(layout, shape.window_size),
            known_losses=int(np.count_nonzero(of_nll & ~of_response)),
            later_losses=int(np.count_nonzero(of_response)),
            longest=int(np.max(layout.positions_S)) + 1,
            chosen=sample.length(Mode.CHOSEN),
            short_places=short_places,
            short_pairs=short_pairs,
            layout=layout,
        )

    def imbalance(self, context: int) -> float:
        """Pairs of the most loaded context-parallel rank over the mean, with ``allgather``."""
        return _imbalance(self, context)


@functools.lru_cache(maxsize=256)
def _imbalance(rows: Rows, context: int) -> float:
    assert rows.layout is not None
    ranges_of_rank = assign_places(rows.layout, multiple=context, parts=context, tiles=TILES)
    ends = [(r.start, r.start + r.length) for ranges in ranges_of_rank for r in ranges]
    cost = np.concatenate([[0], np.cumsum(keys_per_place(rows.layout.query_spans, max(end for _, end in ends)))])
    each = [sum(int(cost[r.start + r.length] - cost[r.start]) for r in ranges) for ranges in ranges_of_rank]
    return max(each) * context / max(1, sum(each))


def visible_pairs(layout: SequenceLayout, window: int | None) -> int:
    """Query-key pairs of a sequence that are computed."""
    if window is None:
        return layout.attention_pairs
    blocks = blocks_of(layout.query_spans, window, layout.positions_S)
    halves = sum(b.length * (b.length + 1) // 2 for b in (*blocks.causal, *blocks.fading))
    return halves + sum((b.query_end - b.query) * (b.key_end - b.key) for b in blocks.full)


def _shared(rows: Sequence[Row]) -> tuple[int, int]:
    """Places and pairs of short rows, two and two of which share their prompt but for its last token."""
    places = pairs = 0
    for i in range(0, len(rows), 2):
        lengths = [len(row.tokens_L) - 1 for row in rows[i : i + 2]]
        prompts = [int(np.count_nonzero(row.response_L < 0)) - 1 for row in rows[i : i + 2]]
        trunk = min(*prompts, *lengths) if len(lengths) > 1 else 0
        branches = [n - trunk for n in lengths]
        places += trunk + sum(branches)
        pairs += trunk * (trunk + 1) // 2 + sum(n * trunk + n * (n + 1) // 2 for n in branches)
    return places, pairs


@dataclass(frozen=True)
class Workload:
    """Samples of a run.

    Attributes:
        longest: the sample with the most places: what memory must hold.
        drawn: samples that stand for all, equally often.
        samples: number of samples of the data; None if it is not known.
        source: what the rows are, in words.
    """

    longest: Rows
    drawn: tuple[Rows, ...]
    samples: int | None
    source: str

    @functools.cached_property
    def mean(self) -> Rows:
        """A sample with the mean numbers of all."""
        if len(self.drawn) == 1:
            return self.drawn[0]

        def mean(name: str) -> int:
            return round(sum(getattr(rows, name) for rows in self.drawn) / len(self.drawn))

        names = ("places", "pairs", "known_losses", "later_losses", "longest", "chosen", "short_places", "short_pairs")
        return Rows(**{name: mean(name) for name in names}, layout=self.longest.layout)

    def imbalance(self, shape: ModelShape, *, data: int, micro_batch_size: int, batch: int) -> float:
        """Work of the most loaded data-parallel rank over the mean, as the sampler assigns samples to ranks."""
        if len(self.drawn) == 1 or data == 1:
            return 1.0
        return _data_imbalance(tuple(shape.row_cost(r.longest) for r in self.drawn), data, micro_batch_size, batch)


@functools.lru_cache(maxsize=256)
def _data_imbalance(costs: tuple[float, ...], data: int, size: int, batch: int) -> float:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(_BATCHES):
        drawn = rng.choice(costs, batch).tolist()
        loads = [
            sum(drawn[p] for places in rank for p in places)
            for rank in assign_batch(drawn, data_size=data, micro_batch_size=size)
        ]
        found.append(max(loads) * data / sum(loads))
    return float(np.mean(found))


def made_up(
    config: Config, shape: ModelShape, *, length: int, answer: int, turns: int, short: int, samples: int | None
) -> Workload:
    """Samples of one length.

    Args:
        config: objective and layout of rows.
        shape: shape of the model.
        length: tokens of the chosen row.
        answer: tokens of its answers; rejected ones have three quarters as many.
        turns: turns per sample.
        short: tokens of the chunks.
        samples: number of samples of the run.
    """
    sample = made_up_sample(length, answer=answer, turns=turns, vocab_size=shape.vocab_size, short=short)
    rows = Rows.of(sample, config, shape)
    source = f"rows of {length:,} tokens, {turns} turn(s) with answers of {answer} and {answer * 3 // 4} tokens"
    return Workload(rows, (rows,), samples, source)


def from_data(config: Config, shape: ModelShape, *, samples: int | None) -> Workload:
    """Samples of the configuration's data.

    Raises:
        ConfigError, DataError: there are none.
    """
    if config.data.data_path is None:
        raise ConfigError(
            "neither length nor data_path is given; give the length of a row with --length, or --data-path"
        )
    prefixes = [source.prefix for source in data_sources(config.data.data_path)]
    parts = [PreferenceData(prefix, verify=False) for prefix in prefixes]
    lengths = [(int(n), part, i) for part in parts for i, n in enumerate(part.long_lengths())]
    lengths.sort(key=lambda item: item[0])
    if not lengths:
        raise ConfigError(f"data_path={' '.join(prefixes)} has no samples; preprocess data first")
    places = np.linspace(0, len(lengths) - 1, min(_LAID_OUT, len(lengths))).round().astype(int)
    drawn = tuple(Rows.of(lengths[i][1][lengths[i][2]], config, shape) for i in places)
    longest = max(drawn, key=lambda rows: rows.places)
    source = f"{len(lengths):,} samples of {' '.join(prefixes)}, rows of {lengths[0][0]:,} to {lengths[-1][0]:,} tokens"
    return Workload(longest, drawn, samples or len(lengths), source)
