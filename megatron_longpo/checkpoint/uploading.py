"""Upload of a run's checkpoints in the background: complete ones only, the oldest first, retried for as long as it takes.

Every rank sends the files that it wrote, in a thread of its own, and leaves a note in the store; rank 0 sends the rest, waits for
the notes, and writes ``checksums.json`` last. The threads speak with each other through the store alone: collectives belong to
the main thread. What was sent is compared with its checksum before and with its size after, and S3 compares a checksum of every
request (botocore sends one).
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron_longpo.checkpoint.checksums import CHECKSUMS, Checksum, parse_checksums, writer_of
from megatron_longpo.checkpoint.folders import LATEST, folder_of
from megatron_longpo.checkpoint.remote import BEST, complete_steps, read_small, step_of
from megatron_longpo.checkpoint.retention import Retention
from megatron_longpo.checkpoint.store import Store, StoreError
from megatron_longpo.errors import CheckpointError, DamagedError, one_line
from megatron_longpo.runtime.files import sha256_of
from megatron_longpo.runtime.log import log

# What a run that goes on elsewhere needs of its folder, beside a checkpoint.
RUN_FILES = ("metrics.jsonl", "validation.jsonl", BEST, "trackers.json")
_THREADS = 2
_NOTE = ".sent_"
# Seconds between looks for the other ranks' notes.
_POLL_SECONDS = 1.0
# Seconds until the first other try; they double up to the longest.
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0


@dataclass(frozen=True)
class Trouble:
    """Why an upload does not come to its end.

    Attributes:
        step: step of the checkpoint.
        reason: the error.
        waits_for_others: whether this rank only waits for what the others send.
    """

    step: int
    reason: str
    waits_for_others: bool = False


class _OthersMissing(CheckpointError):
    """Other ranks have not sent their files."""


@dataclass(frozen=True)
class _Order:
    step: int
    best: int | None
    is_old: bool = False


class Uploader:
    """Copies checkpoints of a run to a store, one after the other; every rank has one.

    Args:
        store: where they go.
        output: the run's folder.
        rank: this rank.
        world_size: number of ranks.
        retention: which checkpoints stay in the store.
        check_owner: raises if another run has taken the store over; called before each upload.
        patience: seconds for which an upload may fail before ``trouble`` says so.
        damaged: steps in the store that were found damaged; they are removed when another one is complete.
    """

    def __init__(
        self,
        store: Store,
        output: Path,
        *,
        rank: int,
        world_size: int,
        retention: Retention,
        check_owner: Callable[[], None],
        patience: float,
        damaged: Collection[int] = (),
    ) -> None:
        self.store = store
        self._output, self._rank, self._world_size = output, rank, world_size
        self._retention, self._check_owner, self._patience = retention, check_owner, patience
        self._damaged = set(damaged)
        self._changed = threading.Condition()
        self._waiting: list[_Order] = []
        self._current: _Order | None = None
        self._given_up: set[int] = set()
        self._error: str | None = None
        self._waits_for_others = False
        # Paths of the other ranks' notes that the first rank waits for.
        self._awaited: frozenset[str] = frozenset()
        # Value of time.monotonic() from which on every attempt failed without a file that came through.
        self._failing_since = 0.0
        # Files of the current checkpoint that are in the store.
        self._sent: set[str] = set()
        self._thread = threading.Thread(target=self._work, name="upload", daemon=True)
        self._thread.start()

    def put(self, step: int, *, best: int | None = None, is_old: bool = False) -> None:
        """Upload a complete checkpoint when its turn comes.

        Args:
            step: its step.
            best: step of the best checkpoint so far.
            is_old: whether there is a newer one, so that damage of this one is only logged.
        """
        with self._changed:
            self._given_up.discard(step)
            self._waiting.append(_Order(step, best, is_old))
            self._changed.notify_all()

    def release(self, steps: Collection[int]) -> list[int]:
        """Forget those of some checkpoints that wait for their turn, since they are to be removed here.

        Returns:
            The steps that may be removed: all but the one that is being uploaded.
        """
        with self._changed:
            removable = [step for step in steps if self._current is None or step != self._current.step]
            self._waiting = [order for order in self._waiting if order.step not in removable]
            return removable

    def give_up(self, *steps: int) -> None:
        """Forget checkpoints, whether they wait or are being uploaded."""
        with self._changed:
            self._waiting = [order for order in self._waiting if order.step not in steps]
            self._given_up.update(steps)
            self._changed.notify_all()

    @property
    def uploading(self) -> int | None:
        """Step of the checkpoint that is being uploaded."""
        with self._changed:
            return None if self._current is None else self._current.step

    @property
    def oldest(self) -> int | None:
        """Lowest step of the checkpoints that this rank is sending, or is to send."""
        with self._changed:
            steps = [order.step for order in (*self._waiting, self._current) if order is not None]
            return min(steps, default=None)

    def misses_others(self) -> bool:
        """Whether files of other ranks that the first rank waits for are not in the store at this moment."""
        with self._changed:
            awaited = self._awaited
        try:
            return not awaited <= self.store.files().keys()
        except StoreError:
            # Then that is the trouble, and comes up by itself.
            return False

    @property
    def is_done(self) -> bool:
        """Whether everything is in the store."""
        with self._changed:
            return not self._waiting and self._current is None

    @property
    def trouble(self) -> Trouble | None:
        """Why the upload does not come to its end, if it has failed for longer than ``patience``."""
        with self._changed:
            if self._error is None or self._current is None or self._current.step in self._given_up:
                return None
            if time.monotonic() - self._failing_since < self._patience:
                return None
            return Trouble(self._current.step, self._error, waits_for_others=self._waits_for_others)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                self._current = order = self._waiting.pop(0)
                self._sent.clear()
            self._upload_until_done(order)
            with self._changed:
                self._current, self._error = None, None

    def _upload_until_done(self, order: _Order) -> None:
        wait = _FIRST_WAIT
        while not self._is_given_up(order.step):
            try:
                self._upload(order)
                return
            except Exception as error:
                text = (
                    str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {one_line(error)}"
                )
                if order.is_old and isinstance(error, DamagedError | _OthersMissing):
                    log(f"step {order.step} is not uploaded: {text}", level=logging.WARNING)
                    return
                with self._changed:
                    if self._error is None:
                        self._failing_since = time.monotonic()
                        log(f"step {order.step} is not uploaded yet: {text}", level=logging.WARNING)
                    if not isinstance(error, StoreError):
                        # Neither damage nor another owner passes by itself, and for other ranks it has waited already.
                        self._failing_since = float("-inf")
                    self._error, self._waits_for_others = text, isinstance(error, _OthersMissing)
                    self._changed.wait_for(lambda: order.step in self._given_up, timeout=wait)
                wait = min(2 * wait, _LONGEST_WAIT)

    def _is_given_up(self, step: int) -> bool:
        with self._changed:
            return step in self._given_up

    def _upload(self, order: _Order) -> None:
        """Upload this rank's part of a checkpoint; on rank 0, wait for the others' and complete it."""
        folder = folder_of(self._output, order.step)
        if not folder.is_dir():
            # Removed since the run keeps only newer ones: then the first rank has given it up, and this one does so soon.
            raise StoreError(f"{folder}: is not there any more, or not yet on this host", is_lasting=False)
        if not (folder / CHECKSUMS).exists():
            if self._rank == 0:
                log(f"{folder}: has no {CHECKSUMS} (it was written by version 0.1), so it is not uploaded")
            return
        listed = (folder / CHECKSUMS).read_bytes()
        checksums = parse_checksums(listed)
        writers = {name: (writer_of(Path(name)) or 0) % self._world_size for name in checksums}
        own = {name: checksum for name, checksum in checksums.items() if writers[name] == self._rank}
        if self._rank != 0 and not own:
            return
        prefix, key = f"{folder.name}/", hashlib.sha256(listed).hexdigest()[:8]
        self._check_owner()
        there = read_small(self.store, prefix + CHECKSUMS)
        if self._rank != 0:
            while there is not None and there != listed:
                # Another checkpoint of this step is there, which the first rank will declare incomplete.
                if self._is_given_up(order.step):
                    return
                time.sleep(_POLL_SECONDS)
                there = read_small(self.store, prefix + CHECKSUMS)
            if there is None:
                self._send(folder, prefix, own)
                self.store.write(f"{prefix}{_NOTE}{key}_{self._rank}", b"")
            return
        if there != listed:
            if there is not None:
                # Another one of this step: not complete from here on.
                self.store.remove([prefix + CHECKSUMS])
            self._send(folder, prefix, own)
            if not self._has_all(
                order, {writer: f"{prefix}{_NOTE}{key}_{writer}" for writer in {*writers.values()} - {0}}
            ):
                return
        self._send_what_differs(folder, prefix, checksums)
        if there != listed:
            self._complete(order, prefix, listed)
        # Only now: until the checkpoint is complete, a new attempt waits for the notes, which no rank writes twice.
        self.store.remove(path for path in self.store.files(folder.name) if path.startswith(prefix + _NOTE))
        self._remove_old(order)
        log(f"step {order.step} is in {self.store.url}/{folder.name}")

    def _send(self, folder: Path, prefix: str, own: dict[str, Checksum]) -> None:
        def send(name: str) -> None:
            path = folder / name
            if sha256_of(path) != own[name].sha256:
                raise DamagedError(
                    f"{path}: its content differs from its checksum in {CHECKSUMS}, so the checkpoint is damaged and is not "
                    "uploaded; check the disk"
                )
            self.store.upload(path, prefix + name)
            self._sent.add(name)
            self._has_come_through()

        with ThreadPoolExecutor(_THREADS, thread_name_prefix="upload") as threads:
            list(threads.map(send, [name for name in own if name not in self._sent]))

    def _has_come_through(self) -> None:
        """The store takes files again: what failed before does not count as failing since then."""
        with self._changed:
            self._error = None

    def _has_all(self, order: _Order, notes: dict[int, str]) -> bool:
        """Wait for the other ranks; False: the checkpoint was given up meanwhile.

        Args:
            order: what is uploaded.
            notes: path of each rank's note.

        Raises:
            CheckpointError: nothing has come for as long as an upload may fail.
        """
        with self._changed:
            self._awaited = frozenset(notes.values())
        seen: set[str] | None = None
        since = time.monotonic()
        while True:
            files = self.store.files(folder_of(self._output, order.step).name)
            missing = sorted(writer for writer, note in notes.items() if note not in files)
            if not missing:
                return True
            if self._is_given_up(order.step):
                return False
            if files.keys() != seen:
                if seen is not None:
                    self._has_come_through()
                seen, since = set(files), time.monotonic()
            if time.monotonic() - since > self._patience:
                raise _OthersMissing(
                    f"rank {missing[0]} has not sent its files of step {order.step} ({len(missing)} ranks have not), and nothing "
                    f"has come for {self._patience / 60:.1f} minutes; look into its log, and rerun the command"
                )
            time.sleep(_POLL_SECONDS)

    def _send_what_differs(self, folder: Path, prefix: str, checksums: dict[str, Checksum]) -> None:
        """Send again what the store has in another size or not at all, whoever wrote it: all ranks share the folder."""
        for is_last in (False, True):
            files = self.store.files(folder.name)
            wrong = {
                name: checksum for name, checksum in checksums.items() if files.get(prefix + name) != checksum.bytes
            }
            if not wrong:
                return
            name = next(iter(wrong))
            if is_last:
                raise StoreError(
                    f"{self.store.url}/{prefix}{name}: has {files.get(prefix + name)} bytes in the store instead of "
                    f"{wrong[name].bytes}; another process may write there",
                    is_lasting=False,
                )
            self._sent -= wrong.keys()
            self._send(folder, prefix, wrong)

    def _complete(self, order: _Order, prefix: str, listed: bytes) -> None:
        """Write what makes the files a checkpoint."""
        # Sending may have taken hours.
        self._check_owner()
        for name in RUN_FILES:
            if (path := self._output / name).is_file():
                # Read at once: the run appends to it.
                self.store.write(name, path.read_bytes())
        files = self.store.files()
        newest = max([order.step, *complete_steps(files)])
        self.store.write(LATEST, f"{newest}\n".encode())
        self.store.write(prefix + CHECKSUMS, listed)

    def _remove_old(self, order: _Order) -> None:
        """Remove what the rule does not keep, and what broken-off uploads left."""
        self._check_owner()
        files = self.store.files()
        complete = complete_steps(files)
        spare = {order.step, *(() if order.best is None else (order.best,))}
        damaged = self._damaged - {order.step}
        doomed = damaged | set(self._retention.removable([s for s in complete if s not in damaged], spare=spare))
        # An upload of this run that is broken off is older than the one that is complete now.
        doomed |= {s for path in files if (s := step_of(path)) is not None and s < order.step} - set(complete)
        for step in sorted(doomed):
            own = [path for path in files if step_of(path) == step]
            # Without its checksums it does not count as a checkpoint, so they go first.
            listed = f"iter_{step:07d}/{CHECKSUMS}"
            self.store.remove([listed] if listed in own else [])
            self.store.remove(path for path in own if path != listed)
        self._damaged.clear()
