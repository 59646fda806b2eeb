"""Ranks that are slow, named by what they do themselves.

Ranks that exchange end every exchange together. Let rank r work for w_rk between exchanges k - 1 and k, which end at T_k - 1
and T_k: it arrives at T_k - 1 + w_rk, and T_k is the latest arrival plus the transfer. So every rank takes T_K for K exchanges,
the slow one as well as those that wait for it, and what differs is the sum of its w_rk: the time outside exchanges. That holds
per group, so also where a rank exchanges with some ranks per layer (tensor and context parallelism), with others per micro
batch (pipeline, whose bubbles are waits for the neighbour) and with others per step (data parallelism). Times of arrival would
name the same rank only where a phase has a single exchange.

What ranks should take is not the same for all: samples differ in length, context-parallel ranks in the number of tokens with a
loss, stages in layers. So a rank is compared with those of its stage, and it is slow only if it takes longer than they do both
per step and per unit of its work. A stage of one rank is compared with the other stages.
"""

from __future__ import annotations

import logging
import socket
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_longpo.config import LoggingConfig
from megatron_longpo.model.shape import ModelShape
from megatron_longpo.runtime import platform
from megatron_longpo.runtime.collectives import all_gather_objects
from megatron_longpo.runtime.log import log
from megatron_longpo.runtime.process_groups import Parallel
from megatron_longpo.training.batch import PolicyBatch
from megatron_longpo.training.reference_scoring import ScoringWork

# Not what comes between steps: rank 0 writes there, while the others wait.
PHASES = ("reference", "data", "forward_backward", "optimizer")
_DESCRIPTIONS = {
    "reference": "the reference's log-probs",
    "data": "reading its samples",
    "forward_backward": "forward and backward",
    "optimizer": "the optimizer's step",
}
# A rank that is slower by less than this share of a step does not matter.
_LEAST_SHARE = 0.05


@dataclass(frozen=True)
class RankTimes:
    """What one rank did in one phase.

    Attributes:
        seconds: seconds of its own work per step.
        work: how much there was to do, in any unit that all ranks share; 0: nothing, or not known.
        stage: its pipeline stage.
    """

    seconds: float
    work: float
    stage: int


@dataclass(frozen=True)
class Slowest:
    """A rank beside its peers.

    Attributes:
        rank: the rank.
        seconds: seconds of its own work per step.
        median: median of its peers' seconds.
        slowness: how many times as long as the median of its peers it takes, per step and per unit of work, whichever is less.
    """

    rank: int
    seconds: float
    median: float
    slowness: float


def by_slowness(ranks: Sequence[RankTimes]) -> list[Slowest]:
    """The ranks of one phase, the slowest first."""
    stages: dict[int, list[int]] = {}
    for rank, times in enumerate(ranks):
        stages.setdefault(times.stage, []).append(rank)
    found = []
    for rank, times in enumerate(ranks):
        peers = stages[times.stage] if len(stages[times.stage]) > 1 else range(len(ranks))
        # Of two ranks the faster one.
        median = statistics.median_low([ranks[peer].seconds for peer in peers])
        ratios = [times.seconds / median if median else 1.0]
        if times.work:
            rate = statistics.median_low([ranks[peer].seconds / ranks[peer].work for peer in peers if ranks[peer].work])
            ratios.append(times.seconds / times.work / rate if rate else 1.0)
        found.append(Slowest(rank, times.seconds, median, min(ratios)))
    return sorted(found, key=lambda slowest: -slowest.slowness)


def named(found: Sequence[Slowest], *, threshold: float, step_seconds: float) -> list[Slowest]:
    """Those that are too slow, the slowest first.

    Args:
        found: the ranks of one phase, the slowest first.
        threshold: slowness above which a rank is too slow.
        step_seconds: seconds of a step.
    """
    return [one for one in found if one.slowness > threshold and one.seconds - one.median > _LEAST_SHARE * step_seconds]


class StragglerDetector:
    """Adds up what this rank does, and compares the ranks at each log interval.

    Args:
        config: log_interval, straggler_threshold and straggler_minmax_count.
        parallel: degrees and groups.
        shape: shape of the model.
        layers: layers of this rank.
        parameters: weights of this rank.

    Attributes:
        said: the ranks that are slow now, in words; empty: none.
    """

    def __init__(
        self, config: LoggingConfig, parallel: Parallel, shape: ModelShape, *, layers: int, parameters: int
    ) -> None:
        self._config, self._parallel = config, parallel
        self._layers, self._parameters = layers, parameters
        # Multiply-adds per token with a loss.
        self._output_layer = shape.hidden_size * shape.vocab_size if parallel.is_last_stage else 0
        self._hosts: list[str] = []
        self._slow: dict[str, list[int]] = {}
        self.said = ""
        self._reset()

    def _reset(self) -> None:
        self._steps, self._step_seconds = 0, 0.0
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._work = dict.fromkeys(PHASES, 0.0)

    def count_work(self, batches: Sequence[PolicyBatch], costs: Sequence[float], *, reference: ScoringWork) -> None:
        """Count what there is to do in a step.

        Args:
            batches: this rank's micro batches.
            costs: costs of the samples of the global batch, by place.
            reference: what this rank had to do for the reference's log-probs.
        """
        self._work["reference"] += self._layers * reference.cost + self._output_layer * reference.loss_tokens
        self._work["data"] += sum(int(batch.micro_batch.inputs.tokens_1s.numel()) for batch in batches)
        # Places that fill a batch up are copies of its cheapest sample.
        filler = min(costs)
        cost = sum(costs[place] if place < len(costs) else filler for batch in batches for place in batch.places)
        of_loss = sum(len(batch.micro_batch.shard.loss_places_N) for batch in batches)
        self._work["forward_backward"] += (
            self._layers * cost / self._parallel.context_size + self._output_layer * of_loss
        )
        self._work["optimizer"] += self._parameters

    def add(self, own_seconds: Mapping[str, float], *, step_seconds: float) -> None:
        """Count a step.

        Args:
            own_seconds: seconds of its phases in which this rank did not wait.
            step_seconds: seconds of the step.
        """
        self._steps += 1
        self._step_seconds += step_seconds
        for phase in PHASES:
            self._seconds[phase] += own_seconds.get(phase, 0.0)

    def report(self) -> dict[str, float]:
        """Compare the ranks since the last report; collective. Rank 0 warns when other ranks are slow than before.

        Returns:
            Metrics of the slowest rank per phase.
        """
        if not self._hosts:
            self._hosts = all_gather_objects(_where())
        rank, world = self._parallel.rank, self._parallel.world_size
        row = [self._seconds[p] / self._steps for p in PHASES] + [self._work[p] for p in PHASES]
        row += [self._parallel.pipeline_rank, self._step_seconds / self._steps]
        table = torch.zeros(world, len(row), dtype=torch.float64)
        table[rank] = torch.tensor(row, dtype=torch.float64)
        table = table.to(platform.CURRENT.device)
        # The only exchange: two numbers per phase and rank, and two more.
        dist.all_reduce(table)
        self._reset()
        rows, count = table.tolist(), len(PHASES)
        metrics: dict[str, float] = {}
        slow: dict[str, list[Slowest]] = {}
        for index, phase in enumerate(PHASES):
            times = [RankTimes(seconds=r[index], work=r[count + index], stage=int(r[2 * count])) for r in rows]
            found = by_slowness(times)
            slow[phase] = named(found, threshold=self._config.straggler_threshold, step_seconds=rows[0][-1])
            metrics[f"straggler/{phase}_rank"] = found[0].rank
            metrics[f"straggler/{phase}_seconds"] = found[0].seconds
            metrics[f"straggler/{phase}_median_seconds"] = found[0].median
        self._say(slow)
        return metrics

    def _say(self, slow: Mapping[str, Sequence[Slowest]]) -> None:
        lines = {phase: self._line(phase, found) for phase, found in slow.items() if found}
        before, self._slow = self._slow, {phase: sorted(one.rank for one in found) for phase, found in slow.items()}
        self.said = "; ".join(lines.values())
        for phase, ranks in self._slow.items():
            if ranks == before.get(phase, []):
                continue
            line = lines.get(phase, f"no rank is slow any more in {_DESCRIPTIONS[phase]}")
            if self._parallel.rank == 0:
                log(line, level=logging.WARNING)

    def _line(self, phase: str, found: Sequence[Slowest]) -> str:
        most = self._config.straggler_minmax_count
        ranks = ", ".join(f"rank {one.rank} ({self._hosts[one.rank]}) with {one.seconds:.3g} s" for one in found[:most])
        more = f" and {len(found) - most} more" if len(found) > most else ""
        return (
            f"slow in {_DESCRIPTIONS[phase]}: {ranks}{more} of own work per step, {found[0].slowness:.1f} times the median of "
            f"{found[0].median:.3g} s"
        )


def _where() -> str:
    """Machine and device of this process, for people."""
    device = platform.CURRENT.device
    return f"{socket.gethostname()}, {device}" if platform.CURRENT.is_cuda else socket.gethostname()
