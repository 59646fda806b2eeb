"""Files in an object store, or in a folder, by URL: fsspec does the transport, and every failure is one line with a remedy.

Credentials and endpoints are found by the packages that fsspec uses: for S3 that is s3fs, which goes by botocore's environment
variables, files and roles (``AWS_PROFILE``, ``AWS_ENDPOINT_URL``, ...). A URL never has them, since it is logged.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.callbacks import Callback

from megatron_longpo.config import check_url
from megatron_longpo.errors import CheckpointError, one_line
from megatron_longpo.runtime.reading import TooLarge

Item = TypeVar("Item")

# Times that reading is tried, and seconds before the second time; they double.
_TRIES, _FIRST_WAIT = 4, 0.5
# Object stores have no folders; in a real file system they are made as files are written.
_WITH_FOLDERS = ("file", "local")
_S3 = ("s3", "s3a")
# botocore's own limits are 60 s to connect, and five tries: minutes, until an address that swallows packets is named.
_S3_CONNECTION = {"connect_timeout": 10, "read_timeout": 60, "retries": {"mode": "standard", "max_attempts": 3}}
# Errors that a disk here can give while a file is copied to it.
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
# Variables whose values no message shows, whatever a library writes into its errors.
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")
_CREDENTIALS = re.compile(r"//[^/@\s]*@")
_EXTRAS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs"}


class StoreError(CheckpointError):
    """A store that cannot be used.

    Args:
        message: value, rule and fix.
        is_lasting: whether trying again is of no use.
    """

    def __init__(self, message: object, *, is_lasting: bool = True) -> None:
        super().__init__(message)
        self.is_lasting = is_lasting


class Stopped(Exception):
    """Copying that was broken off, since something else has failed."""


class _Stopping(Callback):  # type: ignore[misc]
    """Breaks a copy off where fsspec's file system calls it between parts of a file: s3fs does, local folders do not."""

    def __init__(self, is_stopped: Callable[[], bool]) -> None:
        super().__init__()
        self._is_stopped = is_stopped

    def call(self, hook_name: str | None = None, **kwargs: Any) -> None:  # noqa: ARG002
        # Both relative_update, which s3fs calls, and absolute_update, which adlfs calls, end here.
        if self._is_stopped():
            raise Stopped


class Store:
    """The files below a URL.

    Args:
        url: such as ``s3://bucket/run`` or ``file:///archive/run``.
        name: setting that it comes from, for messages.

    Raises:
        ConfigError: the URL is of another form, or has secrets in it.
        StoreError: the package for such URLs is missing.
    """

    def __init__(self, url: str, *, name: str) -> None:
        check_url(name, url)
        self.url, self._name = url.rstrip("/"), name
        scheme = url.partition("://")[0]
        self._has_folders = scheme in _WITH_FOLDERS
        options: dict[str, Any] = {}
        if self._has_folders:
            options["auto_mkdir"] = True
        if scheme in _S3:
            options["config_kwargs"] = _S3_CONNECTION
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url, **options)
        except (ImportError, ValueError) as error:
            package = _EXTRAS.get(scheme)
            fix = "use s3://, gs://, az:// or file://"
            if package is not None:
                fix = f"it needs the package {package}: pip install {package}"
                if package == "s3fs":
                    fix += " (the extra `s3` of this package)"
            raise StoreError(f"{name}={url}: cannot be used ({_shown(error)}); {fix}") from None

    def files(self, below: str = "") -> dict[str, int]:
        """Sizes of the files below the URL, or below a folder of it, in bytes, by path relative to the URL."""
        place = self._at(below) if below else self._root

        def find() -> dict[str, Any]:
            self._fs.invalidate_cache()
            found: dict[str, Any] = self._fs.find(place, detail=True)
            return found

        prefix = self._root.rstrip("/") + "/"
        return {
            path.removeprefix(prefix): int(info["size"] or 0)
            for path, info in self._tried(find).items()
            if path.startswith(prefix) and not path.endswith("/")
        }

    def read(self, path: str, *, most: int) -> bytes | None:
        """Content of a small file; None: there is none.

        Args:
            path: path relative to the URL.
            most: bytes above which it is refused.

        Raises:
            TooLarge: it has more bytes.
        """

        def read() -> bytes:
            with self._fs.open(self._at(path), "rb", cache_type="none") as stream:
                found: bytes = stream.read(most + 1)
            return found

        try:
            content = self._tried(read)
        except StoreError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise
        if len(content) > most:
            raise TooLarge(f"it has more than {most} bytes")
        return content

    def download(self, path: str, target: Path, *, is_stopped: Callable[[], bool] = lambda: False) -> None:
        """Copy a file from the store, under a temporary name of the caller's.

        Args:
            path: path relative to the URL.
            target: path of the copy.
            is_stopped: asked between parts of a file, where the store's package tells of them; if it says so, the copy is
                broken off.

        Raises:
            OSError: the disk here does not take it.
            StoreError: the store does not give it.
            Stopped: it was broken off.
        """
        callback = _Stopping(is_stopped)
        self._tried(lambda: self._fs.get_file(self._at(path), str(target), callback=callback), writes_here=True)

    def upload(self, source: Path, path: str) -> None:
        """Copy a file to the store, once; objects of a store appear whole or not at all.

        Raises:
            FileNotFoundError: there is no such file here.
            StoreError: the store does not take it.
        """
        os.stat(source)
        self._put(path, lambda place: self._fs.put_file(str(source), place))

    def write(self, path: str, content: bytes) -> None:
        """Write a small file, once."""
        self._put(path, lambda place: self._fs.pipe_file(place, content))

    def _put(self, path: str, action: Callable[[str], None]) -> None:
        place = self._at(path)
        if not self._has_folders:
            self._once(lambda: action(place))
            return

        def under_another_name() -> None:
            # Objects appear whole, files do not.
            part = f"{place}.{uuid.uuid4().hex}.part"
            self._fs.makedirs(os.path.dirname(place), exist_ok=True)
            try:
                action(part)
                os.replace(part, place)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(part)
                raise

        self._once(under_another_name)

    def remove(self, paths: Iterable[str]) -> None:
        """Remove files, once; those that are gone already do not count."""
        paths = list(paths)
        if len(paths) > 1 and not self._has_folders:
            # A thousand per request. Some stores do not know that request or the checksum that botocore sends with it, and s3fs
            # says nothing of files that could not be removed, so what is left is removed one by one.
            with contextlib.suppress(Exception):
                self._fs.rm([self._at(path) for path in paths])
            below = os.path.commonpath([os.path.dirname(path) for path in paths])
            paths = sorted(set(paths) & self.files(below).keys())
        for path in paths:
            try:
                self._once(lambda path=path: self._fs.rm_file(self._at(path)))  # type: ignore[misc]
            except StoreError as error:
                if not isinstance(error.__cause__, FileNotFoundError):
                    raise
            if self._has_folders:
                self._remove_empty_folders(path)

    def _remove_empty_folders(self, path: str) -> None:
        while folder := os.path.dirname(path):
            try:
                self._fs.rmdir(self._at(folder))
            except OSError:
                # It holds other files.
                return
            path = folder

    def _at(self, path: str) -> str:
        return f"{self._root.rstrip('/')}/{path}"

    def _once(self, action: Callable[[], Item], *, writes_here: bool = False) -> Item:
        try:
            return action()
        except Stopped:
            raise
        except Exception as error:
            if writes_here and _is_of_the_disk(error):
                raise
            raise self._explained(error) from error

    def _tried(self, action: Callable[[], Item], *, writes_here: bool = False) -> Item:
        """What an action returns, which is tried again while another outcome is possible.

        Args:
            action: what is tried.
            writes_here: whether it writes to a disk here, whose errors are raised as they are.
        """
        for number in range(_TRIES):
            try:
                return self._once(action, writes_here=writes_here)
            except StoreError as error:
                if error.is_lasting or number == _TRIES - 1:
                    raise
            time.sleep(_FIRST_WAIT * 2**number)
        raise AssertionError("unreachable")

    def _explained(self, error: Exception) -> StoreError:
        kind, said = type(error).__name__, _shown(error)
        where = f"{self._name}={self.url}"
        if isinstance(error, FileNotFoundError):
            return StoreError(
                f"{where}: there is no such bucket or file ({said}); create the bucket, or correct the URL"
            )
        if kind in ("NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError"):
            return StoreError(
                f"{where}: there are no credentials ({said}); set AWS_PROFILE, or AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or give the machine a role"
            )
        if isinstance(error, PermissionError):
            return StoreError(
                f"{where}: access is refused ({said}); use credentials that may list, read, write and delete there"
            )
        return StoreError(
            f"{where}: the store cannot be reached, or fails ({kind}: {said}); check the network, and the endpoint "
            "(AWS_ENDPOINT_URL) if it is not Amazon's",
            is_lasting=False,
        )


def _is_of_the_disk(error: Exception) -> bool:
    if not isinstance(error, OSError) or error.errno not in _OF_THE_DISK:
        return False
    # s3fs makes EIO of every answer that it does not know, such as 429, 502 and 504; botocore's error is then behind it.
    return error.errno != errno.EIO or (error.__cause__ is None and error.__context__ is None)


def _shown(error: object) -> str:
    """What a library says, on one line, without credentials in URLs and the values of variables that hold secrets."""
    text = _CREDENTIALS.sub("//[credentials]@", one_line(error))
    for variable in _SECRETS:
        if value := os.environ.get(variable):
            text = text.replace(value, f"[{variable}]")
    return text
