"""Files that appear whole or not at all, their checksums, and folders that one process holds."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from megatron_longpo.errors import DataError


def write_atomically(path: Path, content: bytes) -> None:
    """The file appears whole under its name, or not at all."""
    # Two runs may write one file (a cache that they share): each its own.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def sha256_of(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(stream)


def _sha256(stream: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := stream.read(1 << 22):
        digest.update(block)
    return digest.hexdigest()


def link_atomically(source: Path, target: Path) -> None:
    """``target`` becomes another name of ``source``, or a copy of it, whole or not at all."""
    temporary = target.with_name(target.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        # Not every file system has hard links.
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


@contextlib.contextmanager
def waiting_lock(folder: Path) -> Iterator[None]:
    """Hold a folder while something in it is read, changed and written; another process waits."""
    held = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def lock(folder: Path) -> int:
    """Hold a folder for this process; gives the descriptor to keep.

    Raises:
        DataError: another process works on it.
    """
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        raise DataError(f"{folder}: another process works on it; wait for it, or name another --output") from None
    except OSError:
        pass  # a file system without locks
    return held
