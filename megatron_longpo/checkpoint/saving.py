"""Saving of a running model: every rank writes its share in a thread, a chunk at a time.

megatron-core's own writer copies whatever a rank saves and hands it to forked processes, which inherit CUDA's and NCCL's threads
(0.16.1 ``filesystem_async.py``, 0.19.2 likewise). This one needs no process and, unless training goes on meanwhile, no copy: each
chunk is brought to the host, written and dropped. Format and planning are megatron-core's torch_dist, so its reader reads it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.state_dict_saver import (
    save_state_dict_async_finalize,
    save_state_dict_async_plan,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.api import _wrap_exception
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType

from megatron_longpo.checkpoint.checksums import hash_own_files
from megatron_longpo.checkpoint.prefetch import flushing
from megatron_longpo.runtime import platform
from megatron_longpo.runtime.collectives import raise_on_all_ranks, rank

_BACKEND, _VERSION = "torch_dist", 1
# How often ranks ask each other whether all have written. Each question is a collective of its own, so however long a rank
# writes, none of them times out.
_POLL_SECONDS = 0.2


class _HostCopies:
    """Answers for a planner with host copies of its tensors, each freed when the next is asked for.

    Dropping them is not enough: torch's writer (2.13) keeps the last tensor of every key until its file is whole.

    Args:
        plan: what this rank writes.
        planner: planner whose tensors they are.
        staged: whether to make all copies now.
    """

    def __init__(self, plan: SavePlan, planner: SavePlanner, *, staged: bool) -> None:
        self._planner = planner
        self._staged = {item.index: self._copy(item) for item in plan.items} if staged else {}
        self._written: Tensor | None = None

    def _copy(self, item: WriteItem) -> Any:
        value: Any = self._planner.resolve_data(item)
        if item.type == WriteItemType.BYTE_IO:
            return value
        return torch.empty(value.shape, dtype=value.dtype).copy_(value.detach())

    def resolve_data(self, item: WriteItem) -> Any:
        if self._written is not None:
            self._written.untyped_storage().resize_(0)
        value = self._staged.pop(item.index) if item.index in self._staged else self._copy(item)
        self._written = value if isinstance(value, Tensor) else None
        return value


class _Writer(FileSystemWriter):
    """Writes a rank's chunks one after the other.

    Args:
        folder: folder of the checkpoint.
        staged: whether to copy the chunks to the host first, so that training may change them while they are written.
    """

    def __init__(self, folder: Path, *, staged: bool) -> None:
        # No copying ahead: on CUDA the writer would sort the chunks for it.
        super().__init__(folder, single_file_per_rank=True, thread_count=1, per_thread_copy_ahead=0)
        self._folder, self._is_staged = folder, staged
        self._plan: SavePlan | None = None
        self._planner: Any = None
        self._results: Any = []
        self.failure: Exception | None = None

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        self._plan = plan
        self._planner = _HostCopies(plan, planner, staged=self._is_staged)

    def write(self) -> None:
        """Write and hash this rank's files; a failure is kept for ``retrieve_write_results``."""
        try:
            assert self._plan is not None
            with flushing(self._folder / f"__{rank()}_0.distcp"):
                self._results = self.write_data(self._plan, self._planner).wait()
            hash_own_files(self._folder, rank())
        except BaseException as error:
            self._results = _wrap_exception(error)
        finally:
            self._planner = None

    def retrieve_write_results(self) -> Any:
        return self._results

    def finish(self, metadata: Any, results: Any) -> None:
        """Write the index, on rank 0; a failure is kept for ``Save``, since the other ranks wait for what comes next."""
        try:
            super().finish(metadata, results)
        except Exception as error:
            self.failure = error


class _Strategy(TorchDistSaveShardedStrategy):
    """megatron-core's strategy with this module's writer."""

    def __init__(self, *, staged: bool) -> None:
        super().__init__(_BACKEND, _VERSION)
        self._is_staged = staged
        self.writer: _Writer | None = None

    def async_save(self, sharded_state_dict: Any, checkpoint_dir: Any, *_: Any) -> AsyncRequest:
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        self.writer = writer = _Writer(Path(checkpoint_dir), staged=self._is_staged)
        planned = save_state_dict_async_plan(
            mcore_to_pyt_state_dict(by_key, False),
            writer,
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )[0]
        return AsyncRequest(writer.write, (), [lambda: save_state_dict_async_finalize(*planned)])


class _SharedStrategy(FullyParallelSaveStrategyWrapper):
    """megatron-core's division of the writing among replicas, once all ranks know that rank 0 came this far.

    Args:
        strategy: what writes.
        group: ranks that hold the same weights.
        output: the run's folder, for messages.
    """

    def __init__(self, strategy: _Strategy, group: dist.ProcessGroup, output: Path) -> None:
        super().__init__(strategy, group)
        self._output = output
        self.has_begun = False

    def async_save(self, sharded_state_dict: Any, checkpoint_dir: Any, *rest: Any) -> Any:
        self.has_begun = True
        with raise_on_all_ranks(self._output):
            pass
        return super().async_save(sharded_state_dict, checkpoint_dir, *rest)


class Save:
    """A checkpoint that is being written; made by ``start_save``.

    Args:
        request: what megatron-core wants done.
        writer: what writes this rank's files.
        folder: folder of the checkpoint.
        publish: function called on all ranks when the checkpoint is complete.
    """

    def __init__(self, request: AsyncRequest, writer: _Writer, folder: Path, publish: Callable[[], None]) -> None:
        # Its other function writes metadata.json on rank 0, for which the other ranks would wait for ever if that failed.
        self._gather = request.finalize_fns[0]
        self._writer, self._folder, self._publish = writer, folder, publish
        # A daemon: a rank that fails ends, and the checkpoint stays without a name.
        self._thread = threading.Thread(target=request.async_fn, daemon=True)
        self._thread.start()

    def is_written(self) -> bool:
        """Whether all ranks have written their files; collective."""
        busy = torch.tensor([int(self._thread.is_alive())], device=platform.CURRENT.device)
        dist.all_reduce(busy)
        return not busy.item()

    def finish(self) -> None:
        """Wait for all ranks and complete the checkpoint; collective.

        Raises:
            CheckpointException: torch.distributed.checkpoint's, on all ranks, with what any of them raised on the first.
            CheckpointError: rank 0 could not complete it; raised on all ranks.
        """
        while not self.is_written():
            self._thread.join(_POLL_SECONDS)
        self._gather()
        with raise_on_all_ranks(self._folder.parent):
            if self._writer.failure is not None:
                raise self._writer.failure
            if rank() == 0:
                save_config(CheckpointingConfig(_BACKEND, _VERSION), str(self._folder))
        self._publish()


def start_save(
    content: dict[str, Any],
    folder: Path,
    publish: Callable[[], None],
    *,
    group: dist.ProcessGroup,
    staged: bool,
) -> Save:
    """Plan a save and begin to write; collective.

    Args:
        content: sharded state dictionary.
        folder: empty folder.
        publish: function called on all ranks when the checkpoint is complete.
        group: ranks that hold the same weights and share the writing of them.
        staged: whether this rank's share is copied to the host first, so that training may go on at once.

    Raises:
        CheckpointException: torch.distributed.checkpoint's, on all ranks, if the plan fails on any.
        CheckpointError: rank 0 cannot write; raised on all ranks.
    """
    strategy = _Strategy(staged=staged)
    shared = _SharedStrategy(strategy, group, folder.parent)
    try:
        request = dist_checkpointing.save(content, str(folder), sharded_strategy=shared, async_sharded_save=True)
    except Exception:
        if shared.has_begun:
            raise
        # megatron-core 0.16 writes common.pt before, on rank 0.
        with raise_on_all_ranks(folder.parent):
            raise
    assert strategy.writer is not None
    return Save(request, strategy.writer, folder, publish)
