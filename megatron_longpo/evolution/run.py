"""Runs the stages of all rounds, here and one after the other; each is skipped if it is done, and resumed if it broke off."""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from megatron_longpo.errors import ConfigError, DataError, LongPOError, one_line
from megatron_longpo.evolution.gate import decide, describe, origin_of, read_gate, write_gate
from megatron_longpo.evolution.plan import Planner, Stage
from megatron_longpo.evolution.records import (
    Record,
    fingerprint,
    finished,
    outputs_of,
    read_record,
    settings_of,
    write_record,
)
from megatron_longpo.evolution.settings import GateRule
from megatron_longpo.evolution.split import split_pairs
from megatron_longpo.runtime.checked_json import read_checked, write_checked
from megatron_longpo.runtime.files import FolderLock, write_atomically
from megatron_longpo.runtime.launcher import terminate_with_parent
from megatron_longpo.runtime.log import log
from megatron_longpo.runtime.status import read_status, silent_seconds
from megatron_longpo.schema import convert_fields

_PACKAGE_ROOT = Path(__file__).resolve().parents[2]
# Between SIGTERM and SIGKILL of a stage; a checkpoint may be under way.
_GRACE_SECONDS = 120.0
# Slurm's signals reach every process of a step. The ranks know SIGUSR1, and save; torchrun would be ended by it, and they with
# it.
_WITHOUT_USR1 = ("bash", "-c", 'trap "" USR1; exec "$@"', "longpo")
_TAIL_LINES = 5
_TAIL_BYTES = 4096


class Failed(LongPOError):
    """A stage ended with an error."""


class Interrupted(Failed):
    """A stage was broken off and goes on when it is run again, with nothing to be changed."""


def run_rounds(planner: Planner) -> None:
    """Run every stage that is not done, round by round, until a gate says stop.

    Raises:
        LongPOError: a stage failed, was done with other settings, or lacks what an earlier one made.
    """
    planner.check()
    _check_no_earlier_settings(planner)
    rounds = planner.evolution.rounds
    for index, round_ in enumerate(rounds):
        origin = origin_of(planner, index)
        if origin is None:
            before = rounds[index - 1].name
            raise DataError(
                f"{planner.folder(before).gate}: is gone, although its stage is done; restore it, or use --redo {before}/gate"
            )
        stages = planner.stages(round_, origin)
        for number, stage in enumerate(stages, start=1):
            _run(planner, stage, f"{stage.id} ({number} of {len(stages)})")
        if read_gate(planner.folder(round_.name).gate) == "stop":
            left = len(rounds) - index - 1
            log(f"the gate of {round_.name} says stop; {left} round(s) are not run")
            return
    log(f"{planner.evolution.output}: all {len(rounds)} rounds are done")


def run_stage(planner: Planner, stage_id: str) -> None:
    """Run one stage, whose predecessors must be done; what a job of a cluster does.

    Raises:
        LongPOError: there is no such stage, or as for ``run_rounds``.
    """
    stage = find_stage(planner, stage_id)
    _run(planner, stage, stage.id)


def run_part(planner: Planner, stage_id: str) -> None:
    """Do this Slurm array task's part of a stage.

    Raises:
        LongPOError: as for ``run_stage``, or this is no task of an array.
    """
    stage = find_stage(planner, stage_id)
    if "SLURM_ARRAY_TASK_ID" not in os.environ:
        raise ConfigError(f"{stage_id}: --part is for the tasks of a Slurm array, and this is none; leave it out")
    part = int(os.environ["SLURM_ARRAY_TASK_ID"])
    stage.folder.mkdir(parents=True, exist_ok=True)
    _check_ready(planner, stage)
    command = command_of(stage)
    if stage.kind != "generate":
        # Generation takes its part from Slurm's variables, an evaluation from flags.
        command += ["--rank", str(part), "--world-size", str(stage.resources.array)]
    log(f"$ {shlex.join(command)}")
    began = time.monotonic()
    status = _tee(command, stage.folder / f"log-part-{part}.txt", environment(stage))
    if status:
        raise Failed(f"{stage_id}: part {part} ended with status {status}; submit again to resume")
    write_checked(stage.folder / f"part-{part}.json", {"seconds": time.monotonic() - began})


def finish_parts(planner: Planner, stage_id: str) -> None:
    """Put the parts of a stage together, after its array.

    Raises:
        LongPOError: as for ``run_stage``.
    """
    stage = find_stage(planner, stage_id)
    paths = [stage.folder / f"part-{part}.json" for part in range(stage.resources.array)]
    missing = [path.stem for path in paths if not path.exists()]
    if missing:
        raise DataError(f"{stage_id}: {', '.join(missing)} did not finish; submit again")
    spent = max(map(_seconds_of, paths))
    _run(planner, stage, f"{stage.id}: its {len(paths)} parts", parts_seconds=spent)


def _seconds_of(path: Path) -> float:
    """Time that a part took.

    Raises:
        DataError: its record cannot be read.
    """
    try:
        seconds = float(read_checked(path)["seconds"])
        if not 0 <= seconds < math.inf:
            raise ValueError(f"seconds={seconds}")
        return seconds
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise DataError(
            f"{path}: is not the record of a part ({one_line(error)}); remove it, and submit again"
        ) from None


def find_stage(planner: Planner, stage_id: str) -> Stage:
    """A stage by its id, ``ROUND/STAGE``.

    Raises:
        ConfigError: there is none, or an earlier round's gate has not decided or said stop.
    """
    round_name = stage_id.split("/")[0]
    round_ = planner.evolution.round(round_name)
    origin = origin_of(planner, planner.evolution.rounds.index(round_))
    if origin is None:
        raise ConfigError(
            f"{stage_id}: the gate of an earlier round has not said go on, so this round has no model to begin with"
        )
    stages = planner.stages(round_, origin)
    for stage in stages:
        if stage.id == stage_id:
            return stage
    raise ConfigError(f"{stage_id}: there is no such stage; {round_name} has {', '.join(s.name for s in stages)}")


def redo(planner: Planner, stage_id: str) -> None:
    """Forget a stage and all that follow from it; their outputs are moved aside, so that they can be compared or removed.

    Raises:
        LongPOError: there is no such stage, or one of them is at work.
    """
    stale = {stage_id}
    find_stage(planner, stage_id)
    # All of them first: what later rounds begin with is not known any more once a gate's file has been moved.
    for stage in list(_known_stages(planner)):
        if stage.id not in stale and not stale & set(stage.after):
            continue
        stale.add(stage.id)
        if not stage.folder.exists():
            continue
        with FolderLock(stage.folder, name=Path(stage.id)):
            aside = _unused(stage.folder.parent.parent / "redone", stage.name.replace(":", "-"))
            aside.mkdir(parents=True)
            for path in (*stage.outputs, *_beside(stage)):
                if path.exists():
                    os.rename(path, aside / path.name)
            os.rename(stage.folder, aside / "stage")
        log(f"{stage.id}: what it made is now in {aside}")


def _beside(stage: Stage) -> list[Path]:
    """What a command keeps beside its output in order to resume."""
    if stage.kind == "generate":
        return [Path(f"{stage.outputs[0]}{ending}") for ending in (".work", ".report", ".rejects.jsonl")]
    if stage.kind.startswith("preprocess"):
        prefix = str(stage.outputs[0]).removesuffix(".bin")
        return [Path(f"{prefix}{ending}") for ending in (".rejects.jsonl", ".lengths.png", ".reference")]
    return []


def _unused(folder: Path, name: str) -> Path:
    number = 1
    while (folder / f"{name}-{number}").exists():
        number += 1
    return folder / f"{name}-{number}"


def _known_stages(planner: Planner) -> Iterator[Stage]:
    """Stages of all rounds whose model is known."""
    for index, round_ in enumerate(planner.evolution.rounds):
        origin = origin_of(planner, index)
        if origin is None:
            return
        yield from planner.stages(round_, origin)


# --------------------------------------------------------------------------------------------------
# One stage
# --------------------------------------------------------------------------------------------------


def _check_no_earlier_settings(planner: Planner) -> None:
    """Find out before any work whether a finished stage was done with other settings."""
    for stage in _known_stages(planner):
        record = read_record(stage.folder)
        if record is not None and record.state == "done":
            _check_same(planner, stage, record)


def _check_same(planner: Planner, stage: Stage, record: Record) -> None:
    """Check that a finished stage had these settings, and what the stages before it have made.

    Raises:
        ConfigError: it had others.
    """
    settings = settings_of(stage)
    # Inputs may be removed once their stage is done.
    gone = [path for path, found in settings["inputs"].items() if not found]
    for path in gone:
        settings["inputs"][path] = record.settings["inputs"].get(path, "")
    if settings != record.settings:
        keys = sorted(_differences(record.settings, settings))
        raise ConfigError(
            f"{stage.id} is done, but with another {', '.join(keys[:5])}; set it back, name another evolve.output, or run the "
            f"stage and those after it again with --redo {stage.id}"
        )
    made = {name: read_record(_folder_of(planner, name)) for name in stage.after}
    before = [(name, r.outputs) for name, r in made.items() if r is not None and r.state == "done"]
    # A stage before it that is not done is run, or refused, in its own turn.
    if len(before) == len(made) and fingerprint(settings, before) != record.fingerprint:
        raise ConfigError(
            f"{stage.id} is done, but {', '.join(made)} made something else since; run the stage and those after it again with "
            f"--redo {stage.id}"
        )


def _folder_of(planner: Planner, stage_id: str) -> Path:
    round_name, name = stage_id.split("/", 1)
    return planner.folder(round_name).stage(name)


def _differences(first: Any, other: Any, name: str = "") -> Iterator[str]:
    """Names of the values that differ."""
    if isinstance(first, dict) and isinstance(other, dict):
        for key in {*first, *other}:
            yield from _differences(first.get(key), other.get(key), f"{name}.{key}" if name else key)
    elif first != other:
        yield name


def _check_ready(planner: Planner, stage: Stage) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Settings of a stage, and what the stages before it made, which is compared with what is there."""
    before = [(name, _output_of(planner, name)) for name in stage.after]
    settings = settings_of(stage)
    missing = [path for path, found in settings["inputs"].items() if not found]
    if missing:
        raise ConfigError(f"{stage.id}: there is nothing at {missing[0]}, which it reads; correct the path")
    return settings, before


def _run(planner: Planner, stage: Stage, title: str, *, parts_seconds: float | None = None) -> None:
    """Run a stage unless it is done; with ``parts_seconds``, only what is left after its parts, which took that long."""
    stage.folder.mkdir(parents=True, exist_ok=True)
    with FolderLock(stage.folder, name=Path(stage.id), record=True):
        record = read_record(stage.folder)
        if record is not None and record.state == "done":
            _check_same(planner, stage, record)
            log(f"== {title}: already done")
            return
        log(f"== {title}")
        settings, before = _check_ready(planner, stage)
        record = Record(
            state="running",
            fingerprint=fingerprint(settings, before),
            settings=settings,
            outputs="",
            seconds=parts_seconds or (record.seconds if record else 0.0),
            processes=stage.resources.nodes * (stage.resources.nproc_per_node or 1) * stage.resources.array,
            attempts=record.attempts + 1 if record else 1,
        )
        write_record(stage.folder, record)
        began, status = time.monotonic(), 1
        try:
            status = _execute(planner, stage) if parts_seconds is None else _merge(stage)
        finally:
            outputs = outputs_of(stage) if status == 0 else ""
            record = finished(record, outputs=outputs, seconds=time.monotonic() - began, status=status)
            write_record(stage.folder, record)
    if record.state != "done":
        _raise_failed(stage, status, time.monotonic() - began)


def _raise_failed(stage: Stage, status: int, seconds: float) -> None:
    """Say why a stage failed that has run for some seconds."""
    logged = stage.folder / "log.txt"
    if status == 0:
        lacks = ", ".join(str(path) for path in stage.outputs if not path.exists())
        raise Failed(f"{stage.id}: its command ended well but did not make {lacks}; see {logged}")
    error = Interrupted if stage.kind == "train" and _goes_on(stage.outputs[0], seconds) else Failed
    raise error(
        f"{stage.id}: ended with status {status}: {_tail(logged)} (all of it: {logged}); rerun the same command to resume"
    )


def _goes_on(output: Path, seconds: float) -> bool:
    """Whether a training run of the last seconds was broken off. One that never came to a sign of life has another mistake."""
    try:
        status = read_status(output)
    except DataError:
        return False
    return status.state not in ("finished", "failed") and silent_seconds(output) <= seconds


def _tail(path: Path) -> str:
    """Last words of a log, on one line."""
    try:
        with open(path, "rb") as stream:
            stream.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = stream.read().decode(errors="replace").split("\n")
    except OSError:
        return "it left no log"
    lines = [line.strip() for line in lines if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return errors[-1] if errors else " | ".join(lines[-_TAIL_LINES:]) or "it said nothing"


def _output_of(planner: Planner, stage_id: str) -> str:
    """Fingerprint of what an earlier stage made, compared with what is there.

    Raises:
        DataError: it is not done, or its outputs are no longer there or no longer the same.
    """
    stage = find_stage(planner, stage_id)
    record = read_record(stage.folder)
    if record is None or record.state != "done":
        raise DataError(f"{stage_id} is not done, and comes first; run it")
    if outputs_of(stage) != record.outputs:
        places = ", ".join(map(str, stage.outputs))
        raise DataError(
            f"{stage_id} is done, but {places} was changed or removed since; restore it, or use --redo {stage_id}"
        )
    return record.outputs


# --------------------------------------------------------------------------------------------------
# Commands
# --------------------------------------------------------------------------------------------------


def _execute(planner: Planner, stage: Stage) -> int:
    """Do a stage's work; its exit status."""
    if not stage.command:
        _do_here(planner, stage)
        return 0
    command = command_of(stage)
    log(f"$ {shlex.join(command)}")
    return _tee(command, stage.folder / "log.txt", environment(stage))


def _merge(stage: Stage) -> int:
    """Merge the parts of a stage; exit status. The last part of an evaluation has reported already."""
    if stage.kind != "generate":
        return 0
    command = [sys.executable, "-m", "megatron_longpo.cli", "generate", "merge", "--output", str(stage.outputs[0])]
    return _tee(command, stage.folder / "log.txt", environment(stage))


def _do_here(planner: Planner, stage: Stage) -> None:
    assert stage.config is not None
    folder = planner.folder(stage.round)
    if stage.kind == "split":
        _, *held_out = stage.outputs
        split_pairs(
            folder.pairs,
            folder.train_pairs,
            held_out[0] if held_out else None,
            fraction=stage.config["held_out_fraction"],
            seed=stage.config["seed"],
        )
        return
    rules = [GateRule(**convert_fields(GateRule, rule, "gate.")) for rule in stage.config["rules"]]
    content = decide(rules, folder.comparison, planner.evolution.main_method)
    write_gate(folder.gate, content)
    log(f"{stage.round}: {describe(content)}")


def command_of(stage: Stage) -> list[str]:
    """The command line of a stage; its YAML file is written."""
    arguments = list(stage.command) + list(stage.flags)
    if stage.config is not None:
        config = stage.folder / "config.yaml"
        write_atomically(config, yaml.safe_dump(stage.config, sort_keys=False, allow_unicode=True).encode())
        arguments += ["--config", str(config)]
    return [*launcher(stage), "-m", "megatron_longpo.cli", *arguments]


def launcher(stage: Stage) -> list[str]:
    """What starts a stage's processes: Python, torchrun, or torchrun on every node of this Slurm job."""
    processes = stage.resources.nproc_per_node or 1
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1")) if stage.resources.nodes > 1 else 1
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    if nodes > 1:
        host, job = os.environ["MASTER_ADDR"], os.environ["SLURM_JOB_ID"]
        port = os.environ.get("MASTER_PORT", 20000 + int(job) % 20000)
        return [
            *("srun", "--kill-on-bad-exit=1", "--ntasks-per-node=1", *_WITHOUT_USR1, *torchrun, "--nnodes", str(nodes)),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{host}:{port}", "--rdzv-id", job),
        ]
    return [*torchrun, "--standalone"] if processes > 1 else [sys.executable]


def environment(stage: Stage) -> dict[str, str]:
    """Environment of a stage on this node: this package comes first, whatever the working directory."""
    path = os.pathsep.join(filter(None, [str(_PACKAGE_ROOT), os.environ.get("PYTHONPATH", "")]))
    processes = stage.resources.nproc_per_node or 1
    # Else torchrun gives each process one thread, and prints a warning.
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, _cores() // processes)))
    # Else torchrun kills processes that save 30 seconds after SIGTERM.
    grace = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(int(_GRACE_SECONDS) - 10))
    return {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": threads,
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": grace,
    }


def _cores() -> int:
    """Cores that this process may use: of a Slurm job, which not every site binds to cores, those that it has on this node."""
    given = os.environ.get("SLURM_CPUS_ON_NODE", "")
    if given.isdigit():
        return int(given)
    # Linux alone tells what a process is bound to.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tee(command: list[str], path: Path, variables: dict[str, str]) -> int:
    """Run a command; what it prints goes to the terminal and to the end of a file. Its exit status."""
    with open(path, "ab") as logged, _stop_with_us() as stopping:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=variables,
            preexec_fn=terminate_with_parent,
        )
        stopping.append(process)
        assert process.stdout is not None
        for line in process.stdout:
            logged.write(line)
            logged.flush()
            sys.stdout.write(line.decode(errors="replace"))
            sys.stdout.flush()
        return process.wait()


@contextlib.contextmanager
def _stop_with_us() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Pass SIGTERM on to a stage, and wait for its end: it may save what it has."""
    processes: list[subprocess.Popen[bytes]] = []

    def stop(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield processes
    finally:
        signal.signal(signal.SIGTERM, before)
        for process in processes:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(_GRACE_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
