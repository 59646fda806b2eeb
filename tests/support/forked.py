"""What a forked child does; see ``launch``."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async


def run_command(command: list[str], env: dict[str, str], folder: str, stdout: str, stderr: str) -> None:
    """Do in this process what ``command`` does in one of its own.

    Args:
        command: Python interpreter, then ``-c CODE``, ``-m MODULE`` or a script, and its arguments.
        env: environment.
        folder: working directory.
        stdout: file for standard output.
        stderr: file for standard error.
    """
    os.setsid()
    for stream, path in ((0, os.devnull), (1, stdout), (2, stderr)):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, stream)
        os.close(descriptor)
    from tests.support import preloaded

    assert os.getpid() != preloaded.IMPORTED_BY, "the server has imported nothing"
    assert preloaded.THREADS == 1, f"{preloaded.THREADS} threads in the server: a fork copies only one of them"
    fork_results_queue()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    arguments = command[1:]
    if arguments[:2] == ["-m", "torch.distributed.run"]:
        _torchrun(arguments[2:])
    else:
        _run(arguments)


def fork_results_queue() -> None:
    """Have megatron-core's checkpoint writer fork the manager of its queue.

    Its own spawns the manager: an interpreter that imports torch and megatron-core once more, per rank that saves.
    """
    filesystem_async._get_write_results_queue = _forked_results_queue


def _forked_results_queue() -> Any:
    """``_get_write_results_queue`` of megatron-core 0.16.1's checkpoint writer, with a manager that is forked."""
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = multiprocessing.get_context("fork").Manager().Queue()
    return filesystem_async._results_queue


def _run(arguments: list[str]) -> None:
    """Run ``-c CODE``, ``-m MODULE`` or a script as ``__main__``."""
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    elif arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path[0:0] = [str(Path(arguments[0]).resolve().parent)]
        runpy.run_path(arguments[0], run_name="__main__")


def _torchrun(arguments: list[str]) -> None:
    """Torchrun with its own agent, whose workers are forked."""
    from torch.distributed.elastic.multiprocessing.errors import record
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    options = parse_args(arguments)
    options.start_method = "fork"
    config, _, _ = config_from_args(options)
    program = ["-m", options.training_script] if options.module else [options.training_script]
    launch = elastic_launch(config=config, entrypoint=_worker)
    record(launch)([*program, *options.training_script_args])


def _worker(arguments: list[str]) -> None:
    # The agent's handlers are not the worker's.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    _run(arguments)
