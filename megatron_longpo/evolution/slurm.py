"""Submits the stages of all rounds as Slurm jobs, each after those that it needs.

A job runs ``megatron-longpo evolve --config FILE --stage ROUND/STAGE`` on its first node. However a job ends, the next submission
leaves out what is done and submits the rest. A gate that says stop ends its job with a status of its own, so that
the jobs of the later rounds, which depend on it, are cancelled by Slurm.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_longpo.errors import DataError, PlatformError, one_line
from megatron_longpo.evolution.gate import origin_of
from megatron_longpo.evolution.plan import Origin, Planner, Stage
from megatron_longpo.evolution.records import read_record
from megatron_longpo.evolution.run import environment
from megatron_longpo.runtime.checked_json import read_checked, write_checked
from megatron_longpo.runtime.log import log
from megatron_longpo.runtime.signals import STOPPED as GOES_ON

# Exit status of a gate that says stop.
STOPPED = 3
_JOBS = "jobs.json"
# Three minutes before the time limit the batch shell gets SIGUSR1, and its stage SIGTERM, upon which it saves what it has. A job
# whose stage was broken off is requeued under its number, so that those which depend on it go on waiting.
_SIGNAL = "--signal=B:USR1@180"
_SCRIPT = f"""\
export MASTER_ADDR=${{MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}}
out_of_time=no
trap 'out_of_time=yes; kill -TERM $!' USR1
COMMAND &
status=0
while kill -0 $! 2>/dev/null; do wait $! && status=0 || status=$?; done
if [ "${{SLURM_RESTART_COUNT:-0}}" -lt 20 ] && {{ [ "$out_of_time" = yes ] || [ "$status" -eq {GOES_ON} ]; }}; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


def submit(planner: Planner) -> dict[str, str]:
    """Submit every stage that is neither done nor queued.

    Returns:
        Stage id -> job id.

    Raises:
        LongPOError: a setting cannot be used, there is no Slurm here, or sbatch refuses a job.
    """
    planner.check()
    if shutil.which("sbatch") is None:
        raise PlatformError(
            "evolve.executor=slurm, but there is no sbatch here; submit from a login node, or use executor=local"
        )
    path = planner.evolution.output / _JOBS
    known = _still_queued(_read_jobs(path)) if path.exists() else {}
    jobs: dict[str, str] = {}
    for stage in _stages(planner):
        record = read_record(stage.folder)
        if record is not None and record.state == "done":
            continue
        if stage.id in known:
            jobs[stage.id] = known[stage.id]
            log(f"{stage.id}: job {known[stage.id]} is queued or runs")
            continue
        stage.folder.mkdir(parents=True, exist_ok=True)
        needs = [jobs[name] for name in stage.after if name in jobs]
        if stage.resources.array > 1:
            jobs[stage.id] = _submit_array(planner, stage, needs)
        else:
            jobs[stage.id] = _sbatch(stage, _options(stage, needs), [*_own_command(planner), "--stage", stage.id])
        log(f"{stage.id}: job {jobs[stage.id]}" + (f" after {', '.join(needs)}" if needs else ""))
        write_checked(path, {**known, **jobs})
    return jobs


def _read_jobs(path: Path) -> dict[str, Any]:
    """Stage id -> job id of earlier submissions.

    Raises:
        DataError: they cannot be read.
    """
    try:
        return read_checked(path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read ({one_line(error)}), so jobs could be submitted twice; cancel those of these rounds, remove "
            "the file, and submit again"
        ) from None


def _stages(planner: Planner) -> list[Stage]:
    """Stages of all rounds; the model of a round whose predecessors have not decided is taken to be the new one."""
    stages: list[Stage] = []
    origin = Origin(Path(str(planner.evolution.evolve.model)))
    method = planner.evolution.main_method
    for index, round_ in enumerate(planner.evolution.rounds):
        decided = origin_of(planner, index)
        origin = decided if decided is not None else origin
        of_round = planner.stages(round_, origin)
        if index:
            # Which model the round begins with is decided by the gate before it.
            gate = f"{planner.evolution.rounds[index - 1].name}/gate"
            of_round = [replace(stage, after=(*stage.after, gate)) for stage in of_round]
        stages += of_round
        origin = Origin(planner.folder(round_.name).model(method), f"{round_.name}/export:{method}")
    return stages


def _submit_array(planner: Planner, stage: Stage, needs: list[str]) -> str:
    """Submit the tasks that divide a stage, and the job that comes after them and records the stage as done; its id."""
    command = [*_own_command(planner), "--stage", stage.id]
    array = f"--array=0-{stage.resources.array - 1}"
    tasks = _sbatch(stage, [array, *_options(stage, needs, log_name="log-%a.txt")], [*command, "--part"])
    log(f"{stage.id}: array {tasks} of {stage.resources.array} tasks")
    alone = replace(stage, resources=replace(stage.resources, array=1))
    return _sbatch(alone, _options(alone, [tasks]), [*command, "--finish"])


def _options(stage: Stage, needs: list[str], log_name: str = "slurm.txt") -> list[str]:
    options = [
        f"--job-name=evolve:{stage.id}",
        f"--nodes={stage.resources.nodes}",
        "--ntasks-per-node=1",
        "--requeue",
        _SIGNAL,
        "--open-mode=append",
        f"--output={stage.folder / log_name}",
    ]
    if needs:
        # A job whose predecessor failed would else wait for ever.
        options += [f"--dependency=afterok:{':'.join(needs)}", "--kill-on-invalid-dep=yes"]
    return [*options, *stage.resources.sbatch]


def _sbatch(stage: Stage, options: list[str], command: list[str]) -> str:
    """Submit a job; its id."""
    script = _SCRIPT.replace("COMMAND", shlex.join(command))
    variables = environment(stage)
    if "OMP_NUM_THREADS" not in os.environ:
        # Each node has cores of its own, and the job finds out how many.
        del variables["OMP_NUM_THREADS"]
    done = subprocess.run(
        ["sbatch", "--parsable", *options, f"--wrap={script}"],
        capture_output=True,
        text=True,
        env=variables,
        check=False,
    )
    if done.returncode:
        raise PlatformError(
            f"{stage.id}: sbatch refuses the job ({one_line(done.stderr)}); correct resources.{stage.kind}.sbatch, then submit "
            "again: jobs that are queued are kept"
        )
    # With several clusters: JOB;CLUSTER.
    return done.stdout.strip().split(";")[0]


def _own_command(planner: Planner) -> list[str]:
    return [sys.executable, "-m", "megatron_longpo.cli", "evolve", "--config", str(planner.evolution.source)]


def _still_queued(jobs: Mapping[str, Any]) -> dict[str, str]:
    """Those of earlier jobs that are queued or run."""
    done = subprocess.run(["squeue", "--me", "--noheader", "--format=%A"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise PlatformError(
            f"squeue does not answer ({one_line(done.stderr)}); try again, or no job would be submitted only once"
        )
    queued = set(done.stdout.split())
    return {str(stage): str(job) for stage, job in jobs.items() if str(job) in queued}
