"""Which layouts fit, and which of them are the fastest.

Layouts are taken in the order of their time without any recomputation, which is the least that they can take, until no
further one can be among the best. Memory is the trainer's own estimate (``training/memory.py``).
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from megatron_longpo.config import Config, TrainingConfig
from megatron_longpo.errors import ConfigError
from megatron_longpo.model.shape import ModelShape
from megatron_longpo.planner.machine import Machine
from megatron_longpo.planner.space import RECOMPUTE, Candidate, candidate_of, candidates
from megatron_longpo.planner.timing import StepTime, TimeModel
from megatron_longpo.planner.workload import Workload
from megatron_longpo.training.memory import (
    HOST_SHARE,
    PINNED_ROUNDING,
    StageMemory,
    StepBytes,
    host_optimizer_bytes,
)

# Share of the memory that the estimate may take; what fragmentation and NCCL need is beyond it (docs/simulation.md). Of the
# host's, what the run fixes may take as much; what the planner puts there, HOST_SHARE.
USABLE = 0.92
_GIB = 2**30


@dataclass(frozen=True)
class Recompute:
    """What the backward recomputes, and what waits in host memory.

    Attributes:
        up: the MLPs' first products, of layers that are not recomputed as a whole.
        whole_layers: layers of each virtual stage that are recomputed as a whole.
        offloaded: layers of each virtual stage whose activations wait in host memory; fewer than it has.
        host_optimizer: whether the optimizer's states are in host memory, and updated there.
    """

    up: bool
    whole_layers: int = 0
    offloaded: int = 0
    host_optimizer: bool = False

    def applied_to(self, config: Config) -> Config:
        parallel, optimizer = config.parallel, config.optimizer
        if self.host_optimizer != optimizer.optimizer_cpu_offload:
            optimizer = dataclasses.replace(optimizer, optimizer_cpu_offload=self.host_optimizer)
        if self.host_optimizer and not parallel.use_distributed_optimizer:
            # States in host memory are those of the distributed optimizer, of one rank as well.
            parallel = dataclasses.replace(parallel, use_distributed_optimizer=True)
        training = self._training(config.training)
        return dataclasses.replace(config, parallel=parallel, optimizer=optimizer, training=training)

    def _training(self, training: TrainingConfig) -> TrainingConfig:
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
        words += f"; {self.offloaded} layer(s) per stage in host memory" if self.offloaded else ""
        return words + ("; optimizer in host memory" if self.host_optimizer else "")


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest rank at its peak.

    Attributes:
        bytes: by part.
        stage: its pipeline stage.
        reserved: what tensors cannot have.
        host: bytes of the host's memory that a rank takes for activations and the optimizer, of the stage that needs most.
    """

    bytes: StepBytes
    stage: int
    reserved: float
    host: float = 0.0

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
    _memories: dict[object, dict[int, StageMemory]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @functools.cached_property
    def times(self) -> TimeModel:
        return TimeModel(self.machine, self.shape, self.workload)

    @property
    def usable_bytes(self) -> float:
        """Bytes that tensors of a step may take."""
        memory = self.machine.memory_bytes
        return min(USABLE * memory, memory - self.machine.reserved_bytes)

    @property
    def usable_host_bytes(self) -> float:
        """Bytes of the host's memory that a rank may take."""
        return USABLE * self.machine.host_memory_bytes

    def fits(self, memory: Memory) -> bool:
        """Whether a rank has room for what it holds, on the device and in the host's memory."""
        return memory.total <= self.usable_bytes and memory.host <= self.usable_host_bytes

    def needs(self, memory: Memory) -> str:
        """What a plan takes of what there is, in words; of the host's memory if that is too small."""
        words = f"{memory.total / _GIB:.1f} of {self.usable_bytes / _GIB:.1f} GiB"
        if memory.host > self.usable_host_bytes:
            host = f"{memory.host / _GIB:.1f} of {self.usable_host_bytes / _GIB:.1f} GiB of the host's memory per GPU"
            words += f", and {host} (optimizer_cpu_offload, cpu_offloading_num_layers)"
        return words

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
    def candidates(self) -> Sequence[Candidate]:
        """All layouts that are allowed.

        Raises:
            ConfigError: there are none.
        """
        found = list(candidates(self.config, self.shape, self.world_size, self.given))
        if not found:
            raise ConfigError(self._why_none())
        return found

    @functools.cached_property
    def ordered(self) -> Sequence[tuple[float, Candidate]]:
        """Candidates whose weights, gradients and optimizer fit, with the least time that they can take, fastest first."""
        timed = [(self._least(candidate), candidate) for candidate in self.candidates if self._holds(candidate)]
        return sorted(timed, key=lambda item: item[0])

    def _holds(self, candidate: Candidate) -> bool:
        on_host = self._host_optimizer(candidate)[-1]
        return max(stage.static.total for stage in self._stages(candidate, on_host).values()) <= self.usable_bytes

    def _least(self, candidate: Candidate) -> float:
        """Seconds without what makes a step longer: recomputation, and waiting for the host."""
        families = self._families(candidate)
        if not families[0][0].offloaded:
            return self._time(candidate, families[0][0]).total
        # Less is copied to the host where more is recomputed.
        return min(self._time(candidate, family[0]).total for family in families)

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

        def fits(choice: Recompute) -> bool:
            return self.fits(self.memory(candidate, choice))

        best: tuple[float, Recompute] | None = None
        for family in self._families(candidate):
            # Each choice of a family takes less memory and more time than the one before it; but recomputing the last layer as
            # well may take more, since all of it is there at once.
            if best is not None and self._time(candidate, family[0]).total >= best[0]:
                continue
            if family[-1].whole_layers > 1 and not fits(family[-1]):
                family = family[:-1]
            if not fits(family[-1]):
                continue
            first = bisect.bisect_left(range(len(family) - 1), True, key=lambda i, family=family: fits(family[i]))  # type: ignore[misc]
            seconds = self._time(candidate, family[first]).total
            if best is None or seconds < best[0]:
                best = seconds, family[first]
        return None if best is None else self.plan(candidate, best[1])

    def leanest(self, candidate: Candidate) -> Plan:
        """A candidate in the way that takes least memory."""
        lasts = [choice for family in self._families(candidate) for choice in family[-2:]]
        return self.plan(candidate, min(lasts, key=lambda choice: self._excess(self.memory(candidate, choice))))

    def _excess(self, memory: Memory) -> tuple[float, float]:
        """How far a plan is from fitting, by the host's memory first: on the device there is always another way."""
        return max(0.0, memory.host - self.usable_host_bytes), memory.total

    def plan(self, candidate: Candidate, recompute: Recompute) -> Plan:
        """A candidate with what it takes."""
        chosen = dataclasses.replace(candidate, config=recompute.applied_to(candidate.config))
        return Plan(chosen, recompute, self.memory(candidate, recompute), self._time(candidate, recompute))

    def _time(self, candidate: Candidate, recompute: Recompute) -> StepTime:
        return self.times.step(
            candidate,
            up=recompute.up,
            whole_layers=recompute.whole_layers,
            offloaded=recompute.offloaded,
            host_optimizer=recompute.host_optimizer,
        )

    def memory(self, candidate: Candidate, recompute: Recompute) -> Memory:
        """Peak memory of the fullest stage."""
        stages = self._stages(candidate, recompute.host_optimizer)
        stage, found = _peak(stages, recompute)
        host = 0.0
        if self.machine.device != "cuda":
            return Memory(found, stage, self.machine.reserved_bytes)
        if recompute.offloaded:
            kept = max(n.in_flight * n.activations.kept(recompute_up=recompute.up) for n in stages.values())
            host += PINNED_ROUNDING * recompute.offloaded * kept
        if recompute.host_optimizer:
            host += self._host_optimizer_bytes(candidate)
        return Memory(found, stage, self.machine.reserved_bytes, host)

    def _host_optimizer_bytes(self, candidate: Candidate) -> float:
        """Bytes of the host's memory that the optimizer's states take, of the stage with the most weights."""
        weights = max(stage.static.parameters for stage in self._stages(candidate, True).values())
        return host_optimizer_bytes(weights, candidate.config, candidate.parallel)

    def _stages(self, candidate: Candidate, host_optimizer: bool) -> dict[int, StageMemory]:
        """What memory goes by of the stages that may be the fullest: the first, the last and the one with the most layers."""
        is_sharded = candidate.config.parallel.use_distributed_optimizer
        key = (candidate.parallel, candidate.split, candidate.micro_batch_size, is_sharded, host_optimizer)
        if key not in self._memories:
            self._memories[key] = self._make_stages(candidate, host_optimizer)
        return self._memories[key]

    def _make_stages(self, candidate: Candidate, host_optimizer: bool) -> dict[int, StageMemory]:
        layers = [sum(rank) for rank in candidate.split]
        config = candidate.config
        if host_optimizer != config.optimizer.optimizer_cpu_offload:
            optimizer = dataclasses.replace(config.optimizer, optimizer_cpu_offload=host_optimizer)
            config = dataclasses.replace(config, optimizer=optimizer)
        return {
            stage: StageMemory.of(
                self.shape,
                config,
                candidate.parallel,
                tokens=candidate.micro_batch_size * self.workload.longest.places,
                num_microbatches=candidate.micro_batches,
                stage=stage,
                on_cuda=self.machine.device == "cuda",
            )
            for stage in sorted({0, len(layers) - 1, layers.index(max(layers))})
        }

    def _families(self, candidate: Candidate) -> list[list[Recompute]]:
        """What may be recomputed and may wait in host memory: lists in which memory falls and time grows."""
        training = self.config.training
        layers = max(n for rank in candidate.split for n in rank)
        found: list[list[Recompute]] = []
        for on in self._host_optimizer(candidate):
            if "cpu_offloading_num_layers" in self.given:
                offloaded = [min(training.cpu_offloading_num_layers or 0, layers - 1)]
            else:
                offloaded = list(range(min(layers, 1 + self._most_offloaded(candidate, on))))
            if training.recompute_granularity == "auto" or not self.given.intersection(RECOMPUTE):
                found += [[Recompute(up, 0, n, on) for n in offloaded] for up in (False, True)]
                found.append(
                    [Recompute(True, n, min(offloaded[0], max(0, layers - n - 1)), on) for n in range(1, layers + 1)]
                )
            else:
                own = dataclasses.replace(self._configured(layers), host_optimizer=on)
                most = max(0, layers - own.whole_layers - 1)
                found.append([dataclasses.replace(own, offloaded=n) for n in sorted({min(n, most) for n in offloaded})])
        return found

    def _host_optimizer(self, candidate: Candidate) -> tuple[bool, ...]:
        """Whether the optimizer's states are on the device, in host memory, or may be in either."""
        own = self.config.optimizer.optimizer_cpu_offload
        if "optimizer_cpu_offload" in self.given or own or self.machine.device != "cuda":
            return (own,)
        may = "use_distributed_optimizer" not in self.given or self.config.parallel.use_distributed_optimizer
        return (False, True) if may and self._host_room(candidate, True) > 0 else (False,)

    def _host_room(self, candidate: Candidate, host_optimizer: bool) -> float:
        """Bytes of the host's memory that activations of a rank may take."""
        room = HOST_SHARE * self.machine.host_memory_bytes
        return room - self._host_optimizer_bytes(candidate) if host_optimizer else room

    def _most_offloaded(self, candidate: Candidate, host_optimizer: bool) -> int:
        """Layers of a virtual stage whose activations the host has room for, if nothing is recomputed."""
        if self.machine.device != "cuda" or self.config.training.fp8_format is not None:
            # What is saved would include FP8 copies of weights: train refuses it (config.check).
            return 0
        first = self._stages(candidate, host_optimizer)[0]
        kept = first.in_flight * first.activations.kept(recompute_up=False)
        return max(0, int(self._host_room(candidate, host_optimizer) / (PINNED_ROUNDING * kept)))

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
        return dataclasses.replace(
            found,
            offloaded=min(training.cpu_offloading_num_layers or 0, most),
            host_optimizer=self.config.optimizer.optimizer_cpu_offload,
        )

    def as_configured(self) -> Plan:
        """The configuration's own layout, whether it fits or not.

        Raises:
            ConfigError: the trainer does not take it.
        """
        candidate = candidate_of(self.config, self.shape, self.world_size)
        training = self.config.training
        if training.recompute_granularity == "auto":
            # What the trainer decides by itself.
            given = {"optimizer_cpu_offload"}
            if training.cpu_offloading_num_layers is not None:
                given.add("cpu_offloading_num_layers")
            free = dataclasses.replace(self, given=frozenset(given))
            return free.fitted(candidate) or free.leanest(candidate)
        layers = max(n for rank in candidate.split for n in rank)
        return self.plan(candidate, self._configured(layers))

    def closest(self) -> Plan:
        """The plan that is closest to fitting: the least memory of all."""
        plans: Iterable[Plan] = (self.leanest(candidate) for candidate in self.candidates)
        return min(plans, key=lambda plan: self._excess(plan.memory))


def recompute_of(training: TrainingConfig, layers: int) -> Recompute | None:
    """What a configuration recomputes; None if the estimate does not know it."""
    if training.recompute_granularity == "none":
        return Recompute(False)
    if training.recompute_granularity == "selective":
        return Recompute(True) if set(training.recompute_modules) == {"mlp_up"} else None
    if training.recompute_method == "uniform":
        return Recompute(True, layers) if training.recompute_num_layers == 1 else None
    return Recompute("mlp_up" in training.recompute_modules, min(layers, training.recompute_num_layers))


def _peak(stages: dict[int, StageMemory], recompute: Recompute) -> tuple[int, StepBytes]:
    """The fullest stage, and its bytes."""
    found = (
        (
            stage,
            memory.peak(whole_layers=recompute.whole_layers, recompute_up=recompute.up, offloaded=recompute.offloaded),
        )
        for stage, memory in stages.items()
    )
    return max(found, key=lambda item: item[1].total)
