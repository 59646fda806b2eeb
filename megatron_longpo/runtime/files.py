"""Files that appear whole or not at all, files that are what they should be, checksums, and locks on folders."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import sys
from pathlib import Path
from typing import Any, BinaryIO

from megatron_longpo.errors import DataError, LongPOError, one_line
from megatron_longpo.runtime.log import log

_BLOCK_BYTES = 2**22
# Of the command line of a process that holds a lock.
_COMMAND_CHARACTERS = 120
# Of a file that holds a checksum.
_CHECKSUM_BYTES = 4096
HOLDER_FILE = ".holder.json"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that appears whole under its name, or not at all."""
    # Two runs may write the same file (a shared cache), so each has a temporary file of its own.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


class NotRegularFile(OSError):
    """A path names something other than a regular file."""


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; a symbolic link to one is followed.

    Reading a FIFO would wait for its writer, and a device may have no end.

    Raises:
        OSError: there is no such file, or it cannot be read; ``NotRegularFile`` if it is of another kind.
    """
    # Looked at before it is opened, since opening some devices has effects, and again after, since it may have been replaced.
    _refuse_other_kinds(os.stat(path).st_mode)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _refuse_other_kinds(os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _refuse_other_kinds(mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise NotRegularFile(f"is {_KINDS.get(stat.S_IFMT(mode), 'of another kind')}, not a regular file")


def sha256_of(path: Path) -> str:
    """Checksum of a file, in hexadecimal digits."""
    with open_regular(path) as stream:
        # Python 3.10 has no hashlib.file_digest.
        digest = hashlib.sha256()
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
        return digest.hexdigest()


def checksum_path(path: Path) -> Path:
    """File beside another that holds its checksum."""
    return path.with_name(path.name + ".sha256")


def write_checksum(path: Path, sha256: str) -> None:
    """Write the checksum of a file beside it, as ``sha256sum --check`` reads it."""
    write_atomically(checksum_path(path), f"{sha256}  {path.name}\n".encode())


def check_checksum(path: Path, sha256: str) -> None:
    """Check a file against the checksum beside it, if there is one.

    Args:
        path: the file.
        sha256: its checksum now.

    Raises:
        DataError: the two differ, or the checksum cannot be read.
    """
    beside = checksum_path(path)
    if not beside.exists():
        return
    try:
        with open_regular(beside) as stream:
            expected = stream.read(_CHECKSUM_BYTES).decode("ascii", errors="replace").split()
    except OSError as error:
        raise DataError(f"{beside}: cannot be read ({error}); remove it to read {path.name} unchecked") from None
    if expected[:1] != [sha256]:
        raise DataError(
            f"{path}: does not have the checksum in {beside.name}, so it was changed or damaged; make or copy it again, or "
            f"remove {beside.name} if it was changed on purpose"
        )


# File systems of one machine. What is not here may be a network's.
_LOCAL_FILE_SYSTEMS = re.compile(
    r"bcachefs|btrfs|erofs|exfat|ext[234]|f2fs|fuse\.fuse-overlayfs|fuseblk|jfs|overlay|ramfs|reiserfs|squashfs|tmpfs|vfat|xfs|zfs"
)
_ESCAPED = re.compile(rb"\\([0-7]{3})")


def is_on_local_disk(path: Path, *, mounts: Path = Path("/proc/self/mountinfo")) -> bool:
    """Whether a path is known to be on a disk, or in the memory, of this machine only.

    Args:
        path: a file or folder.
        mounts: table of the mounts, as Linux writes it. Where there is none, nothing is known.
    """
    try:
        lines = mounts.read_bytes().splitlines()
    except OSError:
        return False
    real, longest, kind = os.fsencode(os.path.realpath(path)) + b"/", 0, ""
    for line in lines:
        # "36 35 98:0 /root /mount/point rw,noatime master:1 - ext4 /dev/sda1 rw"; blanks in paths are "\040".
        before, _, after = line.partition(b" - ")
        fields = before.split(b" ")
        if len(fields) < 5:
            continue
        point = _ESCAPED.sub(lambda found: bytes([int(found[1], 8)]), fields[4]).rstrip(b"/") + b"/"
        # Of mounts at the same point, the last one is seen.
        if real.startswith(point) and len(point) >= longest:
            longest, kind = len(point), after.split(b" ")[0].decode(errors="replace")
    return _LOCAL_FILE_SYSTEMS.fullmatch(kind) is not None


def link_atomically(source: Path, target: Path) -> None:
    """Make ``target`` another name of ``source``, or a copy of it; it appears whole or not at all."""
    temporary = target.with_name(target.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        # Not every file system has hard links.
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


class FolderLock:
    """An advisory lock on a folder, held until ``release`` or the death of the process.

    The folder itself is locked (flock on its descriptor), not a file of its own as filelock does: everything in the folder may
    be deleted, or the folder renamed, meanwhile.
    With ``record``, the folder holds a file ``.holder.json`` for as long as it is locked, with host, process, start and command
    of the holder: the refused one reads it, also on another host. Where a file system locks no folders (NFS), that file is
    locked instead.

    What is assumed of a network file system: that its locks reach all hosts, and that it releases those of a dead host. A lock
    that was free although another host's record is there is reported. Where nothing can be locked, that is reported as well, and
    nothing keeps two processes apart.

    Args:
        folder: folder to lock; it must exist.
        wait: wait for another holder instead of raising.
        name: path that the user knows the folder by, for the message; default: the folder.
        error: class of the error.
        record: say in the folder who holds it.

    Raises:
        LongPOError: another process holds the folder, and ``wait`` is off.
    """

    def __init__(
        self,
        folder: Path,
        *,
        wait: bool = False,
        name: Path | None = None,
        error: type[LongPOError] = DataError,
        record: bool = False,
    ) -> None:
        self.folder = folder
        self._record = folder / HOLDER_FILE if record else None
        self._descriptors = [os.open(folder, os.O_RDONLY)]
        try:
            locked = _flock(self._descriptors[0], wait=wait)
            if not locked and self._record is not None:
                locked = self._lock_record(self._record, wait=wait)
        except BlockingIOError:
            holder = holder_of(folder)
            self._close()
            raise error(f"{name or folder}: {holder} works on it; wait for it, or choose another output") from None
        _HELD.add(self)
        self._identity = _this_process()
        if self._record is not None:
            self._report(name or folder, locked=locked)
            self._record.write_text(json.dumps(self._identity) + "\n", encoding="utf-8")

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the folder up; a second call does nothing."""
        if not self._descriptors:
            return
        if self._record is not None:
            with contextlib.suppress(OSError):
                if _read_holder(self._record) == self._identity:
                    self._record.unlink()
        self._close()
        _HELD.discard(self)

    @property
    def is_in_place(self) -> bool:
        """Whether the path still names the folder that is locked; it may have been removed or replaced."""
        try:
            return bool(self._descriptors) and os.path.samestat(os.stat(self.folder), os.fstat(self._descriptors[0]))
        except OSError:
            return False

    def _lock_record(self, record: Path, *, wait: bool) -> bool:
        """Lock the record itself; whether that can be done."""
        while True:
            descriptor = os.open(record, os.O_RDWR | os.O_CREAT, 0o644)
            self._descriptors.append(descriptor)
            if not _flock(descriptor, wait=wait):
                return False
            # The last holder may have removed it between the two calls.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(record), os.fstat(descriptor)):
                    return True
            os.close(self._descriptors.pop())

    def _report(self, name: Path, *, locked: bool) -> None:
        assert self._record is not None
        before = _read_holder(self._record)
        if not locked:
            log(f"{name}: its file system has no locks, so nothing keeps two processes from working on it at once")
        elif before is not None and before.get("host") != self._identity["host"]:
            log(f"{name}: {_describe(before)} did not release it, but the lock is free: that process is taken for dead")

    def _close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())


def release_locks() -> None:
    """Release all locks of this process, before it exits."""
    for held in list(_HELD):
        with contextlib.suppress(OSError):
            held.release()


def _forget_locks() -> None:
    """Run in a forked child: the locks belong to the parent and must be released when it dies."""
    for held in list(_HELD):
        held._close()
    _HELD.clear()


_HELD: set[FolderLock] = set()
os.register_at_fork(after_in_child=_forget_locks)


def _flock(descriptor: int, *, wait: bool) -> bool:
    """Lock a descriptor; False: the file system has no such locks.

    Raises:
        BlockingIOError: another process holds it, and ``wait`` is off.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _this_process() -> dict[str, Any]:
    # For people only; nothing compares the time with a clock.
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "process": os.getpid(), "started": now, "command": " ".join(sys.argv)}


def _read_holder(record: Path) -> dict[str, Any] | None:
    """Contents of a record; None if it holds nothing of use."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(record.read_bytes()[:_BLOCK_BYTES])
        return found if isinstance(found, dict) else None
    return None


def is_held(folder: Path) -> bool:
    """Whether a folder seems to be locked with ``record``, for a status that people read; asking does not touch the lock.

    The record of a process that was killed stays. On its own host it is known to be gone, on others it is believed.
    """
    holder = _read_holder(folder / HOLDER_FILE)
    if holder is None:
        return False
    if holder.get("host") != socket.gethostname():
        return True
    try:
        os.kill(int(holder["process"]), 0)
    except PermissionError:
        return True
    except (OSError, OverflowError, ValueError, TypeError, KeyError):
        return False
    return True


def _describe(holder: dict[str, Any]) -> str:
    return (
        f"process {holder.get('process')} on host {holder.get('host')}, at work since {holder.get('started')} "
        f"({one_line(holder.get('command', ''), _COMMAND_CHARACTERS)})"
    )


def holder_of(folder: Path) -> str:
    """Describe who holds the lock on a folder: by its record, else by process and command on Linux, else "another process"."""
    recorded = _read_holder(folder / HOLDER_FILE)
    if recorded is not None:
        return _describe(recorded)
    with contextlib.suppress(OSError, ValueError, IndexError):
        inode = folder.stat().st_ino
        for line in Path("/proc/locks").read_text().splitlines():
            # "7: FLOCK ADVISORY WRITE <pid> <device>:<inode> 0 EOF"; "->" marks one that waits.
            fields = line.split()
            if fields[1] == "FLOCK" and int(fields[5].split(":")[2]) == inode and int(fields[4]) > 0:
                command = Path(f"/proc/{fields[4]}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
                return f"process {fields[4]} ({one_line(command, _COMMAND_CHARACTERS)})"
    return "another process"
