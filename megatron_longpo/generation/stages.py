"""Stages of pair generation on disk: append-only files of JSON lines with manifests, in one folder per part of a run."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from megatron_longpo.errors import DataError
from megatron_longpo.runtime.files import open_regular, write_atomically
from megatron_longpo.runtime.json_lines import OWN_LINES, decode_line, encode_line
from megatron_longpo.runtime.reading import read_json
from megatron_longpo.runtime.reading import read_lines as bounded_lines

STAGES = ("documents", "questions", "short", "long")
_SCHEMA_VERSION = 1
# Lines between two syncs to the disk.
_SYNC_EVERY = 256
_BRIEF_CHARACTERS = 120
Line = dict[str, Any]


class DocumentLines(NamedTuple):
    """Lines of one document in all stages."""

    document: Line
    questions: Line
    short: Line
    long: Line


def work_folder(output: Path) -> Path:
    """Folder of a run's stages, beside its output."""
    return output.with_name(output.name + ".work")


def part_folder(output: Path, rank: int, world_size: int) -> Path:
    """Folder of one part of a run."""
    return work_folder(output) / f"part-{rank:02d}-of-{world_size:02d}"


def part_folders(output: Path) -> list[Path]:
    """Folders of the parts that exist, of whatever split."""
    return sorted(p for p in work_folder(output).glob("part-*") if re.fullmatch(r"part-\d+-of-\d+", p.name))


class Stage:
    """An append-only file of JSON lines with a manifest.

    Args:
        folder: folder of the part.
        name: name of the stage.
        identity: everything that determines the lines.

    Raises:
        DataError: the file was made with another identity, or is damaged.
    """

    def __init__(self, folder: Path, name: str, identity: dict[str, Any]) -> None:
        self.path = folder / f"{name}.jsonl"
        self.manifest_path = folder / f"{name}.manifest.json"
        # Through JSON, so that it compares equal to what is read back.
        self.name, self.identity = name, json.loads(json.dumps(identity))
        self.finished = False
        if self.manifest_path.exists():
            manifest = read_stage_manifest(self.manifest_path)
            self._check(manifest["identity"])
            self.finished = bool(manifest["finished"])
        else:
            self._write_manifest()
        self.records = 0 if not self.path.exists() else self._whole_lines()
        if self.finished and self.records != manifest.get("records"):
            raise DataError(
                f"{self.path}: has {self.records} lines, its manifest says {manifest.get('records')}; start again with "
                "--restart"
            )

    def _check(self, before: dict[str, Any]) -> None:
        for key in sorted({*before, *self.identity}):
            if before.get(key) != self.identity.get(key):
                raise DataError(
                    f"{self.path}: was made with {key}={brief(before.get(key))}, now it is {brief(self.identity.get(key))}; "
                    "use the old value to resume, another --output, or --restart to start again"
                )

    def _write_manifest(self) -> None:
        content = {
            "schema_version": _SCHEMA_VERSION,
            "stage": self.name,
            "finished": self.finished,
            "records": self.records if self.finished else None,
            "identity": self.identity,
        }
        write_atomically(self.manifest_path, json.dumps(content, indent=2).encode() + b"\n")

    def _whole_lines(self) -> int:
        """Number of whole lines; a partial last line that a kill left in an unfinished file is cut off."""
        count, end = 0, 0
        with open(self.path, "rb+") as stream:
            for raw in stream:
                if not raw.endswith(b"\n"):
                    break
                count, end = count + 1, end + len(raw)
            if not self.finished:
                stream.truncate(end)
        return count

    def __enter__(self) -> Stage:
        self._stream: BinaryIO = open(self.path, "ab", buffering=0)
        self._unsynced = 0
        return self

    def __exit__(self, *_: object) -> None:
        os.fsync(self._stream.fileno())
        self._stream.close()

    def append(self, lines: Sequence[Line]) -> None:
        """Add lines, in one write if the system takes them at once."""
        if not lines:
            return
        view = memoryview(b"".join(map(encode_line, lines)))
        while len(view):
            view = view[self._stream.write(view) :]
        self.records += len(lines)
        self._unsynced += len(lines)
        if self._unsynced >= _SYNC_EVERY:
            os.fsync(self._stream.fileno())
            self._unsynced = 0

    def drop_after(self, records: int) -> None:
        """Keep only the first ``records`` lines."""
        end = 0
        with open(self.path, "rb+") as stream:
            for raw in itertools.islice(stream, records):
                end += len(raw)
            stream.truncate(end)
        self.records = records

    def finish(self) -> None:
        """Record in the manifest that the stage is complete."""
        self.finished = True
        self._write_manifest()


def read_stage_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of a stage.

    Raises:
        DataError: it is damaged, or of another version.
    """
    try:
        content = read_json(path)
        if content["schema_version"] == _SCHEMA_VERSION and "identity" in content and "finished" in content:
            return dict(content)
        problem = f"has another schema version than {_SCHEMA_VERSION}, or lacks a key"
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"cannot be read ({error})"
    raise DataError(f"{path}: {problem}; start again with --restart")


def read_lines(path: Path, skip: int = 0) -> Iterator[Line]:
    """Lines of a stage from number ``skip`` on.

    Raises:
        DataError: a line is not a JSON object, or does not have its checksum.
    """
    try:
        stream = open_regular(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); start again with --restart") from None
    with stream:
        for number, line in enumerate(bounded_lines(stream, OWN_LINES)):
            if number < skip:
                continue
            try:
                if line.too_long:
                    raise ValueError(line.too_long)
                yield decode_line(line.raw)
            except ValueError as error:
                raise DataError(f"{path}: line {number + 1} is damaged ({error}); start again with --restart") from None


def brief(value: Any) -> str:
    """A value as JSON, shortened for a message."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _BRIEF_CHARACTERS else text[: _BRIEF_CHARACTERS - 3] + "..."
