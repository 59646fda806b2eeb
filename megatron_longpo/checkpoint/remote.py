"""Checkpoints in a store (``store.py``): which are complete, and bringing one here.

    URL/iter_0000010/...               the files of OUTPUT/iter_0000010; checksums.json comes last, and makes them a checkpoint
    URL/metrics.jsonl, best.json, ...  what a run that goes on elsewhere needs of OUTPUT
    URL/owner.json                     the run folder that writes here

They are read from a folder, as any other: every file is copied whole and compared with its checksum before it gets its name. So
checksums, the restricted loaders and every reader of checkpoints are the same, and damage is found before anything is loaded.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_longpo.checkpoint.checksums import CHECKSUMS, COPYING, WEIGHTS_SUFFIX, Checksum, log_once, parse_checksums
from megatron_longpo.checkpoint.store import Stopped, Store
from megatron_longpo.errors import CheckpointError, DamagedError
from megatron_longpo.runtime.files import sha256_of, write_atomically
from megatron_longpo.runtime.reading import TooLarge, parse_json

# Where checkpoints that are named by URL are kept; default: ``$XDG_CACHE_HOME/megatron_longpo/checkpoints``.
CACHE_VARIABLE = "MEGATRON_LONGPO_CHECKPOINT_CACHE"
# Names the best checkpoint of a run by a held-out metric (training/best.py).
BEST = "best.json"
# OUTPUT/best stands for that checkpoint wherever one is named.
BEST_NAME = "best"
_STEP = re.compile(r"iter_(\d{7,18})")
# Bytes of a file that is read whole from a store.
_MOST_BYTES = 2**26
# Files up to this size are compared by content when they are looked for: they are read before anything is verified.
_COMPARED_BYTES = 2**24
# Files that a process copies at once.
_THREADS = 4
# Times that a file is copied until its checksum is right: the first time it may be the network's fault.
_COPIES = 2
# Times that a run's checkpoints are listed if those that were listed disappear.
_LISTINGS = 3


def step_of(path: str) -> int | None:
    """Step of the checkpoint that a file of a run's store belongs to; None: it belongs to none."""
    match = _STEP.fullmatch(path.partition("/")[0])
    return int(match[1]) if match else None


def complete_steps(files: Iterable[str]) -> list[int]:
    """Steps of the complete checkpoints in a listing of a run's store, ascending."""
    steps = ((step_of(path), path) for path in files)
    return sorted(step for step, path in steps if step is not None and path == f"iter_{step:07d}/{CHECKSUMS}")


def fetch(url: str, *, name: str = "load", weights: bool = True) -> Path:
    """Bring the checkpoint that a URL names here: a converted one, one iteration, the newest good one of a run, or its best.

    Processes that share the cache share the copying, and one that is there already is only compared in sizes.

    Args:
        url: ``s3://bucket/run``, ``s3://bucket/run/iter_0000010``, ``s3://bucket/run/best`` or ``s3://bucket/converted``.
        name: setting that the URL comes from, for messages.
        weights: whether the weights are needed; else only the small files are brought.

    Returns:
        A folder, in which every file has its checksum.

    Raises:
        DamagedError: the checkpoint, or every one of the run, is damaged.
        CheckpointError: there is none, or the store or the disk cannot be used.
    """
    store = Store(url, name=name)
    for number in range(_LISTINGS):
        files = store.files()
        try:
            return _fetch(store, files, name=name, weights=weights)
        except CheckpointError:
            # A run that uploads there may have completed a newer one, and removed this one, meanwhile.
            if number == _LISTINGS - 1 or complete_steps(store.files()) == complete_steps(files):
                raise
    raise AssertionError("unreachable")


def _fetch(store: Store, files: Mapping[str, int], *, name: str, weights: bool) -> Path:
    url = store.url
    if CHECKSUMS in files:
        return _fetch_to_cache(store, "", files, weights=weights)
    if not files and (above := _best_above(url, name)) is not None:
        return fetch(above, name=name, weights=weights)
    first: DamagedError | None = None
    for step in reversed(complete_steps(files)):
        try:
            folder = _fetch_to_cache(store, f"iter_{step:07d}/", files, weights=weights)
        except DamagedError as error:
            first = first or error
            continue
        if first is not None:
            log_once(f"{first}; that checkpoint is passed over, and iter_{step:07d} is used")
        return folder
    if first is not None:
        raise first
    raise CheckpointError(
        f"{name}={store.url}: holds neither a converted checkpoint nor a run's iter_* folders with {CHECKSUMS}"
        + (f" (but {len(files)} other files)" if files else "")
        + "; correct the URL, or copy a whole checkpoint there"
    )


def _best_above(url: str, name: str) -> str | None:
    """URL of a run's best checkpoint, if the URL is that of the run and ``/best``."""
    run, _, last = url.rstrip("/").rpartition("/")
    if last != BEST_NAME:
        return None
    content = read_small(Store(run, name=name), BEST)
    if content is None:
        return None
    try:
        return f"{run}/iter_{int(parse_json(content.decode())['step']):07d}"
    except (ValueError, KeyError, TypeError, OverflowError):
        raise CheckpointError(f"{name}={url}: {BEST} of the run cannot be read; name an iter_* folder") from None


def read_small(store: Store, path: str, *, most: int = _MOST_BYTES) -> bytes | None:
    """Content of a small file of a store; None: there is none, or it has more than ``most`` bytes, which ours never have."""
    try:
        return store.read(path, most=most)
    except TooLarge:
        return None


def _cache() -> Path:
    given = os.environ.get(CACHE_VARIABLE)
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_longpo" / "checkpoints"
    return Path(given) if given else root


def _fetch_to_cache(store: Store, prefix: str, files: Mapping[str, int], *, weights: bool) -> Path:
    listed = _listed(store, prefix)
    # Another checkpoint under the same URL has other checksums, so it gets another folder.
    key = hashlib.sha256(f"{store.url}\n{prefix}\n".encode() + listed).hexdigest()[:16]
    folder = _cache() / key / (prefix.rstrip("/") or store.url.rpartition("/")[2])
    copy_here(store, prefix, folder, files, listed=listed, wanted=lambda name: weights or not is_weights(name))
    if weights:
        with _claim(folder / COPYING, CHECKSUMS, wait=True):
            if not (folder / CHECKSUMS).exists():
                write_atomically(folder / CHECKSUMS, listed)
    return folder


def _listed(store: Store, prefix: str) -> bytes:
    content = read_small(store, prefix + CHECKSUMS)
    if content is None:
        raise DamagedError(f"{store.url}/{prefix}{CHECKSUMS}: is missing, or too large; use another checkpoint")
    return content


def is_weights(name: str) -> bool:
    """Whether a file of a checkpoint has weights or states, which are most of its size."""
    return name.endswith(WEIGHTS_SUFFIX)


def copy_here(
    store: Store,
    prefix: str,
    folder: Path,
    files: Mapping[str, int],
    *,
    listed: bytes | None = None,
    wanted: Callable[[str], bool] = lambda _: True,
    is_stopped: Callable[[], bool] = lambda: False,
) -> bytes:
    """Copy files of a checkpoint into a folder, each compared with its checksum before it gets its name.

    Any number of processes may call this for the same folder at once: each file is copied by one of them, and all return when
    everything is there. What an earlier call has copied is not copied again.

    Args:
        store: where the checkpoint is.
        prefix: its path in the store, with a slash at the end.
        folder: folder that the files are copied to.
        files: listing of the store.
        listed: content of its checksums.json. Default: it is read.
        wanted: whether a file, by its name in the checkpoint, is copied.
        is_stopped: asked between parts of files; if it says so, the copying is broken off.

    Returns:
        Content of its checksums.json, which is not written to the folder.

    Raises:
        DamagedError: a file is missing, cut, or does not have its checksum.
        CheckpointError: the disk has no room for it.
        Stopped: it was broken off.
    """
    listed = _listed(store, prefix) if listed is None else listed
    where = f"{store.url}/{prefix}"
    checksums = _parsed(listed, f"{where}{CHECKSUMS}")
    for name, checksum in checksums.items():
        size = files.get(prefix + name)
        if size != checksum.bytes:
            found = "is missing" if size is None else f"has {size} bytes instead of {checksum.bytes}"
            raise DamagedError(f"{where}{name}: {found}, so the checkpoint is damaged; use another")
    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in checksums if wanted(name) and not _is_there(folder / name, checksums[name])]
    needed, free = sum(checksums[name].bytes for name in missing), shutil.disk_usage(folder).free
    # What other processes are copying just now takes room already, and what killed ones left is removed first.
    if needed - _bytes_of_parts(folder / COPYING) > free:
        raise CheckpointError(
            f"{folder}: {where} needs {needed / 1e9:.1f} GB, but the disk has {free / 1e9:.1f} GB free; free space, or, for "
            f"checkpoints that are named by URL, set {CACHE_VARIABLE} to a folder of another disk"
        )
    if not missing:
        return listed
    # Every process begins at another file.
    start = int(os.environ.get("RANK", "0")) % len(missing)
    order = missing[start:] + missing[:start]

    failures: list[BaseException] = []

    def is_over() -> bool:
        return bool(failures) or is_stopped()

    def copy(name: str, *, wait: bool) -> str | None:
        """The name, if another process is copying the file."""
        try:
            if is_over():
                raise Stopped
            done = _copy_file(
                store, prefix + name, folder / name, checksums[name], folder / COPYING, wait=wait, is_stopped=is_over
            )
        except BaseException as error:
            # The files that other threads are copying may take hours.
            failures.append(error)
            return None
        return None if done else name

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="copying") as threads:
        others = [name for name in threads.map(lambda name: copy(name, wait=False), order) if name is not None]
        list(threads.map(lambda name: copy(name, wait=True), others))
    if failures:
        raise failures[0]
    return listed


def _parsed(listed: bytes, where: str) -> dict[str, Checksum]:
    try:
        return parse_checksums(listed)
    except DamagedError as error:
        raise DamagedError(f"{where}: {error}, so the checkpoint is damaged; use another") from None


def _bytes_of_parts(locks: Path) -> int:
    found = 0
    for part in locks.glob("*.part"):
        with contextlib.suppress(OSError):
            found += part.stat().st_size
    return found


def _is_there(path: Path, checksum: Checksum) -> bool:
    """Whether a file was copied: by its size and, where that is quick, its content; the rest is verified at load."""
    try:
        if path.stat().st_size != checksum.bytes:
            return False
        return checksum.bytes > _COMPARED_BYTES or sha256_of(path) == checksum.sha256
    except OSError:
        return False


def _copy_file(
    store: Store,
    path: str,
    target: Path,
    checksum: Checksum,
    locks: Path,
    *,
    wait: bool,
    is_stopped: Callable[[], bool],
) -> bool:
    """Copy a file, unless it is there; False: another process is copying it."""
    claim = target.name + hashlib.sha256(path.encode()).hexdigest()[:8]
    with _claim(locks, claim, wait=wait) as (is_ours, is_locked):
        if not is_ours:
            return False
        # Waiting for the lock may have taken as long as a copy.
        if is_stopped():
            raise Stopped
        if is_locked:
            # Of processes that were killed.
            for part in locks.glob(f"{glob.escape(claim)}.*.part"):
                part.unlink(missing_ok=True)
        if _is_there(target, checksum):
            return True
        target.parent.mkdir(parents=True, exist_ok=True)
        part = locks / f"{claim}.{uuid.uuid4().hex}.part"
        try:
            for _ in range(_COPIES):
                store.download(path, part, is_stopped=is_stopped)
                if part.stat().st_size == checksum.bytes and sha256_of(part) == checksum.sha256:
                    os.replace(part, target)
                    return True
        finally:
            part.unlink(missing_ok=True)
    raise DamagedError(
        f"{store.url}/{path}: its content differs from its checksum in {CHECKSUMS}, so the checkpoint is damaged; use another"
    )


@contextlib.contextmanager
def _claim(locks: Path, name: str, *, wait: bool) -> Iterator[tuple[bool, bool]]:
    """Lock a file by name; yields whether this process may go on, and whether no other one can.

    Where a file system has no locks, two may copy the same file.
    """
    locks.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(locks / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    is_ours = is_locked = True
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            is_ours = is_locked = False
        except OSError:
            is_locked = False
        yield is_ours, is_locked
    finally:
        os.close(descriptor)


def forget_claims(folder: Path) -> None:
    """Remove what processes divided the copying by, once all of them are done."""
    shutil.rmtree(folder / COPYING, ignore_errors=True)
