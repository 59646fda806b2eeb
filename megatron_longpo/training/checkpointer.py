"""Save a run and resume it, with the same or another layout; ``checkpoint/folders.py`` says where the files are."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException

from megatron_longpo.checkpoint.card import RECORD, RUN_CONFIG, training_record
from megatron_longpo.checkpoint.folders import (
    ASSETS,
    LATEST,
    RunProgress,
    folder_of,
    latest_step,
    read_progress,
    whole_steps,
)
from megatron_longpo.errors import CheckpointError
from megatron_longpo.model.gpt import PolicyModel
from megatron_longpo.runtime import platform
from megatron_longpo.runtime.collectives import on_rank0
from megatron_longpo.runtime.files import write_atomically
from megatron_longpo.runtime.log import log
from megatron_longpo.runtime.process_groups import Parallel
from megatron_longpo.training.optimization import counts_in_state, follow_config, inner_optimizers
from megatron_longpo.training.plan import RunPlan

_OPTIMIZER_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    # Gather through host memory: whole fp32 states do not fit a GPU beside weights and gradients.
    "distrib_optim_fully_reshardable_mem_efficient": platform.CURRENT.is_cuda,
}


def run_identity(plan: RunPlan, reference_weights: str) -> dict[str, Any]:
    """Settings that determine a run's samples, loss and states, by name; they must not change within the run.

    Args:
        plan: plan of the run.
        reference_weights: name of the reference's weights.
    """
    data, training, objective = plan.config.data, plan.config.training, plan.config.objective
    return {
        "reference_weights": reference_weights,
        "data_sha256": plan.manifest.bin_sha256,
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
    }


def check_same_run(progress: RunProgress, identity: dict[str, Any], folder: Path) -> None:
    """Check that a run may resume from a checkpoint: what determines its samples, loss and states has not changed.

    Raises:
        CheckpointError: the first setting that differs.
    """
    for name, value in identity.items():
        # A run saved before a setting was recorded is taken to have the present value.
        before = progress.identity.get(name, value)
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
    """

    chunks: Sequence[PolicyModel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler


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
        CheckpointError: the checkpoint cannot be read, or lacks a tensor.
    """
    state = weights_state(chunks, parallel)
    loaded = _load(state, path)
    _set_weights(loaded, chunks)


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
        return dist_checkpointing.load(state, str(path))
    except (Exception, CheckpointException) as error:
        # torch.distributed.checkpoint's own exception is not a subclass of Exception.
        detail = " ".join(str(error).split())[-300:]
        raise CheckpointError(
            f"{path}: cannot be loaded ({type(error).__name__}: {detail}); if it is damaged, remove the folder to "
            "resume from the previous one, or convert the model again"
        ) from error


class Checkpointer:
    """Saves a run when it is time, and resumes it. Without an output folder it does neither.

    Args:
        plan: plan of the run.
        parallel: degrees and groups.
        reference_weights: name of the reference's weights.

    Attributes:
        resume_step: step of the newest checkpoint in the output folder; None: this is a new run.

    Raises:
        CheckpointError: the output folder holds a run with other settings.
    """

    def __init__(self, plan: RunPlan, parallel: Parallel, *, reference_weights: str) -> None:
        self.plan, self.parallel, self.config = plan, parallel, plan.config.checkpoint
        self.output = plan.output
        self.identity = run_identity(plan, reference_weights)
        self.resume_step = on_rank0(self._find_checkpoint)
        self._queue = AsyncCallsQueue() if self.config.async_save else None
        self._saved_step: int | None = None

    def _find_checkpoint(self) -> int | None:
        step = latest_step(self.output) if self.output is not None else None
        if step is not None:
            assert self.output is not None
            folder = folder_of(self.output, step)
            check_same_run(read_progress(folder), self.identity, folder)
        return step

    def save(self, step: int, state: TrainState, *, records: Sequence[dict[str, Any]], last: bool) -> None:
        """Save after this step if it is time to; collective, called after every step.

        With async_save, a checkpoint becomes visible in a later call or in ``close``, when it is written.

        Args:
            step: optimizer steps done.
            state: what is saved.
            records: metrics of all steps, for the model card.
            last: whether training ends with this step.
        """
        if self.output is None:
            return
        if self._queue is not None and self._queue.get_num_unfinalized_calls():
            self._queue.maybe_finalize_async_calls(blocking=False)
        interval = self.config.save_interval
        if self._saved_step != step and (last or (interval is not None and step % interval == 0)):
            self._save(self.output, step, state, records)

    def _save(self, output: Path, step: int, state: TrainState, records: Sequence[dict[str, Any]]) -> None:
        if self._queue is not None:
            # One at a time: another would need the memory of another copy.
            self._queue.maybe_finalize_async_calls(blocking=True)
        self._saved_step = step
        writing = output / f".writing_{step:07d}"
        if self.parallel.rank == 0:
            for old in output.glob(".writing_*"):
                shutil.rmtree(old, ignore_errors=True)
            writing.mkdir(parents=True)
        dist.barrier()
        record = training_record(
            step=step,
            train_iters=self.plan.train_iters,
            layout=self.parallel.describe(),
            manifest=self.plan.manifest.as_dict(),
            records=list(records),
        )
        content = self._content(step, state, is_loading=False, with_rng=True)
        if self._queue is None:
            dist_checkpointing.save(content, str(writing))
            self._publish(output, writing, step, record)
        else:
            request = dist_checkpointing.save(content, str(writing), async_sharded_save=True)
            request.add_finalize_fn(lambda: self._publish(output, writing, step, record))
            self._queue.schedule_async_request(request)

    def close(self) -> None:
        """Wait for a background save."""
        if self._queue is not None:
            self._queue.maybe_finalize_async_calls(blocking=True)
            self._queue.close()

    def _write_companions(self, folder: Path, record: dict[str, Any]) -> None:
        # A name of their own for these weights: a reference made of them is recognised without reading them.
        self.plan.policy_shape.replace(weights_hash=uuid.uuid4().hex).write(folder)
        (folder / RUN_CONFIG).write_text(self.plan.config.as_yaml(), encoding="utf-8")
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        assets = self.plan.load / ASSETS
        if assets.is_dir():
            shutil.copytree(assets, folder / ASSETS, copy_function=_link_or_copy)

    def _publish(self, output: Path, writing: Path, step: int, record: dict[str, Any]) -> None:
        """Give a checkpoint that all ranks have written its final name, and remove old ones."""
        if self.parallel.rank == 0:
            self._write_companions(writing, record)
            final = folder_of(output, step)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(writing, final)
            write_atomically(output / LATEST, f"{step}\n".encode())
            keep = self.config.keep_last
            if keep is not None:
                for old in whole_steps(output)[:-keep]:
                    # Renamed first: a kill during the removal leaves no half checkpoint under its name.
                    doomed = output / f".writing_{old:07d}_old"
                    os.replace(folder_of(output, old), doomed)
                    shutil.rmtree(doomed, ignore_errors=True)
        dist.barrier()

    def _content(self, step: int, state: TrainState, *, is_loading: bool, with_rng: bool) -> dict[str, Any]:
        """State dictionary of a checkpoint, sharded."""
        weights = weights_state(state.chunks, self.parallel)
        content: dict[str, Any] = dict(weights)
        progress = RunProgress(
            step=step,
            layout=self.parallel.describe(),
            train_iters=self.plan.train_iters,
            identity=self.identity,
        )
        content["progress"] = dataclasses.asdict(progress)
        if self.config.no_save_optim and not is_loading:
            return content
        # The optimizer looks its parameters up by their position in one dictionary of all chunks.
        flat = weights["model0"] if len(state.chunks) == 1 else weights
        content["optimizer"] = state.optimizer.sharded_state_dict(
            flat, is_loading=is_loading, metadata=_OPTIMIZER_METADATA
        )
        content["scheduler"] = state.scheduler.state_dict()
        if with_rng:
            content["rng"] = ShardedObject(
                "rng", platform.CURRENT.rng_state(), (self.parallel.world_size,), (self.parallel.rank,), replica_id=0
            )
        return content

    def resume(self, state: TrainState) -> int:
        """Load everything from the newest checkpoint of this run, saved with this or another layout; collective.

        Returns:
            Optimizer steps done; 0 in a new run.

        Raises:
            CheckpointError: the checkpoint cannot be read, or holds only weights.
        """
        if self.resume_step is None:
            return 0
        assert self.output is not None
        folder = folder_of(self.output, self.resume_step)
        progress = read_progress(folder)
        # Random numbers belong to ranks: another layout starts them from the seed.
        same_layout = progress.layout == self.parallel.describe()
        for inner in inner_optimizers(state.optimizer):
            _make_states(inner)
        content = self._content(0, state, is_loading=True, with_rng=same_layout)
        loaded = _load(content, folder)
        _set_weights(loaded, state.chunks)
        state.optimizer.load_state_dict(loaded["optimizer"])
        follow_config(state.optimizer, self.plan.config)
        for inner in inner_optimizers(state.optimizer):
            _separate_steps(inner, progress.step)
        state.scheduler.load_state_dict(loaded["scheduler"])
        if same_layout:
            platform.CURRENT.set_rng_state(loaded["rng"])
        self._saved_step = progress.step
        log(f"resumed from {folder} after step {progress.step}", active=self.parallel.rank == 0)
        return progress.step


def _make_states(optimizer: torch.optim.Optimizer) -> None:
    """Create Adam's states as they are before the first step: loading needs tensors to load into."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            if counts_in_state(optimizer) and "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32)


def _separate_steps(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Give each parameter its own step count.

    After a load by megatron-core (0.16.1, 0.19.2) all parameters share one tensor, which the update of each of them
    increments: the bias correction runs ahead, and training drifts silently.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if "step" in state:
                state["step"] = torch.tensor(float(step), dtype=torch.float32)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
