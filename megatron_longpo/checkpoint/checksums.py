"""Checksums of a checkpoint's files: written before its folder gets its name, and verified while it is loaded.

``checksums.json`` has the size and the SHA-256 of every other file of the folder. Sizes and small files are verified before
anything is read. Large files are divided among the ranks and hashed in threads beside the load; ``verified`` waits for them.

SHA-256, because ``sha256sum`` can check it, and because CPUs have instructions for it: OpenSSL hashes 2.0 GB/s per thread with
them. The standard library's other hash without known collisions is slower: BLAKE2b 0.27 GB/s where SHA-256 has 0.41, measured
side by side on a busy machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import socket
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from megatron_longpo.errors import DamagedError, one_line
from megatron_longpo.runtime.collectives import all_gather_objects, my_share, rank
from megatron_longpo.runtime.files import HOLDER_FILE, is_on_local_disk, sha256_of, write_atomically
from megatron_longpo.runtime.log import log
from megatron_longpo.runtime.reading import parse_json, read_bytes

CHECKSUMS = "checksums.json"
SCHEMA_VERSION = 1

# Files up to this size are hashed at once, larger ones in threads.
_SMALL_BYTES = 2**24
_THREADS = 2
# Seconds that a machine waits for files that others see, and between looks: NFS caches for 30 s what is not in a folder.
_SECONDS_UNTIL_SEEN, _SECONDS_BETWEEN_LOOKS = 30.0, 0.5
_MISSING = "is missing"
_PART_PREFIX = ".checksums_rank_"
# Files that torch.distributed.checkpoint and megatron-core read; the others serve export and the next run.
COMMON = "common.pt"
_STATE_FILES = frozenset({".metadata", COMMON, "metadata.json"})
WEIGHTS_SUFFIX = ".distcp"
# A folder in a copy of a store's checkpoint, by which processes divide the copying (remote.py).
COPYING = ".copying"
# "__3_0.distcp" was written by rank 3.
_WRITER = re.compile(r"__(\d+)_\d+\.distcp$")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Checksum:
    """What a file of a checkpoint must be.

    Attributes:
        bytes: its size.
        sha256: SHA-256 of its content, in hexadecimal digits.
    """

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Damage:
    """A file of a checkpoint that is not as it was written.

    Attributes:
        path: the file.
        reason: what is wrong with it.
        is_state: whether a run needs it to resume.
        host: the host on whose disk it is, where there are several copies.
    """

    path: Path
    reason: str
    is_state: bool
    host: str | None = None

    def error(self) -> DamagedError:
        where = "" if self.host is None else f" on host {self.host}"
        return DamagedError(
            f"{self.path}: {self.reason}{where}, so the checkpoint is damaged; restore the file from a copy, use another "
            f"checkpoint, or convert the model again (if it was changed on purpose, remove {CHECKSUMS})"
        )


# --------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------


def hash_own_files(folder: Path, writer: int) -> None:
    """Hash the weights that a rank has written, for ``write_checksums``: they are still in its machine's memory.

    Args:
        folder: folder of a checkpoint that is being written.
        writer: the rank.
    """
    hash_files(folder, [path for path in folder.glob(f"*{WEIGHTS_SUFFIX}") if writer_of(path) == writer], writer)


def hash_files(folder: Path, files: Sequence[Path], writer: int) -> None:
    """Hash files that a rank has written into a folder, for ``write_checksums``.

    Args:
        folder: folder that is being written.
        files: files directly in it.
        writer: the rank.
    """
    found = {path.name: vars(_checksum(path)) for path in files}
    if found:
        (folder / f"{_PART_PREFIX}{writer}.json").write_text(json.dumps(found), encoding="utf-8")


def write_checksums(folder: Path, *, leave_out: Collection[str] = ()) -> None:
    """Write ``checksums.json`` of a complete folder; what no rank has hashed yet is hashed now.

    Args:
        folder: a checkpoint, or an exported model.
        leave_out: names of files that people may change.
    """
    known: dict[str, dict[str, int | str]] = {}
    for part in folder.glob(f"{_PART_PREFIX}*.json"):
        known.update(json.loads(part.read_text(encoding="utf-8")))
        part.unlink()
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in (CHECKSUMS, HOLDER_FILE, *leave_out):
            files[name] = known.get(name) or vars(_checksum(path))
    content = {"schema_version": SCHEMA_VERSION, "files": files}
    write_atomically(folder / CHECKSUMS, (json.dumps(content, indent=2) + "\n").encode())


def writer_of(path: Path) -> int | None:
    """Rank that wrote a file of weights; None: it is another file."""
    found = _WRITER.search(path.name)
    return int(found[1]) if found else None


def _checksum(path: Path) -> Checksum:
    return Checksum(bytes=path.stat().st_size, sha256=sha256_of(path))


# --------------------------------------------------------------------------------------------------
# Verification
# --------------------------------------------------------------------------------------------------


@contextmanager
def verified(folder: Path, *, state_only: bool = False) -> Iterator[None]:
    """Verify a checkpoint while the body loads it, and wait for the result at the end; collective.

    Args:
        folder: folder of the checkpoint.
        state_only: damage of files that a run does not need to resume is only logged.

    Raises:
        DamagedError: a file differs from what was written, or is missing or cut; raised on all ranks, even if the body could
            load it.
    """
    verification = Verification(folder, state_only=state_only)
    try:
        yield
    except Exception:
        # Whatever a library says of a damaged file, this says it better. The other ranks may not get here.
        verification.raise_own()
        raise
    verification.wait()


class Verification:
    """A verification that goes on in threads, the files divided among the ranks that see the same copy of them; collective.

    On a disk that all nodes share, that is all ranks; where each node has a copy of its own, those of a node. One rank per node
    looks at the files to tell that. A node that does not see all of them, and still does not some seconds later, counts as one
    with a copy of its own. A folder that was verified before in this process, and whose files have not changed since, is not
    read again.

    Args:
        folder: folder of the checkpoint.
        state_only: see ``verified``.

    Raises:
        DamagedError: a small file differs, or a file is missing or cut.
    """

    def __init__(self, folder: Path, *, state_only: bool = False) -> None:
        self._folder = folder
        places = all_gather_objects(_place_of(folder))
        views = self._views(places)
        copies = [views[place].copy for place in places]
        mates = [number for number, copy in enumerate(copies) if copy == copies[rank()]]
        # The first of those that share a copy decides for them.
        self._is_first = mates[0] == rank()
        self._has_copies = len(set(copies)) > 1
        is_listed = any(view.is_listed for view in views.values())
        looks = all_gather_objects(self._look_over(state_only, is_listed=is_listed) if self._is_first else (None, {}))
        self._raise_first([damage for damage, _ in looks])
        _, large = looks[mates[0]]
        mine = my_share(sorted(large.items()), [checksum.bytes for _, checksum in sorted(large.items())], ranks=mates)
        self._is_shared = any(files for _, files in looks)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="checksums") if mine else None
        self._running: list[Future[Damage | None]] = []
        if self._threads is not None:
            self._running = [self._threads.submit(_damage_of, folder, name, checksum) for name, checksum in mine]
            self._threads.shutdown(wait=False)

    def _views(self, places: Sequence[_Place]) -> dict[_Place, _View]:
        """What the first rank of each place sees of the folder; one that does not see all of it waits and looks again.

        A network file system may show a new file to other nodes some seconds later.

        Args:
            places: the places of all ranks.
        """
        own = _view_of(self._folder) if places.index(places[rank()]) == rank() else None
        views = all_gather_objects(own)
        found = [view for view in views if view is not None]
        # What is missing in the only place, or listed in none, is not late.
        if len(found) > 1 and any(view.is_listed for view in found) and not all(view.is_whole for view in found):
            until = time.monotonic() + _SECONDS_UNTIL_SEEN
            while own is not None and not own.is_whole and time.monotonic() < until:
                time.sleep(_SECONDS_BETWEEN_LOOKS)
                own = _view_of(self._folder)
            views = all_gather_objects(own)
        return {place: view for place, view in zip(places, views, strict=True) if view is not None}

    def _look_over(self, state_only: bool, *, is_listed: bool) -> tuple[Damage | None, dict[str, Checksum]]:
        """Verify what takes no time.

        Args:
            state_only: see ``verified``.
            is_listed: whether any copy has checksums; then this one must have them, too.

        Returns:
            The first damage, and the large files that are left.
        """
        found = _first_look(self._folder)
        if found.large is None and is_listed:
            return self._located(Damage(self._folder / CHECKSUMS, _MISSING, is_state=True)), {}
        for damage in found.damages:
            if damage.is_state or not state_only:
                return self._located(damage), {}
            log(f"{damage.path}: {damage.reason}; the run can resume without it", level=logging.WARNING)
        if found.large is None:
            log_once(
                f"{self._folder}: has no {CHECKSUMS} (it was written by version 0.1), so its files are not verified"
            )
        self._signature = _signature(self._folder)
        if _VERIFIED.get(self._folder) == self._signature:
            return None, {}
        return None, found.large or {}

    def raise_own(self) -> None:
        """Wait for the files of this rank only.

        Raises:
            DamagedError: one of them differs.
        """
        damage = self._own_damage()
        if damage is not None:
            _remove_copied(damage, self._folder)
            raise _refusal(self._located(damage), self._folder) from None

    def wait(self) -> None:
        """Wait for the files of all ranks; collective.

        Raises:
            DamagedError: one of them differs.
        """
        if not self._is_shared:
            return
        self._is_shared = False
        own = self._own_damage()
        self._raise_first(all_gather_objects(None if own is None else self._located(own)))
        if self._is_first:
            _VERIFIED[self._folder] = self._signature

    def _raise_first(self, damages: Sequence[Damage | None]) -> None:
        """Raise the first damage that a rank has found, on all ranks; each removes what it found itself."""
        found = next((damage for damage in damages if damage is not None), None)
        if found is None:
            return
        own = damages[rank()]
        if own is not None:
            _remove_copied(own, self._folder)
        raise _refusal(found, self._folder)

    def _located(self, damage: Damage) -> Damage:
        """The damage with the host whose copy it is in, where there are several copies."""
        if not self._has_copies:
            return damage
        return dataclasses.replace(damage, host=socket.gethostname())

    def _own_damage(self) -> Damage | None:
        return next((damage for damage in (future.result() for future in self._running) if damage is not None), None)


def _refusal(damage: Damage, folder: Path) -> DamagedError:
    error = damage.error()
    if not (folder / COPYING).is_dir():
        return error
    return DamagedError(
        f"{error}; this copy of a store's file is removed, so run the command again to copy it once more"
    )


def _remove_copied(damage: Damage, folder: Path) -> None:
    """Remove a damaged file from a copy of a store's checkpoint, since it would be taken for good by its size."""
    # One that was missing may have appeared since.
    if damage.reason != _MISSING and (folder / COPYING).is_dir():
        with contextlib.suppress(OSError):
            damage.path.unlink(missing_ok=True)


# Machine, device and number of a folder, by which ranks know that they see the same files.
_Place = tuple[str, int, int]


def _place_of(folder: Path) -> _Place:
    try:
        status = os.stat(folder)
    except OSError:
        return _machine(), -1, -1
    return _machine(), status.st_dev, status.st_ino


def _machine() -> str:
    """Name of this machine and number of its boot, since clones may have the same name."""
    boot = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()} {boot}"


@dataclass(frozen=True)
class _View:
    """What one machine sees of a folder.

    Attributes:
        copy: what tells the copies of a folder on several disks from each other.
        is_listed: whether it has checksums.
        is_whole: whether all files that have checksums are there, in their sizes.
    """

    copy: str
    is_listed: bool
    is_whole: bool


def _view_of(folder: Path) -> _View:
    is_listed = os.path.exists(folder / CHECKSUMS)
    try:
        checksums = read_checksums(folder)
    except DamagedError:
        checksums = None
    # Disks that were made from one snapshot have the same numbers and times.
    found: list[object] = [_place_of(folder)] if is_on_local_disk(folder) else []
    is_whole = checksums is not None
    for name, checksum in sorted((checksums or {}).items()):
        try:
            status = os.stat(folder / name)
        except OSError:
            found.append(None)
            is_whole = False
            continue
        found.append((status.st_ino, status.st_size, status.st_mtime_ns))
        is_whole = is_whole and status.st_size == checksum.bytes
    return _View(hashlib.sha256(repr(found).encode()).hexdigest(), is_listed, is_whole)


@contextmanager
def verified_if_listed(folder: Path) -> Iterator[None]:
    """Verify a model folder that an export wrote, by this process alone, while the body loads it.

    Args:
        folder: a Hugging Face model folder; one without checksums is taken as it is.

    Raises:
        DamagedError: a file differs from what was written, or is missing or cut.
    """
    if not (folder / CHECKSUMS).is_file():
        yield
        return
    if (damage := quick_damage(folder)) is not None:
        raise damage.error()
    with ThreadPoolExecutor(1, thread_name_prefix="checksums") as thread:
        found = thread.submit(find_damage, folder)
        try:
            yield
        except Exception:
            if (damage := found.result()) is not None:
                raise damage.error() from None
            raise
        if (damage := found.result()) is not None:
            raise damage.error()


def damage_of_small(folder: Path) -> Damage | None:
    """First small file of a model folder that differs from what an export wrote. Other files need not be there."""
    if not (folder / CHECKSUMS).is_file():
        return None
    return next((damage for damage in _first_look(folder).damages if damage.path.is_file()), None)


def quick_damage(folder: Path, *, state_only: bool = False) -> Damage | None:
    """First damage that shows without reading the large files: a missing or cut file, or a small one that differs.

    Args:
        folder: folder of a checkpoint; one without checksums is taken as it is.
        state_only: look only at the files that a run needs to resume.
    """
    return next((damage for damage in _first_look(folder).damages if damage.is_state or not state_only), None)


def find_damage(folder: Path) -> Damage | None:
    """First damage of a checkpoint, all files read in this thread."""
    found = _look(folder)
    every = (_damage_of(folder, name, checksum) for name, checksum in (found.large or {}).items())
    return next((damage for damage in (*found.damages, *every) if damage is not None), None)


def log_once(message: str) -> None:
    """Log a line on rank 0, unless this process has logged it before; ranks need no process group for it."""
    if message not in _LOGGED:
        _LOGGED.add(message)
        log(message, active=os.environ.get("RANK", "0") == "0")


_LOGGED: set[str] = set()
# Folders whose large files were found undamaged, as they were then.
_VERIFIED: dict[Path, tuple[object, ...]] = {}


@dataclass(frozen=True)
class _Look:
    """What a first look at a checkpoint finds.

    Attributes:
        damages: damaged files.
        large: files whose content has not been looked at; None: the folder has no checksums.
    """

    damages: tuple[Damage, ...]
    large: dict[str, Checksum] | None


_LOOKS: dict[Path, tuple[tuple[object, ...], _Look]] = {}


def _first_look(folder: Path) -> _Look:
    signature = _signature(folder)
    if folder not in _LOOKS or _LOOKS[folder][0] != signature:
        _LOOKS[folder] = (signature, _look(folder))
    return _LOOKS[folder][1]


def _look(folder: Path) -> _Look:
    if not (folder / CHECKSUMS).exists():
        return _Look((), None)
    try:
        checksums = read_checksums(folder)
    except DamagedError as error:
        # Without checksums nothing of the folder can be trusted.
        return _Look((Damage(folder / CHECKSUMS, str(error), is_state=True),), {})
    damages, large = [], {}
    for name, checksum in checksums.items():
        reason = _wrong_size(folder / name, checksum.bytes)
        if reason is not None:
            damages.append(Damage(folder / name, reason, _is_state(name)))
        elif checksum.bytes > _SMALL_BYTES:
            large[name] = checksum
        elif (damage := _damage_of(folder, name, checksum)) is not None:
            damages.append(damage)
    return _Look(tuple(damages), large)


def read_checksums(folder: Path) -> dict[str, Checksum]:
    """Read ``checksums.json``.

    Raises:
        DamagedError: it cannot be read; the message is the reason only.
    """
    try:
        content = read_bytes(folder / CHECKSUMS)
    except (OSError, ValueError) as error:
        raise DamagedError(f"cannot be read ({one_line(error)})") from None
    return parse_checksums(content)


def parse_checksums(listed: bytes) -> dict[str, Checksum]:
    """The checksums by name of file, given the content of ``checksums.json``.

    Raises:
        DamagedError: it is not that of such a file; the message is the reason only.
    """
    try:
        content = parse_json(listed.decode("utf-8"))
        if set(content) != {"schema_version", "files"} or content["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"its schema_version is not {SCHEMA_VERSION}")
        checksums = {name: Checksum(**record) for name, record in content["files"].items()}
        for name, checksum in checksums.items():
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"{name!r} is outside the folder")
            if "\0" in name or not name.isprintable():
                raise ValueError(f"{name!r} is not the name of a file")
            if type(checksum.bytes) is not int or not _SHA256.fullmatch(checksum.sha256):
                raise ValueError(f"the checksum of {name!r} is none")
        return checksums
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise DamagedError(f"cannot be read ({one_line(error)})") from None


def _signature(folder: Path) -> tuple[object, ...]:
    """What changes when a file of the folder is changed, added or removed."""
    found = []
    for path in sorted(folder.rglob("*")):
        try:
            status = path.stat()
        except OSError:
            continue
        found.append((path, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    return tuple(found)


def _is_state(name: str) -> bool:
    return name in _STATE_FILES or name.endswith(WEIGHTS_SUFFIX)


def _wrong_size(path: Path, expected: int) -> str | None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return _MISSING
    except OSError as error:
        return f"cannot be read ({one_line(error)})"
    return None if size == expected else f"has {size} bytes instead of {expected}"


def _damage_of(folder: Path, name: str, checksum: Checksum) -> Damage | None:
    path = folder / name
    reason = _wrong_size(path, checksum.bytes)
    if reason is None:
        try:
            if sha256_of(path) != checksum.sha256:
                reason = f"its content differs from its checksum in {CHECKSUMS}"
        except OSError as error:
            reason = f"cannot be read ({one_line(error)})"
    return None if reason is None else Damage(path, reason, _is_state(name))
