"""What is known of each stage: a record in its folder, with fingerprints of what went in and of what came out."""

from __future__ import annotations

import glob
import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megatron_longpo.errors import DataError
from megatron_longpo.evolution.plan import Stage
from megatron_longpo.runtime.checked_json import read_checked, write_checked
from megatron_longpo.runtime.files import open_regular
from megatron_longpo.schema import convert_fields

State = Literal["running", "done", "failed"]
# Of a file, its size, its beginning and its end are compared: every format here has checksums of its own, which the command that
# reads it verifies, and a checkpoint of a terabyte should not be read once more only to see that it is the same one.
_COMPARED_BYTES = 2**16
_NAME = "record.json"


@dataclass(frozen=True)
class Record:
    """What happened to a stage.

    Attributes:
        state: running also for one that was killed.
        fingerprint: of the command, its settings and its inputs.
        settings: what the fingerprint was taken of, for messages.
        outputs: fingerprint of the outputs; empty until they are complete.
        seconds: time spent in all attempts.
        processes: processes that it ran on.
        attempts: number of starts.
        status: exit status of the last attempt; None while it runs.
    """

    state: State
    fingerprint: str
    settings: dict[str, Any]
    outputs: str
    seconds: float
    processes: int
    attempts: int
    status: int | None = None


def read_record(folder: Path) -> Record | None:
    """Record of the stage with this folder; None if it has not begun.

    Raises:
        DataError: it cannot be read.
    """
    path = folder / _NAME
    try:
        record = Record(**convert_fields(Record, read_checked(path), "", DataError))
        if not 0 <= record.seconds < math.inf or record.processes < 1 or record.attempts < 0:
            raise ValueError("a figure is out of its range")
        return record
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, DataError) as error:
        raise DataError(
            f"{path}: is not the record of a stage ({error}); restore it, or run the stage and those after it again with --redo"
        ) from None


def write_record(folder: Path, record: Record) -> None:
    """Write the record of a stage."""
    write_checked(folder / _NAME, asdict(record))


def settings_of(stage: Stage) -> dict[str, Any]:
    """What a stage's outputs depend on, besides the outputs of other stages."""
    # How many processes share the work changes no result.
    return json.loads(
        json.dumps(
            {
                "command": stage.command,
                "config": stage.config,
                "flags": stage.flags,
                "inputs": {str(path): fingerprint_of(path) for path in stage.inputs},
            }
        )
    )


def fingerprint(settings: dict[str, Any], before: Iterable[tuple[str, str]]) -> str:
    """Fingerprint of a stage's settings and of what the stages before it made.

    Args:
        settings: of ``settings_of``.
        before: (id, fingerprint of the outputs) of the stages before it.
    """
    return _digest(json.dumps([settings, sorted(before)], sort_keys=True))


def outputs_of(stage: Stage) -> str:
    """Fingerprint of what a stage made; empty if some of it is missing."""
    if not all(path.exists() for path in stage.outputs):
        return ""
    return _digest(json.dumps([fingerprint_of(path) for path in stage.outputs]))


def fingerprint_of(path: Path) -> str:
    """Fingerprint of a file, of the files of a folder, or of those that a pattern matches; empty for nothing."""
    if path.is_file():
        return _file(path)
    found = sorted(_files(path)) if path.is_dir() else sorted(Path(p) for p in glob.glob(str(path), recursive=True))
    return (
        _digest(json.dumps([[str(f.relative_to(path) if path.is_dir() else f), _file(f)] for f in found]))
        if found
        else ""
    )


def _files(folder: Path) -> Iterator[Path]:
    """Files of a folder. Names with a dot (locks) and logs are not outputs."""
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and path.is_file():
            yield path


def _file(path: Path) -> str:
    if not path.is_file():
        return "folder"
    with open_regular(path) as stream:
        size = path.stat().st_size
        content = stream.read(_COMPARED_BYTES)
        stream.seek(max(len(content), size - _COMPARED_BYTES))
        return f"{size}:{hashlib.sha256(content + stream.read(_COMPARED_BYTES)).hexdigest()[:32]}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def finished(record: Record, *, outputs: str, seconds: float, status: int) -> Record:
    """The record after an attempt.

    Args:
        record: of the attempt while it ran.
        outputs: fingerprint of the outputs; empty if they are not complete.
        seconds: time that the attempt took.
        status: its exit status.
    """
    state: State = "done" if status == 0 and outputs else "failed"
    return replace(record, state=state, outputs=outputs, seconds=record.seconds + seconds, status=status)
