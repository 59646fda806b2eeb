"""Save a run and resume it, with the same or another layout; ``checkpoint/folders.py`` says where the files are."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException

from megatron_longpo.checkpoint.card import RECORD, RUN_CONFIG, training_record
from megatron_longpo.checkpoint.checksums import verified, write_checksums
from megatron_longpo.checkpoint.distributed import DistributedReader
from megatron_longpo.checkpoint.folders import (
    ASSETS,
    LATEST,
    RunProgress,
    folder_of,
    passed_over,
    read_progress,
    whole_steps,
)
from megatron_longpo.checkpoint.retention import Retention
from megatron_longpo.checkpoint.saving import Save, start_save
from megatron_longpo.config import data_sources
from megatron_longpo.errors import CheckpointError, DamagedError, one_line
from megatron_longpo.model.gpt import PolicyModel
from megatron_longpo.runtime import platform
from megatron_longpo.runtime.collectives import all_gather_objects, on_rank0, raise_on_all_ranks
from megatron_longpo.runtime.files import FolderLock, write_atomically
from megatron_longpo.runtime.log import log
from megatron_longpo.runtime.process_groups import Parallel
from megatron_longpo.training.best import Best, read_best, rule_of, write_best
from megatron_longpo.training.optimization import follow_config, inner_optimizers, make_states, set_steps
from megatron_longpo.training.optimizer_state import load_optimizer, optimizer_content
from megatron_longpo.training.plan import RunPlan
from megatron_longpo.training.plausibility import first_not_finite
from megatron_longpo.training.skipping import StepGuard
from megatron_longpo.training.uploads import Uploads, check_uploads, wait_for_uploads

# Network file systems show what another node has written a little later.
_SECONDS_UNTIL_SEEN = 30.0


def run_identity(plan: RunPlan, reference_weights: str) -> dict[str, Any]:
    """Settings that determine a run's samples, loss and states, by name; they must not change within the run.

    Args:
        plan: plan of the run.
        reference_weights: name of the reference's weights.
    """
    data, training, objective = plan.config.data, plan.config.training, plan.config.objective
    return {
        "reference_weights": reference_weights,
        "data_weights": [source.weight for source in data_sources(data.data_path)] if data.data_path else [None],
        "data_sha256": plan.manifest.bin_sha256,
        "weights_sha256": plan.manifest.weights_sha256,
        "turns": data.turns,
        "shuffle": data.shuffle,
        "seed": training.seed,
        "global_batch_size": training.global_batch_size,
        "bf16": training.bf16,
        "optimizer": plan.config.optimizer.optimizer,
        "use_distributed_optimizer": plan.config.parallel.use_distributed_optimizer,
        "rotary_base": plan.policy_shape.rotary_base,
        "rope_scaling": plan.policy_shape.rope_scaling,
        "objective": objective.objective,
        "beta": objective.beta,
        "preference_weight": objective.preference_weight,
        "nll_scope": objective.nll_scope,
        "loss_type": objective.loss_type,
        "label_smoothing": objective.label_smoothing,
        "simpo_gamma": objective.simpo_gamma,
        "rpo_alpha": objective.rpo_alpha,
        "solo_alpha": objective.solo_alpha,
    }


# Values of settings that runs had before they could be set; otherwise a run saved before a setting was recorded is taken to have
# the present value.
_BEFORE = {"data_weights": [None], "weights_sha256": "", "rpo_alpha": 0.0}


def check_same_run(progress: RunProgress, identity: dict[str, Any], folder: Path) -> None:
    """Check that a run may resume from a checkpoint: what determines its samples, loss and states has not changed.

    Raises:
        CheckpointError: the first setting that differs.
    """
    for name, value in identity.items():
        before = progress.identity.get(name, _BEFORE.get(name, value))
        if before != value:
            raise CheckpointError(
                f"{folder}: the run in this folder has {name}={before}, but now it is {value}; use the same value to "
                "resume it, or another --save to start a new run from --load"
            )


@dataclass(frozen=True)
class TrainState:
    """What changes while a run trains, on this rank.

    Attributes:
        chunks: the policy's model chunks.
        optimizer: megatron-core's optimizer over them.
        scheduler: schedule of the learning rate.
        guard: decides which steps are skipped.
    """

    chunks: Sequence[PolicyModel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    guard: StepGuard


def weights_state(chunks: Sequence[PolicyModel], parallel: Parallel) -> dict[str, Any]:
    """Sharded weights of this rank's chunks, under the keys ``model0``, ``model1``, ... of the virtual stages."""
    metadata = {"dp_cp_group": parallel.dp_cp_group}
    state = {}
    for index, chunk in enumerate(chunks):
        sharded = chunk.sharded_state_dict(metadata=metadata)
        # Extra states belong to fp8. Without them one checkpoint serves both Transformer Engine and the local layers.
        state[f"model{index}"] = {k: v for k, v in sharded.items() if not k.endswith("_extra_state")}
    return state


def load_weights(path: Path, chunks: Sequence[PolicyModel], parallel: Parallel) -> None:
    """Load only the weights of a checkpoint, saved with any layout.

    Raises:
        CheckpointError: the checkpoint cannot be read, lacks a tensor, or holds values that are not finite.
    """
    state = weights_state(chunks, parallel)
    with verified(path):
        loaded = _load(state, path)
    _set_weights(loaded, chunks)
    _check_finite(path, first_not_finite(chunks))


def _check_finite(path: Path, name: str | None) -> None:
    if name is not None:
        raise DamagedError(
            f"{path}: {name} holds values that are not finite, so the checkpoint is damaged; use another, or convert the "
            "model again"
        )


def _set_weights(loaded: dict[str, Any], chunks: Sequence[PolicyModel]) -> None:
    for index, chunk in enumerate(chunks):
        missing, unexpected = chunk.load_state_dict(loaded[f"model{index}"], strict=False)
        missing = [name for name in missing if not name.endswith("_extra_state")]
        if missing or unexpected:
            raise CheckpointError(
                f"the checkpoint's weights do not fit the model: missing {missing[:3]}, unexpected {unexpected[:3]}; convert "
                "the model again"
            )
        _zero_vocabulary_padding(chunk)


def _zero_vocabulary_padding(chunk: PolicyModel) -> None:
    """Zero the rows past the vocabulary. They are never used, but uninitialised memory might hold a NaN."""
    for name, parameter in chunk.named_parameters():
        if name.endswith("word_embeddings.weight") or name == "output_layer.weight":
            start = parameter.shape[0] * dist.get_rank(chunk.pg_collection.tp)
            with torch.no_grad():
                parameter[max(0, chunk.shape.vocab_size - start) :].zero_()


def _load(state: dict[str, Any], path: Path) -> dict[str, Any]:
    try:
        DistributedReader(path)
    except CheckpointError as error:
        # torch would print a traceback of it first.
        raise DamagedError(str(error)) from None
    try:
        return dist_checkpointing.load(state, str(path))
    except (Exception, CheckpointException) as error:
        # torch.distributed.checkpoint's own exception is not a subclass of Exception.
        detail = " ".join(str(error).split())[-300:]
        raise DamagedError(
            f"{path}: cannot be loaded ({type(error).__name__}: {detail}); if it is damaged, remove the folder to "
            "resume from the previous one, or convert the model again"
        ) from error


class Checkpointer:
    """Saves a run when it is time, and resumes it. Without an output folder it does neither.

    Args:
        plan: plan of the run.
        parallel: degrees and groups.
        reference_weights: name of the reference's weights.
        folder_lock: lock on the output folder, on rank 0; ``close`` releases it.
        uploads: the run's store, which what is complete is copied to; None: it has none.

    Attributes:
        resume_step: step of the newest readable checkpoint in the output folder; None: this is a new run.
        good_step: step of the newest checkpoint whose weights and states this launch has found finite; None: there is none.
        saved_step: step of the newest checkpoint that this launch saved, began to save or resumed from; None: there is none.
        best: best checkpoint so far by the held-out metric of save_best; None: there is none.

    Raises:
        CheckpointError: the output folder holds a run with other settings.
    """

    def __init__(
        self,
        plan: RunPlan,
        parallel: Parallel,
        *,
        reference_weights: str,
        folder_lock: FolderLock | None = None,
        uploads: Uploads | None = None,
    ) -> None:
        self.plan, self.parallel, self.config = plan, parallel, plan.config.checkpoint
        self.output = plan.output
        self.identity = run_identity(plan, reference_weights)
        self._folder_lock, self._uploads = folder_lock, uploads
        self._uploader = None if uploads is None else uploads.uploader
        # Checkpoints that were passed over because they are damaged, by step.
        self._damaged: dict[int, str] = {}
        self._resume_steps = on_rank0(self._find_checkpoints)
        self.resume_step = self._resume_steps[0] if self._resume_steps else None
        self.good_step: int | None = None
        self._rule = None if self.config.save_best is None else rule_of(self.config.save_best, plan.objective)
        self.best: Best | None = None
        # That of the checkpoints that are there: a save in the background may still fail.
        self._good_best: Best | None = None
        # The save that goes on in the background.
        self._saving: Save | None = None
        self.saved_step: int | None = None

    def _find_checkpoints(self) -> list[int]:
        """Steps of the checkpoints that the run may resume from, newest first; the first of them can be read."""
        if self.output is None:
            return []
        for line in passed_over(self.output):
            log(line)
        steps = whole_steps(self.output)[::-1]
        first_error: DamagedError | None = None
        for index, step in enumerate(steps):
            folder = folder_of(self.output, step)
            try:
                check_same_run(read_progress(folder), self.identity, folder)
                return steps[index:]
            except DamagedError as error:
                first_error = first_error or error
                self._damaged[step] = str(error)
        if first_error is not None:
            raise first_error
        return []

    def is_due(self, step: int, *, last: bool, held_out: Mapping[str, Any] | None = None) -> bool:
        """Whether to save after this step: every save_interval and save_hf_interval, at the end, and where it is the best so far.

        Args:
            step: optimizer steps done.
            last: whether training ends with this step.
            held_out: summary of the held-out data after this step, if they were evaluated.
        """
        interval = self.config.save_interval
        is_time = last or (interval is not None and step % interval == 0) or self.is_hf_due(step)
        is_time = is_time or self._best_with(step, held_out) != self.best
        return self.output is not None and self.saved_step != step and is_time

    def is_hf_due(self, step: int) -> bool:
        """Whether Hugging Face weights are to be written beside the checkpoint of this step."""
        interval = self.config.save_hf_interval
        return interval is not None and step > 0 and step % interval == 0

    def _best_with(self, step: int, held_out: Mapping[str, Any] | None) -> Best | None:
        """The best checkpoint, with this step among them."""
        if self._rule is None or held_out is None:
            return self.best
        found = Best(step, float(held_out[self._rule.metric]))
        return found if self.best is None or self._rule.is_better(found.value, self.best.value) else self.best

    def save(
        self,
        step: int,
        state: TrainState,
        *,
        records: Sequence[dict[str, Any]],
        last: bool,
        held_out: Mapping[str, Any] | None = None,
    ) -> None:
        """Save after this step if it is time to; collective, called after every step.

        With async_save, a checkpoint becomes visible in a later call or in ``close``, when it is written.

        Args:
            step: optimizer steps done.
            state: what is saved.
            records: metrics of all steps, for the model card.
            last: whether training ends with this step.
            held_out: summary of the held-out data after this step, if they were evaluated.
        """
        if self.output is None:
            return
        if self._saving is not None and self._saving.is_written():
            self._finish_saving(self.output)
        if self.is_due(step, last=last, held_out=held_out):
            before, self.best = self.best, self._best_with(step, held_out)
            try:
                self._save(self.output, step, state, records)
            except CheckpointError:
                self.best = before
                raise
        elif self.saved_step == step and (best := self._best_with(step, held_out)) != self.best:
            # Saved by an earlier launch, which had no time to evaluate it.
            self.best = self._good_best = best
            if self.parallel.rank == 0:
                self._name_best(self.output, best)

    def _save(self, output: Path, step: int, state: TrainState, records: Sequence[dict[str, Any]]) -> None:
        # One at a time: another would need the memory of another copy.
        self._finish_saving(output)
        self.saved_step = step
        writing = output / f".writing_{step:07d}"
        with raise_on_all_ranks(output):
            if self.parallel.rank == 0:
                self._make_room(output, writing)
        record = training_record(
            step=step,
            train_iters=self.plan.train_iters,
            layout=self.parallel.describe(),
            manifest=self.plan.manifest.as_dict(),
            records=list(records),
            terms={
                "uses_preference": self.plan.objective.uses_preference,
                "uses_nll": self.plan.objective.uses_nll,
                "prefers_short": self.plan.objective.prefers_short,
            },
        )
        content = self._content(step, state, is_loading=False, with_rng=True)
        best = self.best
        with _explaining(output):
            self._saving = start_save(
                content,
                writing,
                lambda: self._publish(output, writing, step, record, best),
                group=self.parallel.dp_cp_group,
                staged=self.config.async_save,
            )
        if not self.config.async_save:
            self._finish_saving(output)

    def _make_room(self, output: Path, writing: Path) -> None:
        """Make the folder that a checkpoint is written to."""
        if self._folder_lock is not None and not self._folder_lock.is_in_place:
            raise CheckpointError(
                f"{output}: the folder was removed or replaced while the run was writing to it, and its earlier checkpoints "
                "with it; leave it in place, then rerun the command to start again from --load"
            )
        for old in output.glob(".writing_*"):
            shutil.rmtree(old, ignore_errors=True)
        writing.mkdir(parents=True)

    def give_up_save(self) -> None:
        """Forget a save that failed; what it wrote is removed by the next one."""
        self._saving, self.saved_step, self.best = None, self.good_step, self._good_best

    def _finish_saving(self, output: Path) -> None:
        """Wait for a save in the background, if there is one, and publish its checkpoint; collective."""
        saving, self._saving = self._saving, None
        if saving is not None:
            with _explaining(output):
                saving.finish()

    def wait(self) -> None:
        """Wait for a background save; collective."""
        if self.output is not None:
            self._finish_saving(self.output)

    def close(self, *, while_waiting: Callable[[], None] = lambda: None) -> None:
        """Wait for a background save and for uploads, and give the output folder up; collective.

        Args:
            while_waiting: called now and then as long as an upload takes.

        Raises:
            CheckpointError: a save or an upload fails.
        """
        self.wait()
        if self._uploader is not None:
            wait_for_uploads(self._uploader, while_waiting)
        if self._folder_lock is not None:
            self._folder_lock.release()

    def _write_companions(self, folder: Path, record: dict[str, Any]) -> None:
        # A name of their own for these weights: a reference made of them is recognised without reading them.
        self.plan.policy_shape.replace(weights_hash=uuid.uuid4().hex).write(folder)
        (folder / RUN_CONFIG).write_text(self.plan.config.as_yaml(), encoding="utf-8")
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        assets = self.plan.load / ASSETS
        if assets.is_dir():
            # Not as links: what damages a file on the disk would damage it in all checkpoints, the converted one included.
            shutil.copytree(assets, folder / ASSETS)

    def _publish(self, output: Path, writing: Path, step: int, record: dict[str, Any], best: Best | None) -> None:
        """Give a checkpoint that all ranks have written its final name, and remove old ones except the best."""
        with raise_on_all_ranks(output):
            if self.parallel.rank == 0:
                _check_written(writing)
                self._write_companions(writing, record)
                write_checksums(writing)
                final = folder_of(output, step)
                shutil.rmtree(final, ignore_errors=True)
                os.replace(writing, final)
                write_atomically(output / LATEST, f"{step}\n".encode())
                if best is not None and best.step == step:
                    self._name_best(output, best)
        doomed = on_rank0(lambda: self._removable(output, best))
        if self._uploader is not None:
            # Other ranks may be ahead of the first, and send it just now.
            self._uploader.give_up(*doomed)
            self._uploader.put(step, best=None if best is None else best.step)
        with raise_on_all_ranks(output):
            if self.parallel.rank == 0:
                for old in doomed:
                    # Renamed first: a kill during the removal leaves no half checkpoint under its name.
                    aside = output / f".writing_{old:07d}_old"
                    os.replace(folder_of(output, old), aside)
                    shutil.rmtree(aside, ignore_errors=True)
        # The trainer checked it before it was saved.
        self.good_step, self._good_best = step, best
        if self._uploader is not None:
            check_uploads(self._uploader, go_on=self.plan.config.faults.on_save_failure == "continue")

    def _removable(self, output: Path, best: Best | None) -> list[int]:
        """Steps whose checkpoints are to be removed."""
        spare = () if best is None else (best.step,)
        old = Retention.of(self.config).removable(whole_steps(output), spare=spare)
        # What is being uploaded goes with the next one.
        return old if self._uploader is None else self._uploader.release(old)

    def _name_best(self, output: Path, best: Best | None) -> None:
        assert best is not None and self._rule is not None
        write_best(output, self._rule, best)
        folder = folder_of(output, best.step)
        log(f"step {best.step} has the best held-out {self._rule.metric} so far ({best.value:.4f}): {folder}")

    def _content(self, step: int, state: TrainState, *, is_loading: bool, with_rng: bool) -> dict[str, Any]:
        """State dictionary of a checkpoint, sharded."""
        weights = weights_state(state.chunks, self.parallel)
        content: dict[str, Any] = dict(weights)
        progress = RunProgress(
            step=step,
            layout=self.parallel.describe(),
            train_iters=self.plan.train_iters,
            identity=self.identity,
            guard=state.guard.state(),
        )
        content["progress"] = dataclasses.asdict(progress)
        if self.config.no_save_optim and not is_loading:
            return content
        # The optimizer looks its parameters up by their position in one dictionary of all chunks.
        flat = weights["model0"] if len(state.chunks) == 1 else weights
        content["optimizer"] = optimizer_content(state.optimizer, flat, is_loading=is_loading)
        content["scheduler"] = state.scheduler.state_dict()
        if with_rng:
            content["rng"] = ShardedObject(
                "rng", platform.CURRENT.rng_state(), (self.parallel.world_size,), (self.parallel.rank,), replica_id=0
            )
        return content

    def resume(self, state: TrainState) -> int:
        """Load everything from the newest good checkpoint of this run, saved with this or another layout; collective.

        A newer one that is damaged is renamed to ``damaged_iter_*``, once an older one has been loaded.

        Returns:
            Optimizer steps done; 0 in a new run.

        Raises:
            CheckpointError: no checkpoint of the run can be read, or the newest holds only weights.
        """
        step = self._resume(state)
        if self._rule is not None and self.output is not None:
            output, rule = self.output, self._rule
            self.best = self._good_best = on_rank0(lambda: read_best(output, rule, step))
        if self._uploader is not None and self.output is not None:
            # The launch that saved them may have ended before they were in the store. Those that are there take one look each.
            output, best = self.output, None if self.best is None else self.best.step
            for saved in on_rank0(lambda: self._kept(output, step, best)):
                self._uploader.put(saved, best=best, is_old=saved != step)
        return step

    def _kept(self, output: Path, step: int, best: int | None) -> list[int]:
        """Steps up to the one that the run resumes from whose checkpoints are kept by the rule, ascending."""
        steps = [saved for saved in whole_steps(output) if saved <= step]
        removable = Retention.of(self.config).removable(steps, spare=() if best is None else (best,))
        return [saved for saved in steps if saved not in removable]

    def _resume(self, state: TrainState) -> int:
        assert self.output is not None or not self._resume_steps
        first_error: str | None = None
        for step in self._resume_steps:
            assert self.output is not None
            folder = folder_of(self.output, step)
            failure = self._try_to_load(folder, state)
            if failure is not None and self._uploads is not None and self._uploads.bring(step):
                log(f"{failure}; its copy in the store is used", active=self.parallel.rank == 0, level=logging.WARNING)
                failure = self._try_to_load(folder, state)
            if failure is None:
                if self.parallel.rank == 0:
                    self._set_damaged_aside(self.output, step)
                self.saved_step = self.good_step = self.resume_step = step
                log(f"resumed from {folder} after step {step}", active=self.parallel.rank == 0)
                return step
            first_error = first_error or failure
            self._damaged[step] = failure
        if first_error is not None:
            raise DamagedError(first_error)
        return 0

    def _try_to_load(self, folder: Path, state: TrainState) -> str | None:
        """Load everything from a checkpoint; what is damaged, if anything is. Collective."""
        failure: str | None = None
        try:
            self._load_run(folder, state)
        except DamagedError as error:
            failure = str(error)
        return next((f for f in all_gather_objects(failure) if f is not None), None)

    def load_step(self, step: int, state: TrainState) -> None:
        """Load the run's checkpoint after some steps, and leave its folder as it is; collective.

        Args:
            step: one of ``steps_before``.
            state: what is loaded into.

        Raises:
            CheckpointError: it is damaged.
        """
        assert self.output is not None
        self._load_run(folder_of(self.output, step), state)

    def steps_before(self, step: int) -> list[int]:
        """Steps, below this one, after which there is a checkpoint of this run; newest first."""
        return [saved for saved in self._resume_steps if saved < step]

    def _set_damaged_aside(self, output: Path, step: int) -> None:
        """Rename damaged checkpoints, so that they neither count nor stand in the way of those that come."""
        for damaged, reason in sorted(self._damaged.items()):
            aside = output / f"damaged_{folder_of(output, damaged).name}"
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(folder_of(output, damaged), aside)
            log(f"{reason}; it is now {aside.name}, and the run resumes from step {step}", level=logging.WARNING)

    def _load_run(self, folder: Path, state: TrainState) -> None:
        """Load everything from a checkpoint; collective.

        Raises:
            DamagedError: it cannot be read, or holds values that are not finite.
            CheckpointError: it holds only weights, or is of another run.
        """
        progress = read_progress(folder)
        check_same_run(progress, self.identity, folder)
        # Random numbers belong to ranks: another layout starts them from the seed.
        same_layout = progress.layout == self.parallel.describe()
        for inner in inner_optimizers(state.optimizer):
            make_states(inner)
        content = self._content(0, state, is_loading=True, with_rng=same_layout)
        with verified(folder, state_only=True):
            loaded = _load(content, folder)
        _set_weights(loaded, state.chunks)
        try:
            load_optimizer(state.optimizer, loaded["optimizer"])
            follow_config(state.optimizer, self.plan.config)
            state.guard.load(progress.guard)
            for inner in inner_optimizers(state.optimizer):
                # A step that was skipped is none of the optimizer's.
                set_steps(inner, progress.step - len(state.guard.skipped))
            _check_finite(folder, first_not_finite(state.chunks, inner_optimizers(state.optimizer)))
            state.scheduler.load_state_dict(loaded["scheduler"])
            if same_layout:
                platform.CURRENT.set_rng_state(loaded["rng"])
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            # What an optimizer or a schedule raises for values that no save gave it.
            raise DamagedError(
                f"{folder}: its optimizer, schedule or random state cannot be used ({one_line(error)}); use another checkpoint"
            ) from None

    def advice(self, step: int) -> str:
        """What to do after a step that failed because its numbers are not finite.

        Args:
            step: optimizer steps done before it.
        """
        remedy = "lower lr, lengthen the warm-up, or inspect those samples"
        if self.good_step is None or self.output is None:
            return f"no checkpoint was saved before: {remedy}, and start again"
        folder = folder_of(self.output, self.good_step)
        if self.good_step == step:
            return (
                f"{folder} holds the finite weights that gave it, so a run that resumes from there may fail again: {remedy}; "
                "remove that folder to resume from an earlier checkpoint, or use another --save to start again"
            )
        return f"the weights and optimizer states of {folder} are finite: {remedy}, and rerun the command to resume from there"


def check_shared(output: Path) -> None:
    """Check that all ranks see what rank 0 writes into the output folder; collective.

    Raises:
        CheckpointError: one does not, so no checkpoint there would be complete.
    """

    def make() -> Path:
        # A save removes what a kill leaves of it.
        probe = output / f".writing_{uuid.uuid4().hex}"
        probe.mkdir()
        return probe

    probe = on_rank0(make)
    until = time.monotonic() + _SECONDS_UNTIL_SEEN
    while not (is_seen := probe.is_dir()) and time.monotonic() < until:
        time.sleep(0.5)
    blind = [host for host, sees in all_gather_objects((socket.gethostname(), is_seen)) if not sees]
    on_rank0(probe.rmdir)
    if blind:
        raise CheckpointError(
            f"save={output}: {len(blind)} ranks do not see what rank 0 writes there (the first on host {blind[0]}); give --save "
            "a folder that all nodes share"
        )


def _check_written(folder: Path) -> None:
    """Check that the files of all ranks are in a folder.

    Raises:
        CheckpointError: one is missing, so the checkpoint would have a gap.
    """
    reader, until = DistributedReader(folder), time.monotonic() + _SECONDS_UNTIL_SEEN
    while missing := reader.missing_files():
        if time.monotonic() > until:
            raise CheckpointError(
                f"{folder}: {len(missing)} files that other ranks have written are not there, {missing[0]} first; give --save a "
                "folder that all nodes share"
            )
        time.sleep(1.0)


@contextlib.contextmanager
def _explaining(output: Path) -> Iterator[None]:
    """Raise what any rank failed with in megatron-core's save, on all ranks; only rank 0 has the causes otherwise."""
    try:
        yield
    except CheckpointException as error:
        # megatron-core raises it on all ranks at once; other errors come up on one rank, and its peers are elsewhere.
        with raise_on_all_ranks(output):
            raise error
