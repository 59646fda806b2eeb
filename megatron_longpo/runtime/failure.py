"""How a run ends when something fails: one line with the cause, printed once, and every process ends soon."""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import re
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from megatron_longpo.errors import LongPOError, one_line
from megatron_longpo.runtime.files import release_locks
from megatron_longpo.runtime.heartbeat import (
    answer_of,
    begin_failing,
    end_others,
    failed_key,
    own_store,
    ranks_behind,
    silent_ranks,
    whereabouts,
)
from megatron_longpo.runtime.launcher import end_with_launcher

_LINGER_SECONDS = 3.0
# As shells report it of programs that the signal ends.
_STATUS_OF_SIGPIPE = 141
_NAMED_RANKS = 8
# Whoever reports a time-out first listens for the heartbeats of all ranks.
_LINGER_SECONDS_AFTER_TIMEOUT = 15.0

# Errors of the operating system that a user can do something about.
_FIXES = {
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space within the quota",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or use another file system",
    errno.EROFS: "mount the file system writable, or choose another folder",
    errno.EACCES: "change its permissions or attributes, or choose another path",
    errno.EPERM: "change its permissions or attributes, or choose another path",
    errno.EIO: "check the disk or the network file system",
    errno.ESTALE: "check the network file system",
    errno.ENOENT: "restore it, and remove nothing that a running command uses",
    errno.ENOTDIR: "move the file away that stands where a folder belongs",
    errno.EISDIR: "move the folder away that stands where a file belongs",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "replace the symbolic link that points to itself",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "raise the system's limit on open files (fs.file-max)",
    errno.ENOMEM: "use fewer or shorter samples at a time, more ranks, or a machine with more memory",
}
_ERROR_NUMBER = re.compile(r"\[Errno (\d+)\]")
_NO_MEMORY = ("can't allocate memory", "Cannot allocate memory", "CUDA out of memory")
_WRITER_STOPPED = ("unexpected pos", "PytorchStreamWriter failed writing", "file write failed")
_OVERFLOWS = ("without overflow", "Overflow when unpacking")

_folder: Path | None = None
_memory_advice: Callable[[], str] | None = None


def keep_tracebacks_in(folder: Path) -> None:
    """Keep the traceback of a failure in this folder from now on, instead of a temporary file."""
    global _folder
    _folder = folder


def causes_of(error: BaseException) -> Iterator[BaseException]:
    """An error and its causes. torch.distributed.checkpoint keeps what its ranks raised in ``failures``."""
    current: BaseException | None = error
    seen: set[int] = set()
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        for failure, _ in getattr(current, "failures", {}).values():
            yield from causes_of(failure)
        current = current.__cause__ or current.__context__


def explain(error: BaseException, output: Path | None = None) -> str | None:
    """One line on an error from outside the package that a user can fix: the value, the rule and the fix.

    Args:
        error: error of the operating system or of a library, or one that has such a cause.
        output: path that is named where the error itself names none.

    Returns:
        The line, or None: the error is not one of these.
    """
    for cause in causes_of(error):
        if type(cause).__name__ == "CheckpointException":
            continue  # its text is the tracebacks of what it wraps
        if isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError":
            return _explain_memory(cause)
        if isinstance(cause, RuntimeError) and any(sign in str(cause) for sign in _NO_MEMORY):
            return _explain_memory(cause)
        if any(sign in str(cause) for sign in _WRITER_STOPPED):
            # torch's writer hides the operating system's error behind its own.
            where = f"{output or _folder or 'the output'}: "
            return (
                f"{where}a write failed ({one_line(cause, 160)}), as on a full disk or at a limit on file sizes; free space (df, "
                "quota, ulimit -f), then run the command again"
            )
        number = cause.errno if isinstance(cause, OSError) else None
        if number is None and (found := _ERROR_NUMBER.search(str(cause))):
            # A library's error that quotes one of the operating system.
            number = int(found[1])
        if number in _FIXES:
            path = getattr(cause, "filename", None) or output or _folder
            if isinstance(path, bytes):
                path = os.fsdecode(path)
            reason = os.strerror(number).lower()
            return (
                f"{path}: {reason}; {_FIXES[number]}, then run the command again"
                if path
                else f"{reason}; {_FIXES[number]}"
            )
    return None


def advise_on_memory(advice: Callable[[], str]) -> None:
    """Say what to do instead where memory is not enough: what ``advice`` returns, called then, is added to the error."""
    global _memory_advice
    _memory_advice = advice


def _explain_memory(cause: BaseException) -> str:
    line = (
        f"out of memory ({one_line(cause, 200) or type(cause).__name__}); use fewer or shorter samples at a time, recompute "
        "activations, use more ranks, or a machine with more memory"
    )
    if _memory_advice is not None:
        # Whatever keeps the advice from being found is not what the user has to know.
        with contextlib.suppress(Exception):
            line += f"; {_memory_advice()}"
    return line


def describe(error: BaseException) -> str:
    """One line on an error that nobody expected. Checkpoint errors are replaced by what they wrap."""
    inner = next((c for c in causes_of(error) if type(c).__name__ != "CheckpointException"), error)
    text = one_line(inner)
    if isinstance(inner, RecursionError):
        return "RecursionError: an input is nested too deeply; flatten the JSON, YAML or template that was read last"
    if isinstance(inner, OverflowError) or any(sign in text for sign in _OVERFLOWS):
        return f"{type(inner).__name__}: {text}; a number is out of range: check the configuration and the input"
    return f"{type(inner).__name__}: {text}"


def _write_traceback(error: BaseException) -> str:
    """Write the traceback to a file, and return its path; where no file can be written, print it."""
    rank = os.environ.get("RANK", "0")
    head = f"{datetime.datetime.now().astimezone().isoformat(timespec='seconds')}, rank {rank}: {' '.join(sys.argv)}\n"
    text = head + "".join(traceback.format_exception(error))
    folders = [_folder] if _folder is not None and _folder.is_dir() else []
    for folder in [*folders, None]:
        try:
            if folder is not None:
                path = folder / f"traceback_rank_{rank}.txt"
                path.write_text(text, encoding="utf-8", errors="replace")
                return str(path)
            descriptor, name = tempfile.mkstemp(prefix="megatron_longpo_traceback_", suffix=".txt")
            with open(descriptor, "w", encoding="utf-8", errors="replace") as stream:
                stream.write(text)
            return name
        except OSError:
            continue
    _print(text)
    return "above"


def _print(line: str) -> None:
    # The disk that is full may be the one that standard error goes to.
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def _first_to_fail() -> bool:
    """Whether this rank prints the cause: the first one to get here, or rank 0 if the ranks share no store."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    if not _has_store():
        return int(os.environ.get("RANK", "0")) == 0
    return answer_of(lambda: int(_store().add(failed_key(), 1)) == 1, True)


def _store() -> Any:
    # Not at the top: a command line that only prints its help should not wait for torch.
    import torch.distributed as dist

    if dist.is_initialized():
        # A connection of its own: the main thread of this process may wait on the other one.
        return own_store()
    # torchrun's own store, which exists before any process group: ranks that work separately may fail separately.
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10), wait_for_workers=False)


def _has_store() -> bool:
    """Whether the ranks share a store, their process group's or torchrun's, by which they know who failed first."""
    import torch.distributed as dist

    return dist.is_initialized() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def run_or_fail(action: Callable[[], None]) -> None:
    """Run the main function of a program. The exit status is 2 for an error that the user can fix, and 1 for any other.

    Only one rank prints its error, on one line; the traceback of an error that is not ours goes to a file that the line names.
    The process exits without waiting for peers that are blocked on it. A rank that prints nothing lingers a moment, since its
    exit makes the launcher stop the rank that is still printing. A rank whose launcher dies ends as well.
    """
    end_with_launcher()
    code, linger = 0, 0.0
    try:
        action()
    except LongPOError as error:
        begin_failing()
        code = 2
        if _first_to_fail():
            _print(f"error: {error}")
        else:
            linger = _LINGER_SECONDS
            if not _has_store() and os.environ.get("LOCAL_RANK") == "0":
                # On another node the cause may be another: its disk may lack a file that the first one has.
                _print(f"rank {os.environ.get('RANK')}: {error}")
    except KeyboardInterrupt:
        code = 130
    except SystemExit:
        release_locks()
        raise
    except BaseException as error:
        begin_failing()
        line = explain(error)
        code = 1 if line is None else 2
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            code = _STATUS_OF_SIGPIPE
        elif _first_to_fail():
            # The launcher ends the others as soon as one has ended, and it takes a moment to find out which.
            with contextlib.suppress(ValueError):
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            _print(f"error: {line or _line_on(error)} (traceback: {_write_traceback(error)})")
        else:
            # Whoever prints may have to listen for the others, or to ask for advice.
            is_slow = _is_timeout(str(error)) or _is_lost_peer(str(error))
            is_slow = is_slow or (line is not None and _memory_advice is not None)
            linger = _LINGER_SECONDS_AFTER_TIMEOUT if is_slow else _LINGER_SECONDS
    release_locks()
    if not code:
        if not _nobody_reads():
            sys.stdout.flush()
            return
        code = _STATUS_OF_SIGPIPE
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    # Only whoever has named the cause: others may have met it a moment before its name is printed.
    if not linger:
        end_others()
    time.sleep(linger)
    os._exit(code)


def _nobody_reads() -> bool:
    """Whether the reader of standard output has gone, as in ``... | head``."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), select.POLLOUT)
    except (OSError, ValueError):
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _line_on(error: BaseException) -> str:
    rank, text = os.environ.get("RANK", "0"), str(error)
    if _is_timeout(text):
        silent = silent_ranks()
        behind = [] if silent else ranks_behind()
        named = (silent or behind)[:_NAMED_RANKS]
        if silent:
            fix = f"see what that process or its machine is doing{_places(named)}"
        elif behind:
            fix = f"it is alive, but has not come as far as others: see what it waits for{_places(named)}"
        else:
            fix = "all ranks are alive: one of them may be slow"
        return (
            f"{f'rank {_listed(named)}' if named else 'a rank'} hangs: rank {rank} waited for longer than "
            f"distributed_timeout_minutes ({one_line(text, 160)}); {fix}, or raise distributed_timeout_minutes"
        )
    if _is_lost_peer(text):
        silent = silent_ranks()[:_NAMED_RANKS]
        if not silent:
            return (
                f"rank {rank} lost a peer process ({one_line(text)}); the launcher's report names the process that died"
            )
        return (
            f"rank {_listed(silent)} died{_places(silent)}: rank {rank} lost its connection ({one_line(text)}); rerun the "
            "command to resume"
        )
    return f"rank {rank} failed: {describe(error)}"


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def _places(ranks: Sequence[int]) -> str:
    return "".join(whereabouts(rank) for rank in ranks)


def _is_timeout(text: str) -> bool:
    return "Timed out waiting" in text or "timed out after" in text.lower()


def _is_lost_peer(text: str) -> bool:
    signs = ("Connection closed by peer", "Connection reset by peer", "NCCL error", "ncclRemoteError", "Broken pipe")
    return any(sign in text for sign in signs)
