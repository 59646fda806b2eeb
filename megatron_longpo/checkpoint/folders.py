"""Where the checkpoints of a run are, and how far it was: megatron-core's torch_dist format, one folder per iteration.

    OUTPUT/iter_0000010/                     weights, optimizer, schedule, data position, RNG
        .metadata, *.distcp, common.pt       megatron-core's files
        model.json, run.yaml, hf/            shape, resolved configuration, tokenizer and config for export
        checksums.json                       sizes and hashes of all other files
        training.json                        steps, data and metrics, for the exported model's card
    OUTPUT/latest_checkpointed_iteration.txt
    OUTPUT/best.json                         the best one by a held-out metric

A checkpoint is written to a folder with another name, which is renamed when every rank is done, so a run that is killed at any
moment finds the last complete one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from megatron_longpo.checkpoint.checksums import CHECKSUMS, Damage, log_once, quick_damage
from megatron_longpo.checkpoint.remote import BEST, BEST_NAME, fetch
from megatron_longpo.config import is_url
from megatron_longpo.errors import CheckpointError, DamagedError, one_line
from megatron_longpo.model.shape import FILE_NAME
from megatron_longpo.runtime.checked_json import read_checked
from megatron_longpo.runtime.collectives import all_gather_objects

Item = TypeVar("Item")

LATEST = "latest_checkpointed_iteration.txt"
ASSETS = "hf"


@dataclass(frozen=True)
class RunProgress:
    """How far a run was when it saved a checkpoint.

    Attributes:
        step: optimizer steps done.
        layout: parallel layout that it was saved with.
        train_iters: optimizer steps of the whole run.
        identity: settings that must not change within the run, by name.
        guard: what the rule for skipped steps goes by; empty in a run that began before there was one.
    """

    step: int
    layout: str
    train_iters: int
    identity: dict[str, Any]
    guard: dict[str, Any] = field(default_factory=dict)


_TYPES_OF_PROGRESS = {"step": int, "layout": str, "train_iters": int, "identity": dict, "guard": dict}


def folder_of(output: Path, step: int) -> Path:
    """Folder of the checkpoint of a step."""
    return output / f"iter_{step:07d}"


def latest_step(output: Path) -> int | None:
    """Step of the newest complete checkpoint of a run, or None.

    The tracker file is written after the folder has its final name. If a kill came in between, the folder counts.
    """
    steps = whole_steps(output)
    return steps[-1] if steps else None


def whole_steps(output: Path) -> list[int]:
    """Steps of a run's complete checkpoints, ascending."""
    steps = []
    for folder in output.glob("iter_*"):
        number = folder.name.removeprefix("iter_")
        if number.isdigit() and (folder / "metadata.json").is_file():
            steps.append(int(number))
    return sorted(steps)


def passed_over(output: Path) -> list[str]:
    """Why newer checkpoints than the newest whole one do not count, a line each."""
    newest = latest_step(output) or -1
    lines = []
    for folder in sorted(output.glob("iter_*")):
        number = folder.name.removeprefix("iter_")
        if number.isdigit() and int(number) > newest:
            lines.append(f"{folder}: has no metadata.json, so it is incomplete and is passed over")
    named = ""
    with contextlib.suppress(OSError, ValueError):
        named = (output / LATEST).read_text(encoding="utf-8").strip()
    if named.isascii() and named.isdigit() and len(named) < 20:
        folder = folder_of(output, int(named))
        if int(named) > newest and not folder.exists():
            lines.append(f"{output / LATEST}: names step {named}, but {folder.name} is not there")
    return lines


def _best_of(output: Path) -> Path:
    """Folder of a run's best checkpoint.

    Raises:
        CheckpointError: the run has none, or its folder is not there.
    """
    try:
        folder = folder_of(output, int(read_checked(output / BEST)["step"]))
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(
            f"{output / BEST}: cannot be read ({one_line(error)}); name an iter_* folder, or train with --save-best"
        ) from None
    if not folder.is_dir():
        raise CheckpointError(
            f"{output / BEST}: names {folder.name}, which is not there; name another checkpoint of the run"
        )
    return folder


def resolve(path: str | Path, *, name: str = "load", weights: bool = True) -> Path:
    """The checkpoint folder that ``--load`` refers to: a converted checkpoint, one iteration, the newest good one of a run, or
    OUTPUT/best for its best one. What a URL names is brought here first (``remote.fetch``).

    Newer ones of the run that are passed over are logged. Large files are not read here; ``checksums.verified`` does that.

    Args:
        path: a path or a URL.
        name: setting that it comes from, for messages.
        weights: whether the weights are needed; without them less of a URL's checkpoint is brought here.

    Raises:
        DamagedError: the checkpoint, or every one of the run, is damaged.
        CheckpointError: there is none.
    """
    if is_url(path):
        return fetch(str(path), name=name, weights=weights)
    path = Path(path)
    if path.name == BEST_NAME and not path.exists() and (path.parent / BEST).is_file():
        path = _best_of(path.parent)
    if (path / CHECKSUMS).is_file() and (damage := quick_damage(path)) is not None:
        raise damage.error()
    if (path / FILE_NAME).is_file() and (path / ".metadata").is_file():
        return path
    if path.is_dir():
        incomplete = passed_over(path)
        for line in incomplete:
            log_once(line)
        damages: list[Damage] = []
        for step in reversed(whole_steps(path)):
            folder = folder_of(path, step)
            damage = _FOUND.get(folder) or quick_damage(folder)
            if damage is None:
                for found in damages:
                    log_once(f"{found.path}: {found.reason}, so that checkpoint is passed over; {folder} is used")
                return folder
            damages.append(damage)
        if damages:
            raise damages[0].error()
        if incomplete:
            raise CheckpointError(
                f"{incomplete[-1]}; no older checkpoint of the run is whole, so use another, or start again"
            )
        raise CheckpointError(
            f"{path}: holds neither a converted checkpoint ({FILE_NAME}) nor a run's iter_* folders; convert a Hugging "
            "Face model with tools/convert_checkpoint.py import --hf DIR --output CKPT"
        )
    raise CheckpointError(f"{path}: there is no such folder; name a converted checkpoint or the output folder of a run")


def is_one_of_several(path: str | Path, folder: Path) -> bool:
    """Whether a run's folder holds older checkpoints than the one that ``resolve`` chose, which could be used instead of it."""
    steps = [] if folder == Path(path) or Path(path).name == BEST_NAME else whole_steps(Path(path))
    return any(folder_of(Path(path), step) < folder for step in steps)


# Checkpoints of runs that were found damaged while they were read, in this process.
_FOUND: dict[Path, Damage] = {}


def from_newest_good(path: str | Path, action: Callable[[Path], Item]) -> Item:
    """Do something with the checkpoint that a path refers to; if it proves to be damaged, with the one before it. Collective.

    Args:
        path: what ``resolve`` takes. Only of a run's folder is there another checkpoint.
        action: called with the checkpoint's folder; after it raised, it may be called again with an older one.

    Raises:
        CheckpointError: what the action raised with the only checkpoint, or with the first of several that are all damaged.
    """
    if is_url(path):
        # Every file of it has been compared with its checksum.
        path = resolve(path, name="checkpoint")
    while True:
        folder = resolve(path)
        try:
            return action(folder)
        except CheckpointError as error:
            if folder == Path(path):
                raise
            # What one rank finds, the others may not have met.
            if not any(all_gather_objects(isinstance(error, DamagedError))):
                raise
            _FOUND[folder] = Damage(folder, f"is damaged ({error})", is_state=True)


def read_progress(folder: Path) -> RunProgress:
    """How far the run was that saved a checkpoint.

    Raises:
        DamagedError: it cannot be read, or a file that the run needs to resume is missing, cut or, if small, different.
        CheckpointError: it holds only weights.
    """
    damage = quick_damage(folder, state_only=True)
    if damage is not None:
        raise damage.error()
    try:
        common = dist_checkpointing.load_common_state_dict(str(folder))
    except (Exception, CheckpointException) as error:
        raise DamagedError(
            f"{folder}: cannot be read ({type(error).__name__}: {one_line(error)}); remove the folder to resume from "
            "the previous one"
        ) from None
    if "scheduler" not in common:
        raise CheckpointError(
            f"{folder}: was saved with no_save_optim and cannot be resumed; use --load {folder} to start a new run from it"
        )
    try:
        progress = RunProgress(**common["progress"])
    except (KeyError, TypeError) as error:
        raise DamagedError(
            f"{folder}: has no record of its progress ({one_line(error)}); use another checkpoint"
        ) from None
    for name, kind in _TYPES_OF_PROGRESS.items():
        value = getattr(progress, name)
        # A bool is an int in Python.
        if type(value) is not kind or (isinstance(value, int) and value < 0):
            raise DamagedError(
                f"{folder}: has no record of its progress ({name} is {str(value)[:40]!r}); use another checkpoint"
            )
    return progress
