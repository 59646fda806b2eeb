"""What is simulated: given to the simulating process as JSON, so this module imports neither torch nor megatron-core."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Card:
    """A GPU to simulate.

    Attributes:
        memory_bytes: its memory.
        capability: CUDA compute capability.
        cudnn: version of cuDNN, as torch gives it.
        processors: number of multiprocessors.
        per_node: GPUs of a node.
    """

    memory_bytes: int = 80 * 2**30
    capability: tuple[int, int] = (9, 0)
    cudnn: int = 91900
    processors: int = 132
    per_node: int = 8

    def as_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Card:
        content = json.loads(text)
        return cls(**{**content, "capability": tuple(content["capability"])})


@dataclass(frozen=True)
class Request:
    """One rank of one layout, one model, one length.

    Attributes:
        config: configuration of the run, by section.
        world_size: number of processes.
        rank: the one that is simulated.
        shape: ``model.json`` of the model without its schema version.
        model: without ``shape``: path of a folder with ``model.json`` or Hugging Face's ``config.json``, or of such a file; None:
            the configuration's ``load``.
        tokens: tokens of the chosen row of a made-up sample; None: the longest samples of the configuration's data.
        answer_tokens: tokens of its chosen answer; the rejected one has three quarters as many.
        turns: its turns.
        micro_batches: micro batches per step; None: as many as the peak needs.
    """

    config: dict[str, Any]
    world_size: int = 1
    rank: int = 0
    shape: dict[str, Any] | None = None
    model: str | None = None
    tokens: int | None = None
    answer_tokens: int = 512
    turns: int = 1
    micro_batches: int | None = None

    def as_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Request:
        return cls(**json.loads(text))


@dataclass
class Report:
    """What was found of one step.

    Attributes:
        layout: degrees of parallelism, in words.
        recompute: what is recomputed, in words.
        attention: kernels, and why.
        layers: linear layers, in words.
        tokens: places of a micro batch, over all its context-parallel ranks.
        micro_batches: micro batches of the step.
        peak_bytes: most live bytes of the step.
        estimate_bytes: what training/memory.py estimates for it; None if it does not know what is recomputed.
        static_bytes: live bytes before the step.
        host_bytes: most bytes of pinned host memory in the step.
        setup_peak_bytes: most live bytes before the first step.
        peak: moment of the peak: ``place``, ``operator``, ``phase``.
        kinds: live bytes at the peak, by kind.
        places: live bytes at the peak, by place of allocation; the largest.
        phases: most live bytes of each part of the step.
        flops: floating-point operations of this rank, by kind.
        exchanges: rows of ``collective``, ``group``, ``calls``, ``bytes`` that this rank sends.
        waits: rows of ``what``, ``place``, ``times`` that the host waits for the GPU.
        host_work: operators on tensors of the host within the step, by place.
        kernels: rows of ``operator``, ``given`` (types, shapes, strides), ``calls``.
        blocks: rows of ``direction``, ``lengths``, ``calls`` and, of each tensor that the attention kernels are given, shape,
            strides and offset in its storage.
        violations: rows of ``problem``, ``place``, ``times``: what kernels and collectives do not take.
        operators: number of operators called.
        curve: ``at`` (number of the operator), ``live``, ``kinds``, ``phases``: live bytes over the step.
        seconds: how long the simulation took.
    """

    layout: str = ""
    recompute: str = ""
    attention: str = ""
    layers: str = ""
    tokens: int = 0
    micro_batches: int = 0
    peak_bytes: int = 0
    estimate_bytes: int | None = None
    static_bytes: int = 0
    host_bytes: int = 0
    setup_peak_bytes: int = 0
    peak: dict[str, str] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    places: dict[str, int] = field(default_factory=dict)
    phases: dict[str, int] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)
    exchanges: list[dict[str, Any]] = field(default_factory=list)
    waits: list[dict[str, Any]] = field(default_factory=list)
    host_work: dict[str, int] = field(default_factory=dict)
    kernels: list[dict[str, Any]] = field(default_factory=list)
    blocks: list[dict[str, Any]] = field(default_factory=list)
    violations: list[dict[str, Any]] = field(default_factory=list)
    operators: int = 0
    curve: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def as_json(self, indent: int | None = 1) -> str:
        return json.dumps(dataclasses.asdict(self), indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Report:
        return cls(**json.loads(text))
