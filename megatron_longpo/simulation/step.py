"""One rank's training step on simulated tensors: the trainer's own, from the plan of the run to the optimizer's update."""

from __future__ import annotations

import collections
import dataclasses
import functools
import gc
import importlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_iter

from megatron_longpo.config import TrainingConfig
from megatron_longpo.simulation import device, world
from megatron_longpo.simulation.account import Account
from megatron_longpo.simulation.places import GRADIENTS, OPTIMIZER, SET_UP, WEIGHTS
from megatron_longpo.simulation.request import Report, Request


def serve(requests: TextIO, reports: Path) -> None:
    """Simulate one request per line, and write one report per line."""
    simulator = Simulator()
    with open(reports, "w", encoding="utf-8") as stream:
        for line in requests:
            request = Request.from_json(line)
            stream.write(simulator.run(request).as_json(indent=None) + "\n")
            stream.flush()


class Simulator:
    """Simulates one request after another. ``device.install`` must have been called, which is never undone."""

    def __init__(self) -> None:
        world.install()
        # Functions are compiled as their modules are imported.
        compile_, torch.compile = torch.compile, self._compile  # type: ignore[assignment]
        try:
            # Rank 0 may be another rank than the one that is here.
            collectives: Any = importlib.import_module("megatron_longpo.runtime.collectives")
            collectives.on_rank0 = lambda action: action()
            importlib.import_module("megatron_longpo.training.trainer")
            # An online reference has weights that are not there either.
            reference: Any = importlib.import_module("megatron_longpo.training.reference")
            reference.load_weights = lambda *_, **__: None
        finally:
            torch.compile = compile_  # type: ignore[assignment]
        # The host is another machine than this one.
        platform: Any = importlib.import_module("megatron_longpo.runtime.platform")
        platform.Platform.host_memory_bytes = lambda _: sys.maxsize
        # What is there now stays; a collection need not look at it again.
        gc.freeze()
        self.account = Account()
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        FakeTensor.tolist = lambda tensor: self.account.tolist(tensor)  # type: ignore[assignment,method-assign]
        numpy = torch.Tensor.numpy

        def as_numpy(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> np.ndarray:
            if isinstance(tensor, FakeTensor):
                return np.asarray(self.account.tolist(tensor))
            return numpy(tensor, *args, **kwargs)

        torch.Tensor.numpy = as_numpy  # type: ignore[method-assign,assignment]
        torch.cuda.synchronize = lambda *_, **__: self.account.wait("torch.cuda.synchronize")  # type: ignore[assignment]

    def _compile(self, function: Callable[..., Any] | None = None, **_: Any) -> Any:
        """Stands for ``torch.compile``: a compiled function allocates its results only."""
        if function is None:
            return self._compile
        plain = function

        @functools.wraps(plain)
        def compiled(*args: Any, **kwargs: Any) -> Any:
            with self.account.hidden():
                out = plain(*args, **kwargs)
            for x in tree_iter(out):
                if isinstance(x, torch.Tensor):
                    self.account.note(x)
            # While inputs and results are there.
            self.account.measure(f"compiled {plain.__name__}")
            return out

        return compiled

    def run(self, request: Request) -> Report:
        """Simulate a step."""
        from megatron_longpo.runtime import process_groups

        began = time.monotonic()
        world.join(request.rank, request.world_size)
        self.account.phase = "set-up"
        self.account.reset()
        try:
            with tempfile.TemporaryDirectory() as folder, self._mode, self.account, device.Spellings():
                report = _simulate(request, Path(folder), self.account)
        finally:
            process_groups.stop_processes()
            gc.collect()
        report.seconds = time.monotonic() - began
        return report


def _simulate(request: Request, folder: Path, account: Account) -> Report:
    from megatron_longpo.simulation.blocks import record_blocks
    from megatron_longpo.simulation.data import plan_of
    from megatron_longpo.training import memory
    from megatron_longpo.training.checkpointer import Checkpointer
    from megatron_longpo.training.data_set import open_data
    from megatron_longpo.training.plan import groups_of
    from megatron_longpo.training.session import Session
    from megatron_longpo.training.trainer import Trainer

    report = Report()
    plan = plan_of(request, folder)
    # Transformer Engine's kernels take real tensors only.
    wanted, fp8 = plan.config.model.transformer_impl, plan.config.training.fp8_format
    local = dataclasses.replace(plan.config.model, transformer_impl="local")
    training = dataclasses.replace(plan.config.training, fp8_format=None)
    plan = dataclasses.replace(plan, config=dataclasses.replace(plan.config, model=local, training=training))
    left_out = f"transformer_impl={wanted}" + (f" with fp8_format={fp8}" if fp8 else "")
    report.layers = "local" if wanted == "local" else f"local; {left_out} is not simulated"
    parallel = groups_of(plan)
    data = open_data(plan)
    plan = memory.decide_recompute(plan, data.train, parallel)
    session = Session(plan, parallel, data)
    blocks: collections.Counter[str] = collections.Counter()
    record_blocks(session.chunks, blocks)
    groups = {
        "tp": session.chunks[0].pg_collection.tp,
        "cp": parallel.context_group,
        "pp": parallel.pipeline_group,
        "dp": parallel.data_group,
        "dp_cp": parallel.dp_cp_group,
    }
    # Of groups with the same ranks the first gives the name.
    names = {group.group_name: name for name, group in reversed(groups.items())}
    account.group_name = lambda group: names.get(group.group_name, "others")
    tables = getattr(session.reference, "_tables", None)
    if tables is not None:
        # Log-probs of a cached reference are there before training begins.
        tables[data.train] = np.zeros((len(data.train), 2))
    else:
        session.reference.prepare([data.train])
    checkpointer = Checkpointer(plan, parallel, reference_weights="")
    trainer = Trainer(session, checkpointer, began=time.monotonic())
    trainer.resume()
    for model in [*trainer.model, *getattr(session.reference, "_chunks", ())]:
        for x in model.parameters():
            account.note(x, WEIGHTS)
    for chunk in trainer.model:
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            account.note(buffer.grad_data, GRADIENTS)
            if buffer.param_data is not None:
                account.note(buffer.param_data, WEIGHTS)
    # The optimizer makes its states in its first step. They are part of every later one, which is the step that is measured.
    _make_states(trainer, account)
    gc.collect()
    report.setup_peak_bytes = max((p.live for p in account.peaks.values()), default=0)

    numbers = trainer.sampler.batch(0)
    batches = session.runner.lay_out(data.train, numbers, np.zeros((len(numbers), 2)))
    inputs, layout = batches[0].micro_batch.inputs, batches[0].micro_batch.layout
    places = inputs.tokens_1s.shape[1] // (parallel.tensor_size if parallel.sequence_parallel else 1)
    account.received = world.Peers((places, 1, plan.shape.hidden_size))
    report.tokens, report.micro_batches = layout.length, len(batches)
    del batches, inputs

    account.phase = "forward backward"
    report.static_bytes = account.live
    account.reset()
    blocks.clear()
    trainer.train_step()
    report.layout = parallel.describe()
    estimate = memory.step_bytes(
        plan.shape,
        plan.config,
        parallel,
        tokens=report.tokens,
        num_microbatches=report.micro_batches,
        stage=parallel.pipeline_rank,
    )
    report.estimate_bytes = None if estimate is None else estimate.total
    report.recompute = _recomputed(plan.config.training)
    attention = session.chunks[0].attention
    report.attention = f"{attention.kernels.name} ({attention.reason})"
    report.blocks = [{**json.loads(given), "calls": count} for given, count in blocks.items()]
    _fill(report, account)
    return report


def _recomputed(training: TrainingConfig) -> str:
    """What the backward recomputes, in words."""
    modules = ", ".join(training.recompute_modules)
    waiting = training.cpu_offloading_num_layers
    offloaded = f"; activations of {waiting} layer(s) of each stage in host memory" if waiting else ""
    if training.recompute_granularity == "full":
        if training.recompute_method == "uniform":
            return f"all layers, {training.recompute_num_layers} at a time"
        return f"{training.recompute_num_layers} layer(s) of each stage, and {modules} of the others{offloaded}"
    return (modules if training.recompute_granularity == "selective" else "nothing") + offloaded


def _make_states(trainer: Any, account: Account) -> None:
    """Take an optimizer step without gradients, and mark what it leaves as the optimizer's."""
    for chunk in trainer.model:
        chunk.zero_grad_buffer()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    account.rename(SET_UP, OPTIMIZER)


def _fill(report: Report, account: Account) -> None:
    peak = max(account.peaks.values(), key=lambda p: p.live)
    report.peak_bytes = peak.live
    report.host_bytes = account.pinned_peak
    report.peak = {"place": peak.place, "operator": peak.operator, "phase": peak.phase}
    report.kinds = _largest(peak.kinds)
    report.places = dict(list(_largest(peak.places).items())[:40])
    report.phases = {name: p.live for name, p in account.peaks.items()}
    report.flops = _largest(account.flops)
    report.exchanges = [
        {"collective": name, "group": group, "calls": e.calls, "bytes": e.sent}
        for (name, group), e in sorted(account.exchanges.items())
    ]
    report.waits = _rows(account.waits, "what", "place", "times")
    report.host_work = _largest(account.host_work)
    report.kernels = _rows(account.kernels, "operator", "given", "calls")
    report.violations = _rows(account.violations, "problem", "place", "times")
    report.operators = account.operators
    curve = account.curve
    report.curve = {"at": curve.at, "live": list(curve.live), "kinds": curve.kinds, "phases": curve.phases}


def _largest(counts: dict[str, int]) -> dict[str, int]:
    return {k: int(v) for k, v in sorted(counts.items(), key=lambda item: -item[1]) if v}


def _rows(counts: collections.Counter[tuple[str, str]], first: str, second: str, number: str) -> list[dict[str, Any]]:
    return [{first: a, second: b, number: n} for (a, b), n in counts.most_common()]
