"""Command lines and launches, as a user types them.

Python and the imports of torch, megatron-core and transformers take 6 to 8 s per process: more than most tests compute. So a
command line runs, unless its test asks for a fresh interpreter, in a child forked from a server process that has imported them
already. The child gets the command line's arguments, environment, streams and working directory and runs the same file as
``__main__``; of a torchrun launch the agent is torch's own, and only its workers are forked instead of started.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import psutil
import pytest

from tests.support import forked, gpus

ROOT = Path(__file__).parent.parent.parent
PYTHON = sys.executable


def environment(**extra: str) -> dict[str, str]:
    """Environment of a launched process: one thread per process, since the processes of a launch share two cores.

    Where there are GPUs, it is on CUDA.
    """
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **gpus.launched(), **extra}


def free_port() -> int:
    """A free port below those that the system gives to outgoing connections, which might take it before the launch listens."""
    while True:
        port = 10_000 + secrets.randbelow(20_000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def torchrun(processes: int, *arguments: str) -> list[str]:
    """Command line of a launch on this machine; skips the test if there are GPUs and a rank would have none."""
    if reason := gpus.too_few(processes):
        pytest.skip(reason)
    return [
        PYTHON,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={processes}",
        "--master-addr=127.0.0.1",
        f"--master-port={free_port()}",
        *arguments,
    ]


PROGRAMS = {
    "train": ["-m", "megatron_longpo.train"],
    "convert": ["tools/convert_checkpoint.py"],
    "preprocess": ["tools/preprocess_preference_data.py"],
    "generate": ["tools/generate_preference_data.py"],
    "evaluate": ["tools/evaluate.py"],
}


def command(program: str, *arguments: str, processes: int | None = None, **flags: Any) -> list[str]:
    """Command line of one of the programs.

    Args:
        program: one of ``PROGRAMS``.
        arguments: arguments before the flags, such as a subcommand.
        processes: number of processes of a torchrun launch; None: without torchrun.
        flags: ``load=x`` is ``--load x``, ``bf16=True`` is ``--bf16``, a sequence is several values, None is left out.
    """
    line = [*PROGRAMS[program], *arguments]
    for name, value in flags.items():
        if value is None:
            continue
        line.append("--" + name.replace("_", "-"))
        if value is not True:
            line += [str(v) for v in value] if isinstance(value, list | tuple) else [str(value)]
    return [PYTHON, *line] if processes is None else torchrun(processes, *line)


class _Process(Protocol):
    """What ``subprocess.Popen`` and a forked process have in common."""

    pid: int

    def poll(self) -> int | None: ...

    def wait(self, timeout: float) -> int: ...


class _Forked:
    """A child of the server, with Popen's interface."""

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], folder: Path, stdout: Path, stderr: Path
    ) -> None:
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(["tests.support.preloaded"])
        arguments = (list(command), dict(env), str(folder), str(stdout), str(stderr))
        self._process = server.Process(target=forked.run_command, args=arguments)
        # The server takes its environment from the first call. A fork copies only the thread that forks, so there must be
        # no other: none of OpenMP, and none of the jemalloc that pyarrow brings.
        with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", JE_ARROW_MALLOC_CONF="background_thread:false"):
            self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("", timeout)
        return self._process.exitcode


_STARTED: weakref.WeakSet[Running] = weakref.WeakSet()


class Running:
    """A command line that has been started.

    Args:
        command: the command line; its first element is the Python interpreter.
        env: environment (default: ``environment()``).
        folder: working directory.
        fresh: start a fresh interpreter as a shell does, instead of forking a process that has the imports.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        folder: Path = ROOT,
        fresh: bool = False,
    ) -> None:
        self.command = list(command)
        assert self.command[0] == PYTHON, command
        self._folder = tempfile.TemporaryDirectory(prefix="running-")
        self._streams = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        env = dict(env or environment())
        self._process: _Process
        # The server's torch has been prepared for the CPU, and a fork cannot use what CUDA's driver was asked before it.
        if fresh or gpus.COUNT:
            with open(self._streams[0], "wb") as stdout, open(self._streams[1], "wb") as stderr:
                self._process = subprocess.Popen(
                    self.command, stdout=stdout, stderr=stderr, env=env, cwd=folder, start_new_session=True
                )
        else:
            self._process = _Forked(self.command, env, folder, *self._streams)
        self.pid = self._process.pid
        _STARTED.add(self)

    def poll(self) -> int | None:
        """Exit status (negative: the signal that ended it), or None while it runs."""
        return self._process.poll()

    def kill(self) -> None:
        """SIGKILL for the process and everything that it started."""
        # Each is killed with its process group: what it starts in this moment is in none of the lists.
        for victim in [*self.children(), self.pid]:
            with contextlib.suppress(ProcessLookupError):
                group = os.getpgid(victim)
                if group != os.getpgrp():
                    os.killpg(group, signal.SIGKILL)
                os.kill(victim, signal.SIGKILL)
        self._process.wait(60)

    def children(self) -> list[int]:
        """Processes that it started, and theirs."""
        try:
            return [child.pid for child in psutil.Process(self.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def wait(self, timeout: float = 600, expect: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Wait for the end.

        Args:
            timeout: seconds after which everything is killed and the test fails.
            expect: exit status that the test expects; None for any.

        Raises:
            AssertionError: another exit status; the message has the output.
            subprocess.TimeoutExpired: it is still running.
        """
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise subprocess.TimeoutExpired(self.command, timeout, *self.output()) from None
        stdout, stderr = self.output()
        if expect is not None and code != expect:
            raise AssertionError(f"exit status {code} of {self.command}\n{stdout[-4000:]}\n{stderr[-8000:]}")
        return subprocess.CompletedProcess(self.command, code, stdout, stderr)

    def output(self) -> tuple[str, str]:
        """What it has written to standard output and to standard error."""
        stdout, stderr = (p.read_text(encoding="utf-8", errors="replace") if p.exists() else "" for p in self._streams)
        return stdout, stderr


@atexit.register
def _kill_all() -> None:
    """A test that failed may have left some; multiprocessing would wait for them."""
    for running in list(_STARTED):
        if running.poll() is None:
            running.kill()


def run(
    command: Sequence[str],
    *,
    timeout: float = 600,
    expect: int | None = 0,
    env: Mapping[str, str] | None = None,
    folder: Path = ROOT,
    fresh: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run a command line to its end; see ``Running`` and ``Running.wait`` for the arguments."""
    return Running(command, env=env, folder=folder, fresh=fresh).wait(timeout, expect)
