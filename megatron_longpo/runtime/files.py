"""Files that appear whole or not at all, checksums, and locks on folders."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from pathlib import Path

from megatron_longpo.errors import DataError, LongPOError, one_line

_BLOCK_BYTES = 2**22
# Of the command line of a process that holds a lock.
_COMMAND_CHARACTERS = 120


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that appears whole under its name, or not at all."""
    # Two runs may write the same file (a shared cache), so each has a temporary file of its own.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def sha256_of(path: Path) -> str:
    """Checksum of a file, in hexadecimal digits."""
    with open(path, "rb") as stream:
        # Python 3.10 has no hashlib.file_digest.
        digest = hashlib.sha256()
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
        return digest.hexdigest()


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

    The folder itself is locked (flock on its descriptor), not a file of its own as filelock does: no lock file is left
    in an output, and everything in the folder may be deleted, or the folder renamed, meanwhile. On a file system without locks
    nothing is locked.

    Args:
        folder: folder to lock; it must exist.
        wait: wait for another holder instead of raising.
        name: path that the user knows the folder by, for the message; default: the folder.
        error: class of the error.

    Raises:
        LongPOError: another process holds the folder, and ``wait`` is off.
    """

    def __init__(
        self, folder: Path, *, wait: bool = False, name: Path | None = None, error: type[LongPOError] = DataError
    ) -> None:
        self._descriptor: int | None = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            holder = _holder_of(self._descriptor)
            self.release()
            raise error(f"{name or folder}: {holder} works on it; wait for it, or choose another output") from None
        except OSError:
            pass  # a file system without locks

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the folder up; a second call does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _holder_of(descriptor: int) -> str:
    """Who holds a lock: process number and command where Linux tells, else "another process"."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        inode = os.fstat(descriptor).st_ino
        for line in Path("/proc/locks").read_text().splitlines():
            # "7: FLOCK ADVISORY WRITE <pid> <device>:<inode> 0 EOF"; "->" marks one that waits.
            fields = line.split()
            if fields[1] == "FLOCK" and int(fields[5].split(":")[2]) == inode and int(fields[4]) > 0:
                command = Path(f"/proc/{fields[4]}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
                return f"process {fields[4]} ({one_line(command, _COMMAND_CHARACTERS)})"
    return "another process"
