"""A run and its store: whose the store is, going on from there, and the upload of what the run saves (``--upload-to``)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_longpo.checkpoint.checksums import CHECKSUMS, COMMON, quick_damage
from megatron_longpo.checkpoint.folders import folder_of, whole_steps
from megatron_longpo.checkpoint.remote import BEST, complete_steps, copy_here, forget_claims, is_weights, read_small
from megatron_longpo.checkpoint.retention import Retention
from megatron_longpo.checkpoint.store import Store
from megatron_longpo.checkpoint.uploading import RUN_FILES, Trouble, Uploader
from megatron_longpo.errors import CheckpointError, DamagedError
from megatron_longpo.runtime.checked_json import read_checked, write_checked
from megatron_longpo.runtime.collectives import (
    all_gather_objects,
    on_rank0,
    raise_on_all_ranks,
    rank,
    work_on_all_ranks,
)
from megatron_longpo.runtime.files import write_atomically
from megatron_longpo.runtime.heartbeat import at
from megatron_longpo.runtime.log import log
from megatron_longpo.runtime.process_groups import Parallel
from megatron_longpo.runtime.reading import parse_json
from megatron_longpo.training.plan import RunPlan

# In the store: which folder uploads there. In that folder: the same id.
_OWNER, _OWN = "owner.json", "uploads.json"
_PROBE = ".probe"
_POLL_SECONDS = 0.2
_REMEDY = "rerun the command once the cause is removed, and it is uploaded then"
# Bytes of metrics.jsonl and the like: a million steps.
_MOST_OF_RUN_FILE = 2**30


def check_store(url: str, *, write: bool) -> None:
    """Check that a store can be used, before a run's hours of work.

    Args:
        url: its URL.
        write: whether files are written and deleted there, too; else it is only listed.

    Raises:
        ConfigError, StoreError: it cannot; the message names the fix.
    """
    store = Store(url, name="upload_to")
    if write:
        probe = f"{_PROBE}_{uuid.uuid4().hex}"
        store.write(probe, b"megatron_longpo looks whether it may write here\n")
        store.remove([probe])
    store.files()


@dataclass(frozen=True)
class _Listing:
    """What rank 0 found in the store.

    Attributes:
        files: sizes of all files, by path.
        steps: steps that are newer than all good checkpoints of the run's folder, newest first.
    """

    files: dict[str, int]
    steps: list[int]


@dataclass(frozen=True)
class Uploads:
    """A run's store, opened.

    Attributes:
        uploader: copies what this rank saves.
        bring: brings the checkpoint of a step, in the place of one that proved to be damaged; returns whether the store has a
            good one. Collective.
    """

    uploader: Uploader
    bring: Callable[[int], bool]


def open_uploads(plan: RunPlan, parallel: Parallel, check_same: Callable[[Path], None]) -> Uploads | None:
    """Bring the newest good checkpoint from the run's store if the run's folder has none as new, and start to upload; collective.

    Args:
        plan: plan of the run.
        parallel: degrees and groups.
        check_same: given a folder with a checkpoint's small files, raises if it is one of another run.

    Returns:
        The store; None without upload_to.

    Raises:
        CheckpointError: the store belongs to another run, or cannot be used.
    """
    url, output = plan.config.checkpoint.upload_to, plan.output
    if url is None or output is None:
        return None
    store = Store(url, name="upload_to")
    own = on_rank0(lambda: _own_id(store, output))
    damaged = _bring_newest(store, output, check_same)
    on_rank0(lambda: _check_own(output, check_same))
    owner = on_rank0(lambda: _take(store, output, own))
    uploader = Uploader(
        store,
        output,
        rank=parallel.rank,
        world_size=parallel.world_size,
        retention=Retention.of(plan.config.checkpoint),
        check_owner=lambda: _check_owner(store, owner),
        patience=60 * plan.config.checkpoint.upload_retry_minutes,
        damaged=damaged,
    )

    def bring(step: int) -> bool:
        files = on_rank0(store.files)
        if step not in complete_steps(files):
            return False
        try:
            _bring(store, output, step, files, check_same)
        except DamagedError as error:
            log(str(error), active=rank() == 0, level=logging.WARNING)
            return False
        return True

    return Uploads(uploader, bring)


def _own_id(store: Store, output: Path) -> str:
    """The id by which the store knows the run's folder; a new one for a folder without checkpoints.

    Raises:
        CheckpointError: the folder has checkpoints, and the store those of another one.
    """
    own: str | None = None
    with contextlib.suppress(OSError, ValueError, KeyError):
        content = read_checked(output / _OWN)
        # A copy of a run's folder is another run, though the file with the id was copied, too.
        if content["folder"] == str(output.resolve()):
            own = str(content["run"])
    owner = _owner(store)
    if owner is not None and owner["run"] != own and whole_steps(output):
        raise CheckpointError(
            f"upload_to={store.url}: holds the checkpoints of another run ({owner['host']}:{owner['folder']}), but save={output} "
            "has checkpoints of its own; choose another --upload-to, or an empty --save to go on with that run, or, if this is "
            f"that run and its folder was moved, remove {_OWNER} from the store"
        )
    # A folder that goes on with another's run has an id of its own, so that the other one stops uploading.
    return own if own is not None and whole_steps(output) else uuid.uuid4().hex


def _check_own(output: Path, check_same: Callable[[Path], None]) -> None:
    """Check that the folder holds this run, before its store is taken from whoever has it."""
    for step in reversed(whole_steps(output)):
        # A damaged one is passed over later.
        with contextlib.suppress(DamagedError):
            check_same(folder_of(output, step))
            return


def _owner(store: Store) -> dict[str, Any] | None:
    content = read_small(store, _OWNER)
    if content is None:
        return None
    try:
        found = parse_json(content.decode())
        return {key: str(found[key]) for key in ("run", "host", "folder")}
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"upload_to={store.url}: its {_OWNER} cannot be read; choose another URL, or remove that file if no other run "
            "uploads there"
        ) from None


def _take(store: Store, output: Path, own: str) -> dict[str, str]:
    """Make the store that of the run's folder; what it says now."""
    content = {"run": own, "host": socket.gethostname(), "folder": str(output.resolve())}
    write_checked(output / _OWN, {"schema_version": 1, "url": store.url, **content})
    if _owner(store) != content:
        store.write(_OWNER, (json.dumps({"schema_version": 1, **content}, indent=2) + "\n").encode())
    return content


def _check_owner(store: Store, own: dict[str, str]) -> None:
    owner = _owner(store)
    # Host and folder, too: a copy of the folder on another machine has the same id.
    if owner is not None and owner != own:
        raise CheckpointError(
            f"upload_to={store.url}: another run ({owner['host']}:{owner['folder']}) has taken it over since this one began; "
            "stop one of the two, and give it another --upload-to"
        )


def _bring_newest(store: Store, output: Path, check_same: Callable[[Path], None]) -> set[int]:
    """Bring the newest good checkpoint that is newer than those here; collective.

    Returns:
        Steps in the store that are damaged.
    """
    damaged: set[int] = set()
    first: DamagedError | None = None
    found = on_rank0(lambda: _look(store, output))
    for step in found.steps:
        try:
            _bring(store, output, step, found.files, check_same, is_newest=True)
            _bring_best(store, output, found.files, check_same)
            break
        except DamagedError as error:
            first = first or error
            damaged.add(step)
            log(f"{error}; it is passed over", active=rank() == 0, level=logging.WARNING)
    else:
        if first is not None and not on_rank0(lambda: whole_steps(output)):
            raise first
    return damaged


def _look(store: Store, output: Path) -> _Listing:
    files = store.files()
    good = (s for s in whole_steps(output) if quick_damage(folder_of(output, s), state_only=True) is None)
    newest = max(good, default=-1)
    return _Listing(files, [step for step in reversed(complete_steps(files)) if step > newest])


def _bring(
    store: Store,
    output: Path,
    step: int,
    files: dict[str, int],
    check_same: Callable[[Path], None],
    *,
    is_newest: bool = False,
) -> None:
    """Copy a checkpoint into the run's folder, and those of the run's files that are missing there; collective.

    Args:
        store: where it is.
        output: the run's folder.
        step: its step.
        files: listing of the store.
        check_same: see ``open_uploads``.
        is_newest: whether it is newer than what the folder has, so that the run's files there are replaced.

    Raises:
        DamagedError: the one in the store is damaged.
        CheckpointError: it is of another run.
    """
    final = folder_of(output, step)
    prefix = f"{final.name}/"
    at(f"copying {final.name} from the store")
    log(f"copying {store.url}/{final.name} to {output}", active=rank() == 0)
    listed = on_rank0(lambda: read_small(store, prefix + CHECKSUMS))
    if listed is None:
        raise DamagedError(f"{store.url}/{prefix}{CHECKSUMS}: is missing, or too large; use another checkpoint")
    # Under this name the next save removes it if the copy is never finished; if it is resumed, it continues here.
    writing = output / f".writing_{step:07d}_{hashlib.sha256(listed).hexdigest()[:8]}"

    def copy(wanted: Callable[[str], bool]) -> None:
        """On all ranks: the wait for the slowest may be longer than a collective's limit."""
        work_on_all_ranks(
            lambda is_stopped: copy_here(
                store, prefix, writing, files, listed=listed, wanted=wanted, is_stopped=is_stopped
            ),
            output,
        )

    copy(lambda name: not is_weights(name))
    is_early = on_rank0((writing / COMMON).is_file)
    if is_early:
        # Before the long part. megatron-core 0.19 has what is asked for among the weights.
        on_rank0(lambda: _check_same(store, check_same, writing))
    copy(lambda _: True)
    if not is_early:
        on_rank0(lambda: _check_same(store, check_same, writing))
    with raise_on_all_ranks(output):
        if rank() == 0:
            # First, since they are not looked for again once the checkpoint is here.
            for name in RUN_FILES:
                if is_newest or not (output / name).exists():
                    content = read_small(store, name, most=_MOST_OF_RUN_FILE)
                    if content is not None:
                        write_atomically(output / name, content)
            _give_name(writing, final, listed)


def _check_same(store: Store, check_same: Callable[[Path], None], writing: Path) -> None:
    try:
        check_same(writing)
    except DamagedError:
        raise
    except CheckpointError as error:
        raise CheckpointError(
            f"upload_to={store.url}: the run cannot go on from its newest checkpoint ({error}); choose another --upload-to"
        ) from None


def _bring_best(store: Store, output: Path, files: dict[str, int], check_same: Callable[[Path], None]) -> None:
    """Copy the run's best checkpoint as well, if it has one: what is saved from now on is compared with it; collective."""

    def step_of_best() -> int | None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            step = int(read_checked(output / BEST)["step"])
            if step in complete_steps(files) and step not in whole_steps(output):
                return step
        return None

    step = on_rank0(step_of_best)
    if step is None:
        return
    try:
        _bring(store, output, step, files, check_same)
    except DamagedError as error:
        log(f"{error}; the run goes on without its best checkpoint", active=rank() == 0, level=logging.WARNING)


def _give_name(writing: Path, final: Path, listed: bytes) -> None:
    forget_claims(writing)
    write_atomically(writing / CHECKSUMS, listed)
    if final.exists():
        # It is damaged; else it would not be replaced.
        aside = final.with_name(f"damaged_{final.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(final, aside)
    os.replace(writing, final)


def check_uploads(uploader: Uploader, *, go_on: bool) -> None:
    """Look whether a rank's upload has failed for too long; collective.

    Args:
        uploader: this rank's.
        go_on: whether the run goes on, with the next checkpoint.

    Raises:
        CheckpointError: an upload fails, and the run does not go on; raised on all ranks.
    """
    trouble = _first_trouble(uploader)
    if trouble is None:
        return
    if not go_on:
        raise CheckpointError(f"step {trouble.step} is saved but not uploaded: {trouble.reason}; {_REMEDY}")
    uploader.give_up(trouble.step)
    log(
        f"step {trouble.step} is saved but not uploaded: {trouble.reason}; training goes on, with the next checkpoint "
        "(on_save_failure=continue)",
        active=rank() == 0,
        level=logging.WARNING,
    )


def _first_trouble(uploader: Uploader) -> Trouble | None:
    found = all_gather_objects((uploader.trouble, uploader.oldest))
    for trouble, _ in found:
        if trouble is not None and not trouble.waits_for_others:
            return trouble
    waiting = found[0][0]
    if waiting is None:
        return None
    # A large file is not seen in the store before its end, so who waits for a rank that is still sending is in no trouble.
    # What has come in the last seconds may not have been noticed yet.
    is_sent = all(oldest is None or oldest > waiting.step for _, oldest in found[1:])
    return waiting if is_sent and on_rank0(uploader.misses_others) else None


def wait_for_uploads(uploader: Uploader, while_waiting: Callable[[], None]) -> None:
    """Wait until everything is in the store; collective.

    Args:
        uploader: this rank's.
        while_waiting: called now and then.

    Raises:
        CheckpointError: an upload fails for too long; raised on all ranks.
    """
    at("uploading the last checkpoint")
    if not all(all_gather_objects(uploader.is_done)):
        log(f"waiting until {uploader.store.url} has the last checkpoint", active=rank() == 0)
    # One collective after the other, since a single one would time out during a long upload.
    while not all(all_gather_objects(uploader.is_done)):
        check_uploads(uploader, go_on=False)
        while_waiting()
        time.sleep(_POLL_SECONDS)
