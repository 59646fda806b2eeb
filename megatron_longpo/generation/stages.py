"""Stages of pair generation on disk: append-only files of JSON lines with manifests, in one folder per part of a run."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from megatron_longpo.config import from_yaml
from megatron_longpo.errors import DataError
from megatron_longpo.generation.settings import GenerationConfig
from megatron_longpo.runtime.checked_json import read_checked, write_checked
from megatron_longpo.runtime.files import open_regular, write_atomically
from megatron_longpo.runtime.json_lines import OWN_LINES, decode_line, encode_line
from megatron_longpo.runtime.reading import read_bytes
from megatron_longpo.runtime.reading import read_lines as bounded_lines

STAGES = ("documents", "questions", "short", "long")
_SCHEMA_VERSION = 1
_CONFIG = "run.yaml"
_CONFIG_CHECKSUM = "# SHA-256 of the lines above: "
# Lines between two syncs to the disk.
_SYNC_EVERY = 256
_BRIEF_CHARACTERS = 120
# Larger counts are damage.
_MOST = 2**53
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


def write_config(output: Path, config: GenerationConfig) -> None:
    """Write the configuration of a run for ``merge``; its last line is the checksum of the others."""
    text = config.as_yaml()
    content = f"{text}{_CONFIG_CHECKSUM}{hashlib.sha256(text.encode()).hexdigest()}\n"
    write_atomically(work_folder(output) / _CONFIG, content.encode())


def read_config(output: Path) -> GenerationConfig:
    """The configuration of a run.

    Raises:
        DataError: it is damaged.
        ConfigError: it is missing, or not one of this version.
    """
    path = work_folder(output) / _CONFIG
    try:
        text, mark, checksum = read_bytes(path).decode("utf-8", errors="replace").rpartition(_CONFIG_CHECKSUM)
        # Version 0.1.0 wrote none.
        if mark and hashlib.sha256(text.encode()).hexdigest() != checksum.strip():
            raise DataError(
                f"{path}: its checksum differs, so it was changed or damaged; run the parts again, which only write it anew"
            )
    except OSError:
        pass
    return from_yaml(path, GenerationConfig)


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
        write_checked(self.manifest_path, content)

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
        content = read_checked(path)
        is_whole = isinstance(content["identity"], dict) and type(content["finished"]) is bool
        if content["schema_version"] == _SCHEMA_VERSION and is_whole:
            return content
        problem = f"has another schema version than {_SCHEMA_VERSION}, or a key is damaged"
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


def joined(paths: Sequence[Path]) -> Iterator[tuple[Line, ...]]:
    """Lines of the first stages of a part, side by side.

    Args:
        paths: files of the stages, documents first; the others have a line for each of its lines.

    Raises:
        DataError: a line is damaged, is not what its stage writes, or does not fit those beside it.
    """
    readers = [read_lines(path) for path in paths]
    for number, lines in enumerate(itertools.zip_longest(*readers), 1):
        problem = _misfit(lines)
        if problem is not None:
            raise DataError(f"{paths[0].parent}: line {number} {problem}; start again with --restart")
        yield lines


def _misfit(lines: Sequence[Line | None]) -> str | None:
    """What is wrong with the lines of one document in the first stages, or None."""
    document, *others = lines
    if document is None:
        return f"is missing in {STAGES[0]}"
    for name, line in zip(STAGES, lines, strict=False):
        if line is None:
            return f"is missing in {name}"
        if problem := _document_problem(line) if name == "documents" else _turns_problem(line, name):
            return f"of {name} {problem}"
    chunks = len(document.get("chunks", ()))
    for line in others:
        assert line is not None
        if (line["number"], line["part"]) != (document["number"], document["part"]) or len(line["turns"]) != chunks:
            return "belongs to different documents"
    return None


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST


def _document_problem(line: Line) -> str | None:
    if not all(_is_count(line.get(key)) for key in ("number", "part")) or not _is_count(line.get("broken", 0)):
        return "has no number of its document"
    if not isinstance(line.get("name"), str):
        return "has no name"
    if "reason" in line:
        chunks = line.get("chunks", ())
        return None if isinstance(line["reason"], str) and chunks in ((), []) else "has a reason that is no text"
    text, chunks = line.get("text"), line.get("chunks")
    if not all(isinstance(line.get(key), str) for key in ("id", "text", "domain")) or not _is_count(line.get("tokens")):
        return "has no text"
    assert isinstance(text, str)
    if not isinstance(chunks, list) or not all(
        isinstance(chunk, list) and len(chunk) == 3 and all(map(_is_count, chunk)) and chunk[0] <= chunk[1] <= len(text)
        for chunk in chunks
    ):
        return "has chunks outside of its text"
    return None


# Keys of a turn that an engine has answered, by stage: texts, and counts.
_TURN_KEYS = {
    "questions": (("question", "instruction"), ()),
    "short": (("text",), ("prompt_tokens", "new_tokens")),
    "long": (("text",), ("prompt_tokens", "new_tokens")),
}


def _turns_problem(line: Line, stage: str) -> str | None:
    seconds = line.get("seconds")
    if not all(_is_count(line.get(key)) for key in ("number", "part", "prompt_tokens", "new_tokens")):
        return "has no counts"
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < _MOST:
        return "has no seconds"
    texts, counts = _TURN_KEYS[stage]
    turns = line.get("turns")
    if not isinstance(turns, list):
        return "has no turns"
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("reason", ""), str):
            return "has a turn that is none"
        if not isinstance(turn.get("detail", ""), str):
            return "has a turn with a reason that is no text"
        if "reason" not in turn and not (
            all(isinstance(turn.get(key), str) for key in texts) and all(_is_count(turn.get(key)) for key in counts)
        ):
            return "has a turn without its text"
    return None


def brief(value: Any) -> str:
    """A value as JSON, shortened for a message."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _BRIEF_CHARACTERS else text[: _BRIEF_CHARACTERS - 3] + "..."
