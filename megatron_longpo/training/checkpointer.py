"""Save a run and resume it, at the same or another layout; what lies where is in ``checkpoint/folders.py``."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import uuid
from collections.abc import Sequence
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

from megatron_longpo.checkpoint.card import RECORD, RUN_CONFIG
from megatron_longpo.checkpoint.folders import ASSETS, LATEST, Progress, folder_of, read_progress, whole_steps
from megatron_longpo.config import Config
from megatron_longpo.errors import CheckpointError
from megatron_longpo.model.gpt import PolicyModel
from megatron_longpo.model.shape import ModelShape
from megatron_longpo.runtime import platform
from megatron_longpo.runtime.files import write_atomically
from megatron_longpo.runtime.process_groups import Parallel
from megatron_longpo.training.optimization import counts_in_state, follow_config, inner_optimizers

_OPTIMIZER_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    # Gather through host memory: whole fp32 states beside weights and gradients do not fit a GPU.
    "distrib_optim_fully_reshardable_mem_efficient": platform.CURRENT.is_cuda,
}


def check_same_run(progress: Progress, identity: dict[str, Any], folder: Path) -> None:
    """Whether a run may go on from a checkpoint: what determines its samples, loss and states is as it was.

    Raises:
        CheckpointError: the first setting that differs.
    """
    for name, value in identity.items():
        # Saved before there was such a setting, a run had the only value there was.
        before = progress.identity.get(name, value)
        if before != value:
            raise CheckpointError(
                f"{folder}: the run in this folder has {name}={before}, now it is {value}; give the same to go on, or "
                "another --save to start a new run from --load"
            )


def weights_state(chunks: Sequence[PolicyModel], parallel: Parallel) -> dict[str, Any]:
    """Sharded weights of this rank's chunks, keyed ``model0``, ``model1``, ... under interleaving."""
    metadata = {"dp_cp_group": parallel.dp_cp_group}
    state = {}
    for index, chunk in enumerate(chunks):
        sharded = chunk.sharded_state_dict(metadata=metadata)
        # Extra states belong to fp8; without them one checkpoint serves Transformer Engine and the local layers.
        state[f"model{index}"] = {k: v for k, v in sharded.items() if not k.endswith("_extra_state")}
    return state


def load_weights(path: Path, chunks: Sequence[PolicyModel], parallel: Parallel) -> None:
    """Load weights alone, from any layout.

    Raises:
        CheckpointError: the checkpoint cannot be read or lacks a tensor.
    """
    state = weights_state(chunks, parallel)
    loaded = _load(state, path)
    _set_weights(loaded, chunks)


def _set_weights(loaded: dict[str, Any], chunks: Sequence[PolicyModel]) -> None:
    for index, chunk in enumerate(chunks):
        missing, unexpected = chunk.load_state_dict(loaded[f"model{index}"], strict=False)
        missing = [name for name in missing if not name.endswith("_extra_state")]
        if missing or unexpected:
            raise CheckpointError(f"weights do not fit the model: missing {missing[:3]}, unexpected {unexpected[:3]}")
        _zero_vocabulary_padding(chunk)


def _zero_vocabulary_padding(chunk: PolicyModel) -> None:
    """Rows past the vocabulary are never computed with; zero, they cannot carry a NaN of fresh memory anywhere."""
    for name, parameter in chunk.named_parameters():
        if name.endswith("word_embeddings.weight") or name == "output_layer.weight":
            start = parameter.shape[0] * dist.get_rank(chunk.pg_collection.tp)
            with torch.no_grad():
                parameter[max(0, chunk.shape.vocab_size - start) :].zero_()


def _load(state: dict[str, Any], path: Path) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(state, str(path))
    except (Exception, CheckpointException) as error:
        # torch.distributed.checkpoint's own exception is no Exception.
        detail = " ".join(str(error).split())[-300:]
        raise CheckpointError(
            f"{path}: cannot be loaded ({type(error).__name__}: {detail}); if it is damaged, remove the folder to go on "
            "from the one before, or convert the model again"
        ) from error


class Checkpointer:
    """Saves a run and resumes it.

    Args:
        output: the run's folder.
        config: resolved configuration, kept with every checkpoint.
        shape: of the model.
        assets: folder with tokenizer and Hugging Face config to carry along, or None.
        parallel: groups.
        identity: settings that must not change within the run.
    """

    def __init__(
        self,
        output: Path,
        config: Config,
        shape: ModelShape,
        assets: Path | None,
        parallel: Parallel,
        identity: dict[str, Any],
    ) -> None:
        self.output, self.config, self.shape, self.assets, self.parallel = output, config, shape, assets, parallel
        self.identity = identity
        self._queue = AsyncCallsQueue() if config.checkpoint.async_save else None
        self._saved_step: int | None = None

    def save(
        self,
        step: int,
        train_iters: int,
        chunks: Sequence[PolicyModel],
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        record: dict[str, Any],
    ) -> None:
        """Save after ``step``; collective. With async_save it is whole once ``poll`` or ``finish`` says so.

        ``record`` is what the exported model's card will say of the run.
        """
        if self._saved_step == step:
            return
        if self._queue is not None:
            # One at a time: a second would need the memory of a second copy.
            self._queue.maybe_finalize_async_calls(blocking=True)
        self._saved_step = step
        writing = self.output / f".writing_{step:07d}"
        if self.parallel.rank == 0:
            for old in self.output.glob(".writing_*"):
                shutil.rmtree(old, ignore_errors=True)
            writing.mkdir(parents=True)
        dist.barrier()
        state = self._state(step, train_iters, chunks, optimizer, scheduler, is_loading=False)
        if self._queue is None:
            dist_checkpointing.save(state, str(writing))
            self._publish(writing, step, record)
        else:
            request = dist_checkpointing.save(state, str(writing), async_sharded_save=True)
            request.add_finalize_fn(lambda: self._publish(writing, step, record))
            self._queue.schedule_async_request(request)

    def poll(self) -> None:
        """Finish a background save that is done writing; collective, called once a step."""
        if self._queue is not None and self._queue.get_num_unfinalized_calls():
            self._queue.maybe_finalize_async_calls(blocking=False)

    def finish(self) -> None:
        """Wait for a background save."""
        if self._queue is not None:
            self._queue.maybe_finalize_async_calls(blocking=True)
            self._queue.close()

    def _write_companions(self, folder: Path, record: dict[str, Any]) -> None:
        # A name of their own for these weights: a reference made of them is told apart without reading them.
        self.shape.replace(weights_hash=uuid.uuid4().hex).write(folder)
        (folder / RUN_CONFIG).write_text(self.config.as_yaml(), encoding="utf-8")
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if self.assets is not None and self.assets.is_dir():
            shutil.copytree(self.assets, folder / ASSETS, copy_function=_link_or_copy)

    def _publish(self, writing: Path, step: int, record: dict[str, Any]) -> None:
        if self.parallel.rank == 0:
            self._write_companions(writing, record)
            final = folder_of(self.output, step)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(writing, final)
            write_atomically(self.output / LATEST, f"{step}\n".encode())
            keep = self.config.checkpoint.keep_last
            if keep is not None:
                for old in whole_steps(self.output)[:-keep]:
                    # Renamed first: a kill while it is removed leaves no half checkpoint under its name.
                    doomed = self.output / f".writing_{old:07d}_old"
                    os.replace(folder_of(self.output, old), doomed)
                    shutil.rmtree(doomed, ignore_errors=True)
        dist.barrier()

    def _state(
        self,
        step: int,
        train_iters: int,
        chunks: Sequence[PolicyModel],
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        *,
        is_loading: bool,
        with_rng: bool = True,
    ) -> dict[str, Any]:
        weights = weights_state(chunks, self.parallel)
        state: dict[str, Any] = dict(weights)
        state["progress"] = dataclasses.asdict(Progress(step, self.parallel.describe(), train_iters, self.identity))
        if self.config.checkpoint.no_save_optim and not is_loading:
            return state
        # The optimizer looks its parameters up by their place in one dictionary of all chunks.
        flat = weights["model0"] if len(chunks) == 1 else weights
        state["optimizer"] = optimizer.sharded_state_dict(flat, is_loading=is_loading, metadata=_OPTIMIZER_METADATA)
        state["scheduler"] = scheduler.state_dict()
        if with_rng:
            state["rng"] = ShardedObject(
                "rng", platform.CURRENT.rng_state(), (self.parallel.world_size,), (self.parallel.rank,), replica_id=0
            )
        return state

    def resume(
        self,
        folder: Path,
        chunks: Sequence[PolicyModel],
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
    ) -> Progress:
        """Load everything of a checkpoint of this run, saved at this or another layout.

        Raises:
            CheckpointError: it cannot be read, or holds weights alone.
        """
        progress = read_progress(folder)
        # Random numbers belong to ranks: at another layout they are seeded anew.
        same_layout = progress.layout == self.parallel.describe()
        for inner in inner_optimizers(optimizer):
            _make_states(inner)
        state = self._state(0, 0, chunks, optimizer, scheduler, is_loading=True, with_rng=same_layout)
        loaded = _load(state, folder)
        _set_weights(loaded, chunks)
        optimizer.load_state_dict(loaded["optimizer"])
        follow_config(optimizer, self.config)
        for inner in inner_optimizers(optimizer):
            _separate_steps(inner, progress.step)
        scheduler.load_state_dict(loaded["scheduler"])
        if same_layout:
            platform.CURRENT.set_rng_state(loaded["rng"])
        self._saved_step = progress.step
        return progress


def _make_states(optimizer: torch.optim.Optimizer) -> None:
    """Adam's states as they are before the first step; loading needs somewhere to load to."""
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

    After a load by megatron-core (0.16.1, 0.19.2) all share one tensor, which every parameter's update then raises: the
    bias correction runs ahead and training drifts, silently.
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
