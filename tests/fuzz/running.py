"""Runs inputs in children that have their imports from their parent, and watches them."""

from __future__ import annotations

import contextlib
import faulthandler
import fnmatch
import hashlib
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.fuzz.mutations import CANARY, OUTSIDE, change_file
from tests.fuzz.readers import Reader, files_of
from tests.support import forked

MOST_SECONDS = 60.0
MOST_BYTES = 2 * 10**9
# What a process has mapped, but not filled, beyond its memory: arenas, threads' stacks.
_MAPPED_BYTES = 2**30
_POLL_SECONDS = 0.05
_MESSAGE_CHARACTERS = 2000

# What an input must not make the process do. Starting processes and connecting is left to those readers that do so anyway.
_FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.startfile",
    "subprocess.Popen",
    "pty.spawn",
    "ctypes.dlopen",
)


@dataclass(frozen=True)
class Outcome:
    """What became of an input.

    Attributes:
        number: number of the input.
        kind: read, refused, or what is wrong.
        detail: the error's message or traceback.
        where: what tells this finding from others.
        seconds: time that it took, without that in which its main thread waited for a processor.
        bytes: memory that the process had at most.
    """

    number: int
    kind: str
    detail: str = ""
    where: str = ""
    seconds: float = 0.0
    bytes: int = 0

    @property
    def is_finding(self) -> bool:
        return self.kind not in ("read", "refused", "same")


@dataclass(frozen=True)
class Input:
    """Files that replace the valid ones.

    Attributes:
        files: name -> content.
        is_damage: whether bits were flipped, and nothing was done on purpose.
        is_mended: whether checksums are made to fit.
    """

    files: dict[str, bytes]
    is_damage: bool = False
    is_mended: bool = False


def make_input(reader: Reader, valid: Path, number: int, made: Sequence[Any]) -> Input:
    """The input of a number: the same each time."""
    rng = random.Random(f"{reader.name} {number}")
    names = files_of(reader, valid)
    name = rng.choice(names)
    content, is_damage = change_file(rng, name, (valid / name).read_bytes(), made)
    files = {name: content}
    if not is_damage and rng.random() < 0.1:
        other = rng.choice(names)
        files[other], _ = change_file(rng, other, files.get(other, (valid / other).read_bytes()), made)
    return Input(files, is_damage, is_mended=not is_damage and reader.mend is not None and rng.random() < 0.7)


def read_input(reader: Reader, valid: Path, changed: Input, folder: Path) -> Any:
    """Lay out an input in a new folder and read it."""
    if folder.exists():
        shutil.rmtree(folder)
    shutil.copytree(valid, folder)
    for name, content in changed.files.items():
        (folder / name).write_bytes(content)
    if changed.is_mended and reader.mend is not None:
        reader.mend(folder)
    return reader.read(folder)


# --------------------------------------------------------------------------------------------------
# In the child
# --------------------------------------------------------------------------------------------------


class _Watch:
    """Notes what the process does that no input may make it do."""

    def __init__(self, folder: Path) -> None:
        self.seen: list[str] = []
        self._folder = str(folder)
        self._active = False
        sys.addaudithook(self._hook)

    def __enter__(self) -> _Watch:
        self.seen.clear()
        self._active = True
        return self

    def __exit__(self, *_: object) -> None:
        self._active = False

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._active:
            return
        if event.startswith(_FORBIDDEN):
            self.seen.append(f"{event} {arguments!r:.200}")
        elif event in ("open", "os.mkdir") and isinstance(arguments[0], str | bytes):
            path = os.fsdecode(arguments[0])
            if OUTSIDE in path or CANARY in path:
                self.seen.append(f"{event} {path}")
        elif event == "import" and isinstance(arguments[1], str) and self._folder in arguments[1]:
            self.seen.append(f"import {arguments[0]}")
        elif (
            event == "socket.connect"
            and isinstance(arguments[1], tuple)
            and arguments[1][0] not in ("127.0.0.1", "::1", "localhost")
        ):
            self.seen.append(f"{event} {arguments[1]!r:.100}")


def _peak_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _place(error: BaseException) -> str:
    """The innermost function of the package in a traceback, and the kind of the error."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/megatron_longpo/" in frame.filename] or frames[-1:]
    last = ours[-1]
    return f"{type(error).__name__} in {Path(last.filename).name}:{last.name}"


def _judge(reader: Reader, act: Callable[[], Any], watch: _Watch) -> tuple[str, str, str, Any]:
    """(kind, detail, where, value) of reading an input."""
    from megatron_longpo.errors import LongPOError
    from megatron_longpo.runtime.failure import explain

    value: Any = None
    kind, detail, where = "read", "", ""
    try:
        with watch:
            value = act()
    except LongPOError as error:
        message = str(error)
        kind, detail = "refused", message[:300]
        if not message or any(c in message for c in "\n\r\x1b\0") or len(message) > _MESSAGE_CHARACTERS:
            kind, where = "message", f"{_place(error)}"
            detail = f"{len(message)} characters: {message[:600]!r}\n{traceback.format_exc()[-3000:]}"
    except SystemExit:
        kind = "refused"
    except BaseException as error:
        line = explain(error) if reader.explained and not isinstance(error, MemoryError) else None
        kind, detail = "refused", line or ""
        if line is None:
            kind, detail, where = "traceback", traceback.format_exc()[-6000:], _place(error)
    if watch.seen or os.path.exists(CANARY):
        kind, detail, where = "code", "; ".join(watch.seen) or "the canary was made", "code"
        if os.path.isdir(CANARY):
            os.rmdir(CANARY)
    return kind, detail, where, value


def _child(
    reader: Reader, valid: Path, work: Path, inputs: Sequence[tuple[int, Input]], expected: str | None, out: int
) -> None:
    os.setsid()
    forked.fork_results_queue()
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    trace = open(work / "trace", "w", encoding="utf-8")  # noqa: SIM115
    faulthandler.enable(trace)
    faulthandler.register(signal.SIGUSR1, trace)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + MOST_BYTES + _MAPPED_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ.update(
        HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OPENAI_API_KEY="sk-fuzz-0123456789abcdef", HOME=str(work)
    )
    os.chdir(work)
    watch = _Watch(work / "input")
    for number, changed in inputs:
        os.write(out, json.dumps({"begin": number}).encode() + b"\n")
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        began = _undelayed(os.getpid())
        kind, detail, where, value = _judge(
            reader, lambda c=changed: read_input(reader, valid, c, work / "input"), watch
        )  # type: ignore[misc]
        seconds = _undelayed(os.getpid()) - began
        if kind == "read" and expected is not None and changed.is_damage and _is_checked(reader, changed):
            if _digest(value) != expected:
                kind, where = "silent", f"{sorted(changed.files)}"
                detail = f"damage of {sorted(changed.files)} was not found: {value!r:.500}"
            else:
                kind = "same"
        outcome = Outcome(number, kind, detail, where, seconds, _peak_bytes())
        os.write(out, json.dumps(asdict(outcome)).encode() + b"\n")


def _is_checked(reader: Reader, changed: Input) -> bool:
    return all(any(fnmatch.fnmatch(name, pattern) for pattern in reader.checked) for name in changed.files)


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode("utf-8", "replace")).hexdigest()


# --------------------------------------------------------------------------------------------------
# In the parent
# --------------------------------------------------------------------------------------------------


def in_child(action: Callable[[], None]) -> None:
    """Run something in a child, so that this process stays as it is. Raises RuntimeError if it fails."""
    child = os.fork()
    if child == 0:
        os.setsid()
        forked.fork_results_queue()
        try:
            action()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    _signal(child, signal.SIGKILL, group=True)
    if status:
        raise RuntimeError("a child failed; its traceback is above")


def make_valid(reader: Reader, folder: Path) -> Path:
    """The valid files of a reader, made once; and the digest of what is read of them."""
    valid = folder / reader.name / "valid"
    if not (folder / reader.name / "digest").exists():
        shutil.rmtree(folder / reader.name, ignore_errors=True)
        valid.mkdir(parents=True)

        from megatron_longpo.errors import LongPOError

        def make() -> None:
            os.environ.update(HF_HUB_OFFLINE="1")
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 1)
            reader.make(valid)

        def read() -> None:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 1)
            value = None
            with contextlib.nullcontext() if reader.checked else contextlib.suppress(LongPOError):
                value = read_input(reader, valid, Input({}), folder / reader.name / "work" / "input")
            (folder / reader.name / "digest").write_text(_digest(value))

        in_child(make)
        in_child(read)
    return valid


def run_inputs(reader: Reader, folder: Path, inputs: Sequence[tuple[int, Input]]) -> Iterator[Outcome]:
    """Outcomes of inputs, read in one child, or in another after one that dies.

    Args:
        reader: their reader.
        folder: folder of valid files and of work.
        inputs: numbers and inputs.
    """
    valid, work = folder / reader.name / "valid", folder / reader.name / "work"
    work.mkdir(parents=True, exist_ok=True)
    expected = (folder / reader.name / "digest").read_text() if reader.checked else None
    left = list(inputs)
    while left:
        batch = left[: reader.batch]
        done = 0
        for outcome in _run_batch(reader, valid, work, batch, expected):
            done += 1
            yield outcome
        left = left[max(done, 1) :]


def _run_batch(
    reader: Reader, valid: Path, work: Path, batch: Sequence[tuple[int, Input]], expected: str | None
) -> Iterator[Outcome]:
    incoming, outgoing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(incoming)
            _child(reader, valid, work, batch, expected, outgoing)
            status = 0
        except BaseException:
            os.write(outgoing, json.dumps({"broken": traceback.format_exc()[-3000:]}).encode() + b"\n")
        finally:
            os._exit(status)
    os.close(outgoing)
    text, begun, began, peak, broken = b"", None, _undelayed(child), 0, ""
    killed, passed = "", 0.0
    base, status = _resident(os.getpid()), None
    while True:
        ready, _, _ = select.select([incoming], [], [], 0 if status is not None else _POLL_SECONDS)
        piece = os.read(incoming, 2**16) if ready else None
        # What it started may hold the pipe open.
        if piece == b"" or (piece is None and status is not None):
            break
        if status is None and (ended := os.waitpid(child, os.WNOHANG))[0]:
            status = os.waitstatus_to_exitcode(ended[1])
        text += piece or b""
        *lines, text = text.split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "begin" in message:
                begun, began, peak = message["begin"], _undelayed(child), 0
            elif "broken" in message:
                broken = message["broken"]
            else:
                outcome = Outcome(**message)
                begun = None
                if outcome.bytes - base > MOST_BYTES:
                    outcome = Outcome(**{**message, "kind": "memory", "where": "memory"})
                elif outcome.seconds > MOST_SECONDS:
                    outcome = Outcome(**{**message, "kind": "time", "where": "time"})
                yield outcome
        peak = max(peak, _resident(child))
        if begun is not None and not killed and status is None:
            passed = _undelayed(child) - began
            if passed > MOST_SECONDS:
                killed = "time"
            elif peak - base > MOST_BYTES:
                killed = "memory"
            if killed:
                _signal(child, signal.SIGUSR1)
                time.sleep(0.5)
                _signal(child, signal.SIGKILL)
    os.close(incoming)
    _signal(child, signal.SIGKILL, group=True)
    if status is None:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if begun is not None:
        stack = (work / "trace").read_text(errors="replace")[-4000:]
        kind = killed or "death"
        frame = next((line.strip() for line in stack.splitlines() if "/megatron_longpo/" in line), "")
        yield Outcome(begun, kind, f"exit status {status} {broken}\n{stack}", f"{kind} {frame}", passed, peak)


def _undelayed(process: int) -> float:
    """A clock that stands still while a process's main thread could run but has no processor: other work on the machine is not
    its fault."""
    waited = 0
    # A process that has ended is asked nothing more.
    with contextlib.suppress(OSError):
        waited = int(Path(f"/proc/{process}/schedstat").read_text().split()[1])
    return time.monotonic() - waited / 1e9


def _signal(child: int, number: int, *, group: bool = False) -> None:
    with contextlib.suppress(ProcessLookupError):
        (os.killpg if group else os.kill)(child, number)


def _resident(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0
