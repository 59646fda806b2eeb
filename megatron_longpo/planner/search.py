"""Which layouts fit, and which of them are the fastest.

Layouts are taken in the order of their time without any recomputation, which is the least that they can take, until no
further one can be among the best. Memory is the trainer's own estimate (``training/memory.py``).
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_longpo.config import Config, TrainingConfig
from megatron_longpo.errors import ConfigError
from megatron_longpo.model.shape import ModelShape
from megatron_longpo.planner.machine import Machine
from megatron_longpo.planner.space import RECOMPUTE, Candidate, candidate_of, candidates
from megatron_longpo.planner.timing import StepTime, TimeModel
from megatron_longpo.planner.workload import Workload
from megatron_longpo.training.activations import Activations
from megatron_longpo.training.memory import HOST_SHARE, PINNED_ROUNDING, StepBytes, in_flight_forwards, step_parts

# Share of the memory that the estimate may take; what fragmentation and NCCL need is beyond it (docs/simulation.md).
USABLE = 0.92
# Memory of the host for each GPU, as a share of the GPU's: less than any node of data-centre cards has.
_HOST_MEMORY = 1.5


@dataclass(frozen=True)
class Recompute:
    """What the backward recomputes, and what waits in host memory.

    Attributes:
        up: the MLPs' first products, of layers that are not recomputed as a whole.
        whole_layers: layers of each virtual stage that are recomputed as a whole.
        offloaded: layers of each virtual stage whose activations wait in host memory; fewer than it has.
    """

    up: bool
    whole_layers: int = 0
    offloaded: int = 0

    def applied_to(self, training: TrainingConfig) -> TrainingConfig:
        training = dataclasses.replace(training, cpu_offloading_num_layers=self.offloaded or None)
        if not self.up and not self.whole_layers:
            return dataclasses.replace(training, recompute_granularity="none")
        if not self.whole_layers:
            return dataclasses.replace(training, recompute_granularity="selective", recompute_modules=("mlp_up",))
        return dataclasses.replace(
            training,
            recompute_granularity="full",
            recompute_method="block",
            recompute_num_layers=self.whole_layers,
            recompute_modules=("mlp_up",),
        )

    def __str__(self) -> str:
        words = "MLP up-projections" if self.up else "nothing"
        if self.whole_layers:
            words = f"{self.whole_layers} layer(s) per stage, MLP up-projections of the others"
        return words + (f"; {self.offloaded} layer(s) per stage in host memory" if self.offloaded else "")


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest rank at its peak.

    Attributes:
        bytes: by part.
        stage: its pipeline stage.
        reserved: what tensors cannot have.
    """

    bytes: StepBytes
    stage: int
    reserved: float

    @property
    def total(self) -> float:
        """Bytes of tensors."""
        return self.bytes.total

    def parts(self) -> dict[str, float]:
        static, passing = self.bytes.static, self.bytes.activations
        return {
            "weights": static.weights,
            "gradients": static.gradients,
            "optimizer": static.optimizer,
            "saved activations": passing.saved,
            "backward": passing.backward,
            "log-prob chunk": passing.logprobs,
            "exchange buffers": passing.buffers,
            "optimizer's update": passing.update,
            "reserve": self.reserved,
        }


@dataclass(frozen=True)
class Plan:
    """A layout with what it takes.

    Attributes:
        candidate: the layout; its configuration says what is recomputed.
        recompute: what is recomputed.
        memory, time: peak memory and time of a step.
    """

    candidate: Candidate
    recompute: Recompute
    memory: Memory
    time: StepTime

    @property
    def config(self) -> Config:
        return self.candidate.config

    @property
    def seconds(self) -> float:
        return self.time.total

    def describe(self) -> str:
        return f"{self.candidate.describe()}; recompute {self.recompute}"


@dataclass(frozen=True)
class Search:
    """What is planned.

    Attributes:
        config: configuration of the run.
        shape: shape of the model.
        machine: GPUs.
        world_size: their number.
        workload: samples.
        given: fields that keep their value.
    """

    config: Config
    shape: ModelShape
    machine: Machine
    world_size: int
    workload: Workload
    given: frozenset[str] = frozenset()

    @functools.cached_property
    def times(self) -> TimeModel:
        return TimeModel(self.machine, self.shape, self.workload)

    @property
    def usable_bytes(self) -> float:
        """Bytes that tensors of a step may take."""
        memory = self.machine.memory_bytes
        return min(USABLE * memory, memory - self.machine.reserved_bytes)

    def best(self, count: int = 10) -> list[Plan]:
        """The fastest plans that fit, fastest first; none if nothing does.

        Raises:
            ConfigError: no layout is allowed at all.
        """
        ordered = self.ordered
        found: list[Plan] = []
        for least, candidate in ordered:
            if len(found) == count and least >= found[-1].seconds:
                break
            plan = self.fitted(candidate)
            if plan is not None:
                bisect.insort(found, plan, key=lambda p: p.seconds)
                del found[count:]
        return found

    @functools.cached_property
    def ordered(self) -> Sequence[tuple[float, Candidate]]:
        """Candidates with the least time that they can take, fastest first."""
        timed = []
        for candidate in candidates(self.config, self.shape, self.world_size, self.given):
            least = min(self._time(candidate, family[0]).total for family in self._families(candidate))
            timed.append((least, candidate))
        if not timed:
            raise ConfigError(self._why_none())
        return sorted(timed, key=lambda item: item[0])

    def _why_none(self) -> str:
        config = self.config
        fixed = ", ".join(
            f"{name}={getattr(section, name)}"
            for section in (config.parallel, config.training)
            for name in sorted(self.given)
            if hasattr(section, name)
        )
        return (
            f"no layout of {self.world_size} GPUs is allowed with global_batch_size={config.training.global_batch_size}"
            f"{', ' + fixed if fixed else ''}: the data-parallel size must divide the batch, tensor parallelism the heads and "
            "pipeline stages the layers; change the number of GPUs, or fix fewer settings"
        )

    def fitted(self, candidate: Candidate) -> Plan | None:
        """A candidate in the fastest way that fits, or None."""
        found = []
        for family in self._families(candidate):
            # Each choice of a family takes less memory and more time than the one before it; but recomputing the last layer as
            # well may take more, since all of it is there at once.
            if family[-1].whole_layers > 1 and not self._fits(candidate, family[-1]):
                family = family[:-1]
            if not self._fits(candidate, family[-1]):
                continue
            first = bisect.bisect_left(
                range(len(family) - 1),
                True,
                key=lambda i, family=family: self._fits(candidate, family[i]),  # type: ignore[misc]
            )
            found.append((self._time(candidate, family[first]).total, first, family[first]))
        return self.plan(candidate, min(found, key=lambda item: item[:2])[2]) if found else None

    def _fits(self, candidate: Candidate, recompute: Recompute) -> bool:
        return self.memory(candidate, recompute).total <= self.usable_bytes

    def leanest(self, candidate: Candidate) -> Plan:
        """A candidate in the way that takes least memory."""
        lasts = [choice for family in self._families(candidate) for choice in family[-2:]]
        return self.plan(candidate, min(lasts, key=lambda choice: self.memory(candidate, choice).total))

    def plan(self, candidate: Candidate, recompute: Recompute) -> Plan:
        """A candidate with what it takes."""
        chosen = _with_recompute(candidate, recompute)
        return Plan(chosen, recompute, self.memory(candidate, recompute), self._time(candidate, recompute))

    def _time(self, candidate: Candidate, recompute: Recompute) -> StepTime:
        return self.times.step(
            candidate, up=recompute.up, whole_layers=recompute.whole_layers, offloaded=recompute.offloaded
        )

    def memory(self, candidate: Candidate, recompute: Recompute) -> Memory:
        """Peak memory of the fullest stage."""
        config = _with_recompute(candidate, recompute).config
        stages = {0, len(candidate.split) - 1}
        layers = [sum(rank) for rank in candidate.split]
        if len(set(layers)) > 1:
            stages.add(layers.index(max(layers)))
        found = []
        for stage in sorted(stages):
            parts = step_parts(
                self.shape,
                config,
                candidate.parallel,
                tokens=candidate.micro_batch_size * self.workload.longest.places,
                num_microbatches=candidate.micro_batches,
                stage=stage,
                on_cuda=self.machine.device == "cuda",
            )
            assert parts is not None
            found.append(Memory(parts, stage, self.machine.reserved_bytes))
        return max(found, key=lambda memory: memory.total)

    def _families(self, candidate: Candidate) -> list[list[Recompute]]:
        """What may be recomputed and may wait in host memory: lists in which memory falls and time grows."""
        training = self.config.training
        layers = max(n for rank in candidate.split for n in rank)
        if "cpu_offloading_num_layers" in self.given:
            offloaded = [min(training.cpu_offloading_num_layers or 0, layers - 1)]
        else:
            offloaded = list(range(min(layers, 1 + self._most_offloaded(candidate))))
        if training.recompute_granularity == "auto" or not self.given.intersection(RECOMPUTE):
            kept = [[Recompute(up, 0, n) for n in offloaded] for up in (False, True)]
            return [
                *kept,
                [Recompute(True, n, min(offloaded[0], max(0, layers - n - 1))) for n in range(1, layers + 1)],
            ]
        found = self._configured(layers)
        most = max(0, layers - found.whole_layers - 1)
        return [[dataclasses.replace(found, offloaded=n) for n in sorted({min(n, most) for n in offloaded})]]

    def _most_offloaded(self, candidate: Candidate) -> int:
        """Layers of a virtual stage whose activations the host has room for, if nothing is recomputed."""
        if self.machine.device != "cuda":
            return 0
        tokens = candidate.micro_batch_size * self.workload.longest.places
        config, parallel = candidate.config, candidate.parallel
        activations = Activations(self.shape, config, parallel, tokens=tokens, is_last=False, on_cuda=True)
        in_flight = in_flight_forwards(config, self.shape, parallel, candidate.micro_batches, 0)
        room = HOST_SHARE * _HOST_MEMORY * self.machine.memory_bytes
        return int(room / (PINNED_ROUNDING * in_flight * activations.kept(recompute_up=False)))

    def _configured(self, layers: int) -> Recompute:
        """What the configuration recomputes, of virtual stages of so many layers."""
        training = self.config.training
        found = recompute_of(training, layers)
        if found is None:
            raise ConfigError(
                f"recompute_modules={','.join(training.recompute_modules)} is not in the estimate of memory; use "
                "recompute_granularity=auto, none, full, or selective with mlp_up"
            )
        most = max(0, layers - found.whole_layers - 1)
        return dataclasses.replace(found, offloaded=min(training.cpu_offloading_num_layers or 0, most))

    def as_configured(self) -> Plan:
        """The configuration's own layout, whether it fits or not.

        Raises:
            ConfigError: the trainer does not take it.
        """
        candidate = candidate_of(self.config, self.shape, self.world_size)
        training = self.config.training
        if training.recompute_granularity == "auto":
            free = dataclasses.replace(self, given=frozenset())
            return free.fitted(candidate) or free.leanest(candidate)
        layers = max(n for rank in candidate.split for n in rank)
        return self.plan(candidate, self._configured(layers))

    def closest(self) -> Plan:
        """The plan that is closest to fitting: the least memory of all."""
        plans: Iterable[Plan] = (self.leanest(candidate) for _, candidate in self.ordered)
        return min(plans, key=lambda plan: plan.memory.total)


def recompute_of(training: TrainingConfig, layers: int) -> Recompute | None:
    """What a configuration recomputes; None if the estimate does not know it."""
    if training.recompute_granularity == "none":
        return Recompute(False)
    if training.recompute_granularity == "selective":
        return Recompute(True) if set(training.recompute_modules) == {"mlp_up"} else None
    if training.recompute_method == "uniform":
        return Recompute(True, layers) if training.recompute_num_layers == 1 else None
    return Recompute("mlp_up" in training.recompute_modules, min(layers, training.recompute_num_layers))


def _with_recompute(candidate: Candidate, recompute: Recompute) -> Candidate:
    training = recompute.applied_to(candidate.config.training)
    return dataclasses.replace(candidate, config=dataclasses.replace(candidate.config, training=training))
