"""Overlap of reading and writing: values prefetched in a thread, and files flushed to the disk while they are written."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from torch import Tensor

# Bytes prefetched beyond the largest value.
_AHEAD_BYTES = 2**26
_FLUSH_SECONDS = 0.1


class Prefetcher(Iterator[Tensor]):
    """Makes values in a thread, in order, while the previous ones are in use::

        with Prefetcher([(size, make), ...]) as values:
            for value in values:
                ...

    Prefetched values plus the one in use never exceed the largest value plus ``ahead`` bytes. A value counts as dropped when
    the next one is requested; a consumer that still holds it then has it on top.

    Args:
        items: for each value its bytes, and a function that makes it.
        ahead: bytes to prefetch beyond the value in use.
    """

    def __init__(self, items: Sequence[tuple[int, Callable[[], Tensor]]], ahead: int = _AHEAD_BYTES) -> None:
        self._items = items
        self._limit = max((size for size, _ in items), default=0) + ahead
        self._ready: list[Tensor | BaseException] = []
        self._num_taken = 0
        self._held_bytes = 0
        self._in_use_bytes = 0
        self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._make_all, daemon=True)

    def __enter__(self) -> Prefetcher:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    def _make_all(self) -> None:
        for size, make in self._items:
            with self._changed:
                while not self._stopped and self._held_bytes + size > self._limit:
                    self._changed.wait()
                if self._stopped:
                    return
                self._held_bytes += size
            try:
                value: Tensor | BaseException = make()
            except BaseException as error:
                value = error
            with self._changed:
                self._ready.append(value)
                self._changed.notify_all()
            if isinstance(value, BaseException):
                return
            # Drop the reference before the next value is made.
            del value

    def __next__(self) -> Tensor:
        """The next value.

        Raises:
            BaseException: what making the value raised.
        """
        with self._changed:
            self._held_bytes -= self._in_use_bytes
            self._in_use_bytes = 0
            self._changed.notify_all()
            if self._num_taken == len(self._items):
                raise StopIteration
            self._changed.wait_for(lambda: self._ready)
            value = self._ready[0]
            if isinstance(value, BaseException):
                raise value
            self._in_use_bytes = self._items[self._num_taken][0]
            self._num_taken += 1
            del self._ready[0]
            return value


@contextmanager
def flushing(path: Path) -> Iterator[None]:
    """Flush a file to the disk while it is written, so that the wait at its end is short.

    Otherwise the system collects gigabytes in memory and writes them only when the final ``fsync`` asks for it.
    """
    done = threading.Event()

    def flush() -> None:
        while not done.wait(_FLUSH_SECONDS):
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except OSError:
                continue
            try:
                os.fdatasync(descriptor)
            except OSError:
                return  # the writer of the file gets the same error
            finally:
                os.close(descriptor)

    thread = threading.Thread(target=flush, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
