"""Train: one step after another on the parts that a ``Session`` holds.

A step reads like its description: take the batch, get its reference, forward and backward, update, report. docs/loss.md derives
how the gradient gets its scale.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from torch.profiler import record_function

from megatron_longpo.checkpoint.checksums import CHECKSUMS, Verification
from megatron_longpo.checkpoint.folders import folder_of, from_newest_good, is_one_of_several, read_progress
from megatron_longpo.config import Config, data_sources
from megatron_longpo.data.sampler import BatchSampler, BlendSampler
from megatron_longpo.errors import CheckpointError, ConfigError, LongPOError, one_line
from megatron_longpo.runtime import platform, process_groups
from megatron_longpo.runtime.collectives import all_gather_objects, on_rank0
from megatron_longpo.runtime.failure import explain, keep_tracebacks_in
from megatron_longpo.runtime.files import FolderLock, sha256_of, write_atomically
from megatron_longpo.runtime.heartbeat import at, watch_neighbour
from megatron_longpo.runtime.log import log
from megatron_longpo.runtime.signals import heed
from megatron_longpo.runtime.status import StatusFile
from megatron_longpo.runtime.waiting import Waits
from megatron_longpo.training.checkpointer import Checkpointer, TrainState, check_same_run, check_shared, run_identity
from megatron_longpo.training.data_set import DataSet
from megatron_longpo.training.fingerprint import fingerprint, fingerprint_of_batch
from megatron_longpo.training.metrics import (
    SAMPLE_METRICS,
    Reporter,
    SampleMetrics,
    gather_samples,
    reduce_samples,
    validation_line,
)
from megatron_longpo.training.optimization import (
    build_optimizer,
    build_scheduler,
    gather_weights,
    inner_optimizers,
    wrap_for_training,
)
from megatron_longpo.training.phases import Phases
from megatron_longpo.training.plan import RunPlan, make_plan
from megatron_longpo.training.plausibility import first_not_finite
from megatron_longpo.training.preflight import cautions, check_run, refuse_wrong_kernels
from megatron_longpo.training.profiler import Profiler
from megatron_longpo.training.replicas import check_replicas
from megatron_longpo.training.rerun import Rerun
from megatron_longpo.training.session import Session, open_session
from megatron_longpo.training.skipping import StepGuard, write_skipped
from megatron_longpo.training.stopping import Stop, StopCondition
from megatron_longpo.training.stragglers import StragglerDetector
from megatron_longpo.training.trackers import Tracker, open_trackers
from megatron_longpo.training.uploads import open_uploads

# Given the folder of a checkpoint, writes a Hugging Face model to a new folder; collective.
Export = Callable[[Path, Path], object]
_HF_PREFIX = "hf_"


class Trainer:
    """Trains the policy of a session, whose reference is prepared and whose weights are loaded.

    Args:
        session: data, model, reference and held-out evaluation.
        checkpointer: saves the run and resumes it.
        began: value of ``time.monotonic()`` when the program began.
        status: file that says where the run is; None: there is none.
        trackers: opened trackers of this rank.
        export: writes a checkpoint's weights in Hugging Face's form, given its folder and the new one; collective. Needed with
            save_hf_interval.
        is_replay: whether steps of another run are only computed again, so that its folder stays as it is.
    """

    def __init__(
        self,
        session: Session,
        checkpointer: Checkpointer,
        *,
        began: float,
        status: StatusFile | None = None,
        trackers: Sequence[Tracker] = (),
        export: Export | None = None,
        is_replay: bool = False,
    ) -> None:
        plan, config = session.plan, session.config
        self.session, self.checkpointer = session, checkpointer
        self.status = status or StatusFile(None, train_iters=plan.train_iters)
        self.plan, self.config, self.parallel = plan, config, session.parallel
        self.chunks, self.reference, self.held_out = session.chunks, session.reference, session.held_out
        self.model = wrap_for_training(self.chunks, config)
        self.optimizer = build_optimizer(config, self.model)
        self.scheduler = build_scheduler(config, self.optimizer, plan.train_iters)
        self.rerun = Rerun(config, self.parallel, session.runner, chunks=self.chunks, model=self.model)
        self.guard = StepGuard(config.faults)
        self.state = TrainState(
            chunks=self.chunks, optimizer=self.optimizer, scheduler=self.scheduler, guard=self.guard
        )
        self.sampler = _sampler(plan, session.data.train)
        self._numbers: list[int] = []
        self.profiler = Profiler(config.logging, plan.output, self.parallel.rank)
        self.stop_condition = StopCondition(config.checkpoint, began=began)
        self._waits = Waits()
        self.phases = Phases(self._waits)
        self.stragglers = self._straggler_detector() if self.parallel.world_size > 1 and not is_replay else None
        self.step = 0
        self._export, self._trackers, self.is_replay = export, trackers, is_replay
        # Summary of the held-out data after this step, if they were evaluated.
        self._held_out: dict[str, Any] | None = None
        self._configure_schedule()

    def _straggler_detector(self) -> StragglerDetector | None:
        if not self.config.logging.log_straggler:
            return None
        return StragglerDetector(
            self.config.logging,
            self.parallel,
            self.plan.policy_shape,
            layers=sum(len(chunk.decoder.layers) for chunk in self.chunks),
            parameters=sum(p.numel() for chunk in self.chunks for p in chunk.parameters()),
        )

    def _configure_schedule(self) -> None:
        """Set what megatron-core's schedules read from the model's configuration."""
        megatron = self.chunks[0].config
        megatron.grad_scale_func = self.optimizer.scale_loss
        megatron.finalize_model_grads_func = finalize_model_grads
        several = len(self.model) > 1
        if self.config.parallel.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in self.model]
            megatron.no_sync_func = no_sync if several else no_sync[0]
            if several:
                megatron.grad_sync_func = [chunk.start_grad_sync for chunk in self.model]

    def resume(self) -> None:
        """Continue after the newest checkpoint of this run, if there is one; collective."""
        self.step = self.checkpointer.resume(self.state)
        # Not before: it drops what was logged after the checkpoint that the run resumes from.
        self.reporter = Reporter(
            self.plan.output,
            train_iters=self.plan.train_iters,
            resumed_step=self.step,
            config=self.config,
            active=self.parallel.rank == 0,
            trackers=self._trackers,
        )
        # A kill may have come between a checkpoint and its export.
        self._export_hf()

    def train(self) -> Stop | None:
        """Train to the last step, evaluating and saving on the way; collective.

        Returns:
            Why it stopped before, or None.
        """
        with contextlib.closing(self.stop_condition), contextlib.closing(self._waits):
            if self.stragglers is not None:
                self._waits.open()
            stop = self._train()
            self.profiler.close(self.step)
            # Whoever stops a job often sends its signal twice: the second one must not end the writing of the checkpoint.
            self.checkpointer.close(while_waiting=lambda: self.status.beat(self.step))
        self.reporter.close()
        self.status.write("stopped" if stop else "finished", step=self.step, message=stop.reason if stop else "")
        # A rank that ends with status 75 makes torchrun end the others, which may still be closing trackers.
        dist.barrier()
        return stop

    def _train(self) -> Stop | None:
        self.stop_condition.open()
        self.status.write("running", step=self.step)
        # A run that was stopped by a signal had no time for an evaluation after its last step.
        if not on_rank0(lambda: self.reporter.has_validation(self.step)):
            self.evaluate()
            if self.step:
                self.save(last=False)
        while self.step < self.plan.train_iters:
            self.profiler.update(self.step)
            record = self.train_step()
            self.step += 1
            self.reporter.step(record)
            if self.stragglers is not None:
                self.status.slow = self.stragglers.said
            self.status.beat(self.step)
            self._check_replicas()
            last = self.step == self.plan.train_iters
            stop = None if last else self.stop_condition.check(self.step)
            if stop is None or not stop.is_urgent:
                self.evaluate()
            self.save(last=last, stopping=stop is not None)
            if stop is not None:
                self._log(f"stopped after step {self.step} {stop.reason}; rerun the same command to continue")
                return stop
            self._collect_garbage()
        return None

    # Steps --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """A part of a step, as profiles and the heartbeat know it."""
        at(f"step {self.step + 1}: {name}")
        with record_function(f"longpo/{name}"):
            yield

    def forward_backward(self, numbers: Sequence[int]) -> list[SampleMetrics]:
        """Compute the loss of a global batch and its gradients, which are in DDP's buffers afterwards; collective.

        Args:
            numbers: numbers of the samples.

        Returns:
            Metrics of this rank's samples, on the last pipeline stage.
        """
        self._numbers = list(numbers)
        if self.config.reference.reference == "online":
            # It may take the place of the policy's weights, which are set aside.
            gather_weights(self.model)
        with self._phase("reference"):
            reference = self.reference.logps(self.session.data.train, numbers)
        self.phases.end("reference")
        data = self.session.data.train
        with self._phase("data"):
            batches = self.session.runner.lay_out(data, numbers, reference)
        if self.stragglers is not None:
            costs = [data.costs[number] for number in numbers]
            self.stragglers.count_work(batches, costs, reference=self.reference.work)
        self.phases.end("data")
        if not self.is_replay and self.rerun.is_due(self.step + 1):
            gather_weights(self.model)
            with self._phase("rerun"):
                self.rerun.check(batches, count=len(numbers), step=self.step + 1)
            self.phases.end("rerun")
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        with self._phase("forward_backward"):
            return self.session.runner.forward_backward(self.model, batches, count=len(numbers))

    def train_step(self) -> dict[str, Any]:
        """Take one optimizer step; collective. Returns what metrics.jsonl records of it."""
        self.phases.begin()
        numbers = self.sampler.batch(self.step)
        found = self.forward_backward(numbers)
        # The host waits for the device here, so the phase is whole.
        means = reduce_samples(found, len(numbers), self.parallel)
        self.phases.end("forward_backward")
        fault, grad_norm = self.guard.fault_of_loss(means["loss"]), None
        prints = self._fingerprints(numbers)
        if fault is None:
            with self._phase("optimizer"):
                grad_norm = float(self.optimizer.step()[1])
            fault = self.guard.fault_of_gradient(grad_norm)
        if prints:
            gather_weights(self.model)
            prints["fingerprint/weights"] = fingerprint(p for chunk in self.chunks for p in chunk.parameters())
        lr = self.optimizer.param_groups[0]["lr"]
        self.scheduler.step(increment=1)
        if fault is None:
            self.guard.take(means["loss"])
        else:
            self._skip(fault, numbers, found, means)

        platform.CURRENT.synchronize()
        self.phases.end("optimizer")
        self.phases.end_step()
        seconds = self.phases.step_seconds
        tokens = int(means.pop("tokens"))
        record = {
            "step": self.step + 1,
            **means,
            "grad_norm": math.nan if grad_norm is None else grad_norm,
            "lr": lr,
            **{f"samples/{name}": count for name, count in self.session.data.train.counts(numbers).items()},
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds,
            **self._speed(numbers, tokens, seconds),
            **self.phases.as_metrics(),
            "peak_memory_gb": platform.CURRENT.peak_memory_bytes() / 2**30,
            **{f"memory/{name}_gb": size / 2**30 for name, size in self._memory().items()},
            **prints,
            **self._straggler_metrics(),
        }
        if fault is None:
            return record
        return {**{k: v for k, v in record.items() if math.isfinite(v)}, "skipped": len(self.guard.skipped)}

    # What is said of a step ---------------------------------------------------------------------------

    def _straggler_metrics(self) -> dict[str, float]:
        """Figures of the slowest ranks if it is time to; collective."""
        if self.stragglers is None:
            return {}
        self.stragglers.add(self.phases.own_seconds(), step_seconds=self.phases.step_seconds)
        step, interval = self.step + 1, self.config.logging.log_interval
        return self.stragglers.report() if step % interval == 0 or step == self.plan.train_iters else {}

    def _speed(self, numbers: Sequence[int], tokens: int, seconds: float) -> dict[str, float]:
        """Operations per second of a rank, and their share of what its device can do, where that is known."""
        cost = sum(self.session.data.train.costs[number] for number in numbers)
        rate = self.plan.policy_shape.step_flops(cost, tokens) / seconds / self.parallel.world_size
        peak = platform.CURRENT.peak_flops() if self.config.training.bf16 else None
        return {"tflops_per_rank": rate / 1e12, **({} if peak is None else {"mfu": rate / peak})}

    def _memory(self) -> dict[str, int]:
        """Bytes that this rank holds from step to step, by part."""
        parameters = [p for chunk in self.chunks for p in chunk.parameters()]
        states = [t for inner in inner_optimizers(self.optimizer) for s in inner.state.values() for t in s.values()]
        masters = [
            p for inner in inner_optimizers(self.optimizer) for group in inner.param_groups for p in group["params"]
        ]
        own = {p.untyped_storage().data_ptr() for p in parameters}
        states += [p for p in masters if p.untyped_storage().data_ptr() not in own]
        return {
            "weights": _bytes(parameters),
            "gradients": _bytes(p.main_grad for p in parameters if p.requires_grad),
            "optimizer": _bytes(state for state in states if isinstance(state, torch.Tensor)),
        }

    def describe(self, numbers: Sequence[int], found: Sequence[SampleMetrics]) -> list[dict[str, Any]]:
        """Where each sample of a global batch is, and its own metrics; on every rank. Collective."""
        table = gather_samples(found, SAMPLE_METRICS, len(numbers), self.parallel)
        values = torch.stack([table[name] for name in SAMPLE_METRICS], dim=1).tolist()
        described = []
        for number, row in zip(numbers, values, strict=True):
            prefix, inside = self.session.data.train.place_of(number)
            described.append({"data": prefix, "sample": inside, **dict(zip(SAMPLE_METRICS, row, strict=True))})
        return described

    # Steps that are skipped ---------------------------------------------------------------------------

    def _skip(
        self, fault: str, numbers: Sequence[int], found: Sequence[SampleMetrics], means: dict[str, float]
    ) -> None:
        """Count this step as skipped, and write down its samples; collective.

        Raises:
            LongPOError: it is one too many.
        """
        step, output = self.step + 1, self.plan.output
        self.guard.skip(step)
        samples = self.describe(numbers, found)
        where = ""
        if output is not None and not self.is_replay:
            where = on_rank0(lambda: self._note_skipped(output, fault, means, samples))
        most = self.config.faults.max_skipped_steps
        if self.guard.is_too_many:
            raise LongPOError(
                f"step {step}: {fault} (samples {list(numbers[:8])}), and max_skipped_steps={most} steps were skipped before; "
                f"{self.checkpointer.advice(step - self.guard.streak)}{where}"
            )
        self._log(f"step {step} is skipped ({len(self.guard.skipped)} of at most {most}): {fault}{where}")

    def _note_skipped(
        self, output: Path, fault: str, means: Mapping[str, float], samples: Sequence[Mapping[str, Any]]
    ) -> str:
        """Write down a skipped step, on rank 0, and say where. A disk that takes nothing ends no run for it."""
        try:
            return f"; {write_skipped(output, self.step + 1, fault, metrics=means, samples=samples)} has the samples"
        except OSError as error:
            return f"; its samples could not be written ({one_line(error)})"

    def _fingerprints(self, numbers: Sequence[int]) -> dict[str, int]:
        """Fingerprints of the batch and of the gradients if it is time to; collective."""
        interval = self.config.logging.fingerprint_interval
        if interval is None or (self.step + 1) % interval:
            return {}
        gradients = (p.main_grad for chunk in self.chunks for p in chunk.parameters() if p.requires_grad)
        return {"fingerprint/batch": fingerprint_of_batch(numbers), "fingerprint/gradients": fingerprint(gradients)}

    # Evaluation and saving ----------------------------------------------------------------------------

    def evaluate(self) -> None:
        """Evaluate the held-out data if it is time to; collective."""
        self._held_out = None
        if not self.held_out.should_evaluate(self.step):
            return
        began = time.monotonic()
        at(f"step {self.step}: evaluation")
        gather_weights(self.model)
        found = self.held_out.summary()
        self._check_finite("loss on held-out data", found["loss"], [])
        self._held_out = found
        self.reporter.validation({"step": self.step, **found, "seconds": time.monotonic() - began})

    def save(self, *, last: bool, stopping: bool = False) -> None:
        """Save a checkpoint if it is time to; collective.

        Args:
            last: whether this is the run's last step.
            stopping: whether the run stops here, to go on later.

        Raises:
            LongPOError: a weight or an optimizer state is not finite, or the run ends with steps that were skipped; nothing is
                saved.
        """
        streak, saved = self.guard.streak, self.checkpointer.saved_step
        if last and streak > 1:
            raise LongPOError(
                f"step {self.step}: the run ends with {streak} skipped steps, so it is not finished; "
                f"{self.checkpointer.advice(self.step - streak)}"
            )
        if streak and not (last or stopping) and saved is not None and saved >= self.step - streak:
            # The same weights again would only take the place of older ones, and these may be what the run has to go back to.
            if self.checkpointer.is_hf_due(self.step):
                self._log(
                    f"step {self.step} is skipped, so its weights are those of before, and are not exported again"
                )
            return
        last = last or stopping
        if last and self.config.faults.on_save_failure == "continue":
            # An earlier checkpoint that fails in the background does not keep the last one from being written.
            try:
                self.checkpointer.wait()
            except CheckpointError as error:
                self._go_on_without_save(error)
        if self.checkpointer.is_due(self.step, last=last, held_out=self._held_out):
            gather_weights(self.model)
            name = first_not_finite(self.chunks, inner_optimizers(self.optimizer))
            if name is not None:
                raise LongPOError(
                    f"step {self.step}: {name} is not finite after it (samples {self._numbers[:8]}), so it is not saved; "
                    f"{self.checkpointer.advice(self.step)}"
                )
        try:
            with self._phase("save"):
                self.checkpointer.save(
                    self.step, self.state, records=self.reporter.records, last=last, held_out=self._held_out
                )
                if self.checkpointer.is_hf_due(self.step):
                    # The export reads this step's checkpoint, so it must be there.
                    self.checkpointer.wait()
        except CheckpointError as error:
            # All ranks have it, so all go on.
            if last or self.config.faults.on_save_failure == "stop":
                raise
            self._go_on_without_save(error)
            return
        self._export_hf()

    def _go_on_without_save(self, error: CheckpointError) -> None:
        step = self.checkpointer.saved_step
        self.checkpointer.give_up_save()
        lost = "not saved"
        if step is not None and self.checkpointer.is_hf_due(step):
            lost += f", nor exported to {_HF_PREFIX}{step:07d}"
        # All ranks have the error, and a warning is shown whichever rank gives it.
        if self.parallel.rank == 0:
            log(
                f"{error}; step {step} is {lost}, and training goes on (on_save_failure=continue)",
                level=logging.WARNING,
            )

    def _export_hf(self) -> None:
        """Write Hugging Face weights beside the checkpoint of this step if it is time to and they are not there; collective."""
        output = self.plan.output
        if output is None or not self.checkpointer.is_hf_due(self.step):
            return
        assert self._export is not None
        folder = output / f"{_HF_PREFIX}{self.step:07d}"
        if on_rank0(folder.exists):
            return
        self.checkpointer.wait()
        with self._phase("export"):
            self._export(folder_of(output, self.step), folder)

    # Checks -------------------------------------------------------------------------------------------

    def _check_replicas(self) -> None:
        interval = self.config.faults.check_weight_hash_across_dp_replicas_interval
        if interval is not None and self.step % interval == 0:
            gather_weights(self.model)
            weights = (parameter for chunk in self.chunks for parameter in chunk.parameters())
            check_replicas(weights, self.parallel, step=self.step)

    def _collect_garbage(self) -> None:
        interval = self.config.training.manual_gc_interval
        if interval and self.step % interval == 0:
            gc.collect()

    def _check_finite(self, what: str, value: float, numbers: Sequence[int]) -> None:
        if not math.isfinite(value):
            raise LongPOError(
                f"step {self.step + 1}: the {what} is {value} (samples {list(numbers[:8])}); "
                f"{self.checkpointer.advice(self.step)}"
            )

    def _log(self, message: str) -> None:
        log(message, active=self.parallel.rank == 0)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _sampler(plan: RunPlan, data: DataSet) -> BatchSampler | BlendSampler:
    """The order in which a run uses its samples."""
    config = plan.config
    assert config.data.data_path is not None
    weights = [source.weight for source in data_sources(config.data.data_path)]
    order: dict[str, Any] = {"shuffle": config.data.shuffle, "seed": config.training.seed}
    if len(weights) == 1 or None in weights:
        return BatchSampler(len(data), plan.samples_per_step, **order)
    shares = [weight for weight in weights if weight is not None]
    return BlendSampler([len(part) for part in data.parts], shares, plan.samples_per_step, **order)


# --------------------------------------------------------------------------------------------------
# Starting a run
# --------------------------------------------------------------------------------------------------


def hold_output(output: Path | None) -> FolderLock | None:
    """Lock the output folder of a run, which rank 0 holds until it ends; collective.

    Raises:
        CheckpointError: another run works on it.
    """
    held: list[FolderLock] = []

    def hold() -> None:
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            held.append(FolderLock(output, error=CheckpointError, record=True))

    on_rank0(hold)
    if output is not None:
        check_shared(output)
        keep_tracebacks_in(output)
    return held[0] if held else None


def start_training(
    session: Session, *, began: float, status: StatusFile | None = None, export: Export | None = None
) -> Trainer:
    """Turn an open session into a trainer that is ready for its next step; collective.

    Args:
        session: a session whose reference is not prepared yet.
        began: value of ``time.monotonic()`` when the program began.
        status: see ``Trainer``.
        export: see ``Trainer``.

    Raises:
        CheckpointError, DataError: a checkpoint or cache cannot be used, or the output folder holds another run.
    """
    # First, because they refuse another run's folder before the reference takes its hours.
    folder_lock = hold_output(session.plan.output)
    if status is not None:
        status.write("starting")
    plan, reference = session.plan, session.reference.weights
    identity = run_identity(plan, reference)
    uploads = open_uploads(
        plan, session.parallel, lambda folder: check_same_run(read_progress(folder), identity, folder)
    )
    checkpointer = Checkpointer(
        plan, session.parallel, reference_weights=reference, folder_lock=folder_lock, uploads=uploads
    )
    trackers = _open_trackers(session)
    # Before the optimizer is built: until then its memory is free, and it copies the weights that it finds.
    at("the reference")
    session.score_reference()
    if checkpointer.resume_step is None:
        session.load_weights()
    at("loading")
    trainer = Trainer(session, checkpointer, began=began, status=status, trackers=trackers, export=export)
    trainer.resume()
    return trainer


def _open_trackers(session: Session) -> list[Tracker]:
    """Open the trackers on rank 0, before anything takes long; the other ranks have none. Collective."""
    opened: list[Tracker] = []

    def open_all() -> None:
        if session.plan.output is not None:
            opened.extend(open_trackers(session.config, session.plan.output))

    on_rank0(open_all)
    return opened


def evaluate_only(session: Session) -> None:
    """Evaluate the held-out data, log the result, and write OUTPUT/validation.json if there is an output folder."""
    session.score_reference()
    session.load_weights()
    plan, is_rank0 = session.plan, session.parallel.rank == 0
    found = session.held_out.summary()
    log(f"{plan.load}: {validation_line(found)}", active=is_rank0)
    if is_rank0 and plan.output is not None:
        plan.output.mkdir(parents=True, exist_ok=True)
        content = {"checkpoint": str(plan.load), **found}
        write_atomically(plan.output / "validation.json", (json.dumps(content, indent=2) + "\n").encode())


def _verified(folder: Path) -> Path:
    Verification(folder).wait()
    return folder


def _check_same_choice(plan: RunPlan) -> None:
    """Check that all ranks start from the same checkpoints: each has chosen by itself, and a run may be saving there; collective.

    Raises:
        CheckpointError: they do not.
    """

    def known(folder: Path) -> tuple[str, str | None]:
        listed = folder / CHECKSUMS
        return folder.name, sha256_of(listed) if listed.is_file() else None

    for name, given, folder in (
        ("load", plan.config.checkpoint.load, plan.load),
        ("reference_load", plan.config.reference.reference_load, plan.reference_load),
    ):
        chosen = all_gather_objects(known(folder))
        other = next((number for number, found in enumerate(chosen) if found != chosen[0]), None)
        if other is not None:
            raise CheckpointError(
                f"{name}={given}: rank 0 chose {chosen[0][0]} and rank {other} {chosen[other][0]}, since one was completed or "
                "removed while they looked, or their nodes have different copies; run the command again, copy the same "
                "checkpoint to all nodes, or name an iter_* folder that all of them have"
            )


def _from_good_checkpoints(plan: RunPlan, config: Config) -> RunPlan:
    """The plan with undamaged checkpoints, where load or reference_load names a run that has several; collective.

    A single checkpoint is verified beside its load. Here another may have to be used, with a reference of its own, so this is
    known before the model is built.

    Args:
        plan: plan by a first look at the checkpoints.
        config: the configuration that it was made of.

    Raises:
        CheckpointError: all checkpoints of the run are damaged.
    """
    _check_same_choice(plan)
    changed = False
    for path, folder in (
        (config.checkpoint.load, plan.load),
        (config.reference.reference_load, plan.reference_load),
    ):
        if path is not None and is_one_of_several(path, folder):
            log(f"{folder}: verifying its files before they are used", active=dist.get_rank() == 0)
            changed |= from_newest_good(path, _verified) != folder
    if not changed:
        return plan
    plan = make_plan(config, dist.get_world_size())
    check_run(plan)
    return plan


def run(config: Config, *, export: Export | None = None) -> Stop | None:
    """Train, or only evaluate, as a configuration says.

    Args:
        config: configuration of the run.
        export: writes a checkpoint's weights in Hugging Face's form, for save_hf_interval; see ``Trainer``.

    Returns:
        Why training stopped before its last step, or None.

    Raises:
        LongPOError: anything that the user can fix; found before any long work wherever possible.
    """
    began = time.monotonic()
    if config.checkpoint.exit_signal_handler:
        heed(config.checkpoint.exit_signal)
    plan = make_plan(config, int(os.environ.get("WORLD_SIZE", "1")))
    check_run(plan)
    if config.checkpoint.save_hf_interval is not None and export is None:
        raise ConfigError(
            "save_hf_interval needs an export; start the run by `megatron-longpo train`, or pass one to run"
        )
    if config.training.deterministic_mode:
        platform.CURRENT.use_deterministic_algorithms()
    platform.CURRENT.start_kernels_in_order(config.parallel.tensor_model_parallel_size)
    process_groups.start_processes(config.parallel.distributed_timeout_minutes)
    plan = _from_good_checkpoints(plan, config)
    watch_neighbour(config.faults.heartbeat_timeout_seconds)
    session = open_session(plan)
    refuse_wrong_kernels(session)
    for line in cautions(plan):
        log(line, active=session.parallel.rank == 0)
    stop = None
    if config.reference.reference_only:
        session.score_reference()
    elif config.training.skip_train:
        evaluate_only(session)
    else:
        status = StatusFile(plan.output, train_iters=plan.train_iters, only_failures=session.parallel.rank != 0)
        try:
            stop = start_training(session, began=began, status=status, export=export).train()
        except Exception as error:
            reason = str(error) if isinstance(error, LongPOError) else explain(error, plan.output)
            # Anything else may pass when the run is started again, so it counts as broken off.
            if reason is not None:
                status.fail(reason)
            raise
    process_groups.stop_processes()
    return stop
