"""The folder of a suite: settings, and answers that survive a kill.

    OUTPUT/SUITE/settings.json                         what the answers depend on; other values need another folder, while
                                                       additions (another task's questions, say) are merged in
    OUTPUT/SUITE/parts/RANK-of-WORLD/answers.jsonl     answers in the order they came
    OUTPUT/SUITE/samples.jsonl                         all answers in order, written when the last one is there
    OUTPUT/SUITE/asked.json                            their keys, by task and length

A restart may use more or fewer processes; answers found in any part are not computed again.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from megatron_longpo.errors import ConfigError, DataError
from megatron_longpo.evaluation.samples import AnswerRow, cell_name
from megatron_longpo.runtime.checked_json import read_checked, write_checked
from megatron_longpo.runtime.files import FolderLock, open_regular, write_atomically
from megatron_longpo.runtime.json_lines import OWN_LINES, decode_line, encode_line
from megatron_longpo.runtime.log import log
from megatron_longpo.runtime.reading import read_lines
from megatron_longpo.runtime.share import Share

# Waiting for other processes: when to give up on their folders, how often to look, how often to log.
_FOLDER_PATIENCE_SECONDS = 600.0
_FOLDER_POLL_SECONDS = 0.1
_FIRST_POLL_SECONDS, _LONGEST_POLL_SECONDS, _POLL_GROWTH = 0.2, 5.0, 1.5
_NOTICE_SECONDS = 60.0
_BLOCK_BYTES = 2**16
# Characters of a setting in an error message.
_BRIEF_CHARACTERS = 80


class SuiteFolder:
    """The open folder of a suite; this process holds its part until ``close``.

    Attributes:
        settings: settings of all answers in the folder, those of earlier runs on other tasks included.

    Args:
        folder: OUTPUT/SUITE.
        settings: what this run's answers depend on.
        share: this process's share of the samples.
        by_task: names of settings that hold a value per task or material, which later runs may add to.
        fractions: whether scores are fractions in [0, 1]; answers with others are damaged.
        restart: discard the answers that are there.

    Raises:
        ConfigError: the folder holds answers made with other settings, or ``restart`` with several processes.
        DataError: another process works on this part.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        share: Share,
        *,
        by_task: Collection[str] = (),
        fractions: bool = True,
        restart: bool = False,
    ) -> None:
        self.folder, self.share = folder, share
        self._fractions = fractions
        # Parts whose damage has been logged.
        self._noted: set[Path] = set()
        self.parts = folder / "parts"
        if restart:
            self._discard()
        self.parts.mkdir(parents=True, exist_ok=True)
        self.settings = self._merge_settings(settings, by_task)
        mine = self.parts / f"{share.rank}-of-{share.world_size}"
        mine.mkdir(exist_ok=True)
        self._lock = FolderLock(mine, record=True)
        self._path = mine / "answers.jsonl"
        _drop_torn_line(self._path)

    def _discard(self) -> None:
        if self.share.world_size > 1:
            raise ConfigError(
                f"--restart with {self.share.world_size} processes is not possible; remove {self.folder} and launch without it"
            )
        for part in self.parts.glob("*-of-*"):
            # Raises if a process is still working on it.
            FolderLock(part).release()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _merge_settings(self, settings: dict[str, Any], by_task: Collection[str]) -> dict[str, Any]:
        """Compare with the settings on disk, and write what is new."""
        path = self.folder / "settings.json"
        with FolderLock(self.folder, wait=True):
            # The first process writes them; the others are compared with it.
            before = settings_of(self.folder)
            merged, changed = _merged(before, json.loads(json.dumps(settings)), by_task)
            if before and changed:
                changes = "; ".join(f"{k} was {_brief(x)} and is {_brief(y)}" for k, (x, y) in changed.items())
                raise ConfigError(
                    f"{self.folder} holds answers made with other settings ({changes}); name another --output, or use --restart"
                )
            if merged != before:
                write_checked(path, merged)
        return merged

    def close(self) -> None:
        """Release this part."""
        self._lock.release()

    # ---------------------------------------------------------------------------------- rows

    def rows(self) -> Iterator[AnswerRow]:
        """Answers of all parts; damaged ones are left out, and so answered again."""
        for path in sorted(self.parts.glob("*/answers.jsonl")):
            damaged: list[str] = []
            yield from read_rows(path, fractions=self._fractions, damaged=damaged)
            if damaged and path not in self._noted:
                self._noted.add(path)
                log(f"{path}: {len(damaged)} damaged line(s) do not count and are answered again ({damaged[0]})")

    def answered(self) -> set[str]:
        """Keys that have an answer in any part."""
        return {row["key"] for row in self.rows()}

    def done(self) -> set[str]:
        """Keys that need no further answer. Those that an engine refused do: it may have more memory now."""
        return {row["key"] for row in self.rows() if not row.get("refused")}

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append answers to this part, on disk when this returns."""
        with open(self._path, "ab") as stream:
            stream.write(b"".join(map(encode_line, rows)))
            stream.flush()
            os.fsync(stream.fileno())

    def write_samples(self, keys: Sequence[str]) -> list[AnswerRow]:
        """Write ``samples.jsonl``: these answers, and those of other cells that earlier runs finished, in order.

        A cell is a task and a length. If a cell is asked again with fewer samples, only those count. A cell that was begun and
        never finished does not count.

        Args:
            keys: all keys of this run; each must have an answer.
        """
        path = self.folder / "asked.json"
        cells: dict[str, list[str]] = _read_object(path)
        if not all(
            isinstance(keys_, list) and all(isinstance(key, str) and cell_name(key) == name for key in keys_)
            for name, keys_ in cells.items()
        ):
            raise DataError(
                f"{path}: holds something other than keys by cell; remove it, or start again with --restart"
            )
        asked: dict[str, list[str]] = {}
        for key in keys:
            asked.setdefault(cell_name(key), []).append(key)
        cells |= asked
        write_checked(path, cells, indent=None)
        answers: dict[str, AnswerRow] = {}
        for row in self.rows():
            if row["key"] not in answers or not row.get("refused"):
                answers[row["key"]] = row
        unanswered = [key for keys_of_cell in cells.values() for key in keys_of_cell if key not in answers]
        if unanswered:
            raise DataError(
                f"{path}: names {len(unanswered)} samples without an answer ({unanswered[0]}, ...): an answer or this file is "
                "damaged; ask for the task and length again, or start again with --restart"
            )
        rows = [answers[key] for keys_of_cell in cells.values() for key in keys_of_cell]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomically(self.folder / "samples.jsonl", text.encode("utf-8", errors="replace"))
        return rows

    # ---------------------------------------------------------------------------------- other processes

    def wait_for_parts(self, patience: float = _FOLDER_PATIENCE_SECONDS) -> None:
        """Block until every process of this launch has created its folder.

        Args:
            patience: seconds to wait.

        Raises:
            DataError: some folders do not appear, as when nodes do not share the output folder: the processes would wait for
                each other forever.
        """
        if not self.share.together:
            return
        names = [f"{rank}-of-{self.share.world_size}" for rank in range(self.share.world_size)]
        began = noticed = time.monotonic()
        while missing := [n for n in names if not (self.parts / n).is_dir()]:
            if time.monotonic() - began > patience:
                raise DataError(
                    f"{self.parts}: {len(missing)} of {len(names)} processes have no folder there ({missing[0]}, ...) after "
                    f"{patience:.0f} s; name an --output that all nodes see"
                )
            if time.monotonic() - noticed > _NOTICE_SECONDS:
                noticed = time.monotonic()
                log(f"waiting for {len(missing)} processes to begin")
            time.sleep(_FOLDER_POLL_SECONDS)

    def wait_for_answers(self, keys: Sequence[str]) -> bool:
        """Whether all parts together answer all these keys.

        Processes of one launch block until they do; a process that fails makes its launcher end the others.

        Raises:
            DataError: there are no other parts, and answers are missing.
        """
        noticed, pause = time.monotonic(), _FIRST_POLL_SECONDS
        while missing := set(keys) - self.answered():
            if self.share.world_size == 1:
                raise DataError(
                    f"{self.folder}: {len(missing)} answers are missing ({min(missing)}, ...); rerun the same command"
                )
            if not self.share.together:
                log(
                    f"{self.folder}: {len(missing)} answers of other parts are missing; the last part writes the report"
                )
                return False
            if time.monotonic() - noticed > _NOTICE_SECONDS:
                noticed = time.monotonic()
                log(f"waiting for {len(missing)} answers of other processes")
            time.sleep(pause)
            pause = min(_LONGEST_POLL_SECONDS, _POLL_GROWTH * pause)
        return True


def read_rows(path: Path, *, fractions: bool = True, damaged: list[str] | None = None) -> Iterator[AnswerRow]:
    """Complete rows of a JSONL file of answers, skipping a line that is being written or was torn by a kill.

    Args:
        path: the file; it need not exist.
        fractions: whether a score is a fraction in [0, 1].
        damaged: list to which is added what is wrong with a line, for each that is skipped though it is complete.
    """
    if not path.exists():
        return
    with open_regular(path) as stream:
        for number, line in enumerate(read_lines(stream, OWN_LINES), 1):
            try:
                if line.too_long:
                    raise ValueError(line.too_long)
                row = decode_line(line.raw)
                _check_row(row, fractions)
                yield cast(AnswerRow, row)
            except ValueError as error:
                if line.raw.endswith(b"\n") and line.raw.strip() and damaged is not None:
                    damaged.append(f"line {number}: {error}")


def _check_row(row: Mapping[str, Any], fractions: bool) -> None:
    """Raise ValueError unless a row can be an answer."""
    if not isinstance(row.get("key"), str):
        raise ValueError("it has no key")
    score = row.get("score")
    if isinstance(score, bool) or not isinstance(score, (int, float)):
        raise ValueError("its score is not a number")
    if fractions and not 0 <= score <= 1:
        raise ValueError(f"its score {score} is not between 0 and 1")


def settings_of(folder: Path) -> dict[str, Any]:
    """Settings that a suite's folder was begun with; empty if it is new.

    Args:
        folder: OUTPUT/SUITE.

    Raises:
        DataError: they cannot be read.
    """
    return _read_object(folder / "settings.json")


def _read_object(path: Path) -> dict[str, Any]:
    """Content of one of the folder's JSON files; empty if there is none."""
    try:
        return read_checked(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); restore it, or start again with --restart") from None


def _drop_torn_line(path: Path) -> None:
    """Cut off a line that a kill left half-written."""
    if not path.exists():
        return
    with open(path, "r+b") as stream:
        size = end = stream.seek(0, os.SEEK_END)
        # From the end on, since the answers of many runs may be large.
        while end:
            start = max(0, end - _BLOCK_BYTES)
            stream.seek(start)
            newline = stream.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            stream.truncate(end)


def _merged(
    before: dict[str, Any], now: dict[str, Any], by_task: Collection[str]
) -> tuple[dict[str, Any], dict[str, tuple[Any, Any]]]:
    """Both settings merged, and what differs between them, name -> (before, now).

    In a setting of ``by_task``, a value that is missing or null on one side is taken from the other.
    """
    merged = {**before, **now}
    changed: dict[str, tuple[Any, Any]] = {}
    for name in merged:
        x, y = before.get(name), now.get(name)
        if name in by_task and isinstance(x, dict) and isinstance(y, dict):
            merged[name] = {k: x[k] if y.get(k) is None and k in x else y.get(k) for k in {**x, **y}}
            different = [k for k in x if x[k] is not None and y.get(k) is not None and x[k] != y[k]]
            changed |= {f"{name}.{k}": (x[k], y[k]) for k in different}
        elif x != y:
            changed[name] = (x, y)
    return merged, changed


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _BRIEF_CHARACTERS else text[: _BRIEF_CHARACTERS - 3] + "..."
