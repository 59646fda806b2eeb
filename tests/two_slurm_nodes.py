"""Interrupted jobs on a Slurm of two nodes: ``python -m tests.two_slurm_nodes --folder F [--only NAME ...]``.

The batch files of examples/slurm run as shipped, with settings of the CPU by flags. A tiny model is trained on both nodes, once
undisturbed and once per fault; each run must come to its end by itself, and its metrics, weights and states must be those of the
undisturbed one, bit for bit. ``evolve`` goes through two rounds to its report, interrupted as before a time limit.

It needs a Slurm whose nodes are this machine (``sinfo``; for the fault ``node``, slurmd started by root as ``slurmd -N NAME``).
Slurm begins a requeued job after one to two minutes, so it takes about twenty, and is not among the tests. Broken off, the same
command goes on with the next fault.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from megatron_longpo.checkpoint.folders import folder_of
from megatron_longpo.runtime.files import write_atomically
from megatron_longpo.runtime.status import read_status
from megatron_longpo.training.metrics import read_metrics
from tests.support.data import make_data
from tests.support.launch import PYTHON, ROOT, environment
from tests.support.models import make_model
from tests.support.rounds import make_inputs, write_rounds
from tests.support.runs import assert_same_tensors, metrics_of

STEPS, AT_STEP = 120, 25
# A job that takes longer hangs.
_SECONDS = 1500.0


def slurm(*command: str) -> str:
    """Output of one of Slurm's commands; those that only ask are tried again if a busy controller does not answer."""
    for number in range(5):
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=_environment(), check=False)
        if done.returncode == 0:
            return done.stdout.strip()
        if command[0] != "squeue":
            break
        time.sleep(2 * number)
    raise RuntimeError(f"{' '.join(command)}: {done.stderr}")


def _environment() -> dict[str, str]:
    # Names of nodes that are this machine have no addresses.
    return environment(PYTHON=PYTHON, MASTER_ADDR="127.0.0.1", PROCESSES_PER_NODE="1")


def submit(name: str, log: Path, *arguments: str, nodes: int) -> str:
    """Submit a batch file of examples/slurm; the job's number."""
    file = ROOT / "examples" / "slurm" / f"{name}.sbatch"
    return slurm("sbatch", "--parsable", f"--nodes={nodes}", f"--output={log}", str(file), *arguments)


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + _SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.3)


def is_queued(job: str) -> bool:
    return job in slurm("squeue", "--noheader", "--format=%A").split()


def is_running(job: str) -> bool:
    return "RUNNING" in slurm("squeue", "--noheader", f"--jobs={job}", "--format=%T")


def step_of(output: Path) -> int:
    path = output / "metrics.jsonl"
    records = read_metrics(path) if path.exists() else []
    return int(records[-1]["step"]) if records else 0


def processes_of(**variables: str) -> Iterator[psutil.Process]:
    """Processes whose environment has these variables."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            found = process.environ()
            if all(found.get(name) == value for name, value in variables.items()):
                yield process


# --------------------------------------------------------------------------------------------------
# Faults
# --------------------------------------------------------------------------------------------------


def signal_shell(job: str) -> None:
    """What Slurm does before the time limit."""
    slurm("scancel", "--batch", "--signal=USR1", job)


def signal_job(job: str) -> None:
    """By which one takes a job off its nodes."""
    slurm("scancel", "--signal=USR1", job)


def requeue(job: str) -> None:
    slurm("scontrol", "requeue", job)


def kill_rank(job: str) -> None:
    (rank,) = [p for p in processes_of(SLURM_JOB_ID=job, RANK="1") if "megatron_longpo.train" in p.cmdline()]
    rank.kill()


def kill_node(job: str) -> None:
    """SIGKILL for slurmd of the second node and all that it started.

    The node is back when the job waits for it: Slurm takes a node for dead after SlurmdTimeout, 300 seconds by default. A slurmd
    that is back earlier says nothing of the step that was lost with it, for which srun waits: a machine that starts anew does.
    """
    (node,) = {p.environ()["SLURMD_NODENAME"] for p in processes_of(SLURM_JOB_ID=job, RANK="1")}
    (daemon,) = [p for p in psutil.process_iter() if p.name() == "slurmd" and p.cmdline()[1:] == ["-N", node]]
    line = daemon.cmdline()
    daemon.kill()
    for process in [*processes_of(SLURM_JOB_ID=job, SLURMD_NODENAME=node)]:
        # slurmstepd, which has no environment of the job, is the parent.
        with contextlib.suppress(psutil.Error):
            parent = process.parent()
            if parent is not None and parent.name() == "slurmstepd":
                parent.kill()
            process.kill()
    wait_until(lambda: not is_running(job), f"job {job} still runs, though {node} is dead")
    subprocess.run(line, check=True, start_new_session=True)


FAULTS: dict[str, Callable[[str], None]] = {
    "signal to the batch shell": signal_shell,
    "signal to the job": signal_job,
    "requeue": requeue,
    "rank": kill_rank,
    "node": kill_node,
}


# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------


def prepare(folder: Path) -> None:
    """Model and data, unless they are there."""
    if (folder / "data.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    make_model("llama", folder / "hf", num_hidden_layers=2)
    line = ["-m", "megatron_longpo.cli", "convert", "import", "--hf", folder / "hf", "--output", folder / "ckpt"]
    subprocess.run([PYTHON, *map(str, line)], check=True, cwd=ROOT, env=environment())
    make_data(folder / "data", 24, longest=60)


def train(folder: Path, name: str, fault: Callable[[str], None] | None) -> dict[str, Any]:
    """Train by train.sbatch, let a fault happen, and wait for the end."""
    output, log = folder / name.replace(" ", "_"), folder / f"{name.replace(' ', '_')}.log"
    settings = ["--objective", "sft", "--context-parallel-size", "2", "--global-batch-size", "2", "--lr", "1e-3"]
    settings += [
        "--train-iters",
        str(STEPS),
        "--save-interval",
        "10",
        "--keep-last",
        "2",
        "--fingerprint-interval",
        "1",
    ]
    settings += ["--no-tensorboard", "--plot-interval", "100000"]
    paths = ["--data-path", folder / "data", "--load", folder / "ckpt", "--save", output]
    # Of a fault that was broken off.
    shutil.rmtree(output, ignore_errors=True)
    log.unlink(missing_ok=True)
    began = time.monotonic()
    job = submit("train", log, *map(str, paths), *settings, nodes=2)
    at = 0
    if fault is not None:
        wait_until(lambda: step_of(output) >= AT_STEP or not is_queued(job), f"{name}: no step {AT_STEP}; see {log}")
        at = step_of(output)
        fault(job)
    wait_until(lambda: not is_queued(job), f"{name}: job {job} does not end; see {log}")
    text = log.read_text(encoding="utf-8")
    assert read_status(output).state == "finished", f"{name}: not finished; see {log}"
    resumed = [line for line in text.splitlines() if "resumed from" in line]
    assert len(resumed) == (fault is not None), f"{name}: resumed {len(resumed)} times; see {log}"
    seconds = round(time.monotonic() - began)
    return {"name": name, "job": job, "at": at, "resumed": " ".join(resumed)[-60:], "seconds": seconds}


def compare(folder: Path, name: str) -> None:
    run, whole = folder / name.replace(" ", "_"), folder / "whole"
    figures = metrics_of(run)
    assert figures == metrics_of(whole) and [r["step"] for r in figures] == list(range(1, STEPS + 1)), name
    assert_same_tensors(folder_of(run, STEPS), folder_of(whole, STEPS))


def evolve(folder: Path) -> dict[str, Any]:
    """Two rounds by evolve.sbatch, with SIGUSR1 to the batch shell while the second one trains, to their report."""
    folder, began = folder / "evolve", time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    make_inputs(folder)
    # Long enough to be met.
    config = write_rounds(folder, defaults={"train": {"training": {"train_iters": 40}}})
    log = folder / "evolve.log"
    job = submit("evolve", log, "--config", str(config), nodes=1)

    def trains() -> bool:
        return any(step_of(path.parent) >= 5 for path in (folder / "rounds" / "second").rglob("metrics.jsonl"))

    wait_until(lambda: trains() or not is_queued(job), f"evolve: the second round does not train; see {log}")
    signal_shell(job)
    wait_until(lambda: not is_queued(job), f"evolve: job {job} does not end; see {log}")
    line = [PYTHON, "-m", "megatron_longpo.cli", "evolve"]
    for what in ("status", "report"):
        done = subprocess.run(
            [*line, what, "--config", str(config)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment(),
            check=True,
        )
        print(done.stdout, flush=True)
    page = (folder / "rounds" / "report.html").read_text(encoding="utf-8")
    assert "second" in page and (folder / "rounds" / "second" / "longpo" / "model").is_dir()
    starts = log.read_text(encoding="utf-8").count("second/train:longpo")
    return {
        "name": "evolve",
        "job": job,
        "lines_of_second_training": starts,
        "seconds": round(time.monotonic() - began),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=[*FAULTS, "evolve"], default=[*FAULTS, "evolve"])
    options = parser.parse_args(arguments)
    folder, report = options.folder.resolve(), options.folder / "report.json"
    prepare(folder)
    done = {record["name"]: record for record in json.loads(report.read_text())} if report.exists() else {}

    def note(record: dict[str, Any]) -> None:
        done[record["name"]] = record
        write_atomically(report, (json.dumps([*done.values()], indent=1) + "\n").encode())
        print(json.dumps(record), flush=True)

    def disturbed(name: str) -> None:
        note({**train(folder, name, FAULTS[name]), "equal": compare(folder, name) is None})

    if "whole" not in done and options.only != ["evolve"]:
        note(train(folder, "whole", None))
    left = [name for name in options.only if name not in done]
    # A requeued job waits, meanwhile others run; without a node nothing else does.
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(disturbed, [name for name in left if name in FAULTS and name != "node"]))
    if "node" in left:
        disturbed("node")
    if "evolve" in left:
        note(evolve(folder))
    print(
        f"{', '.join(done)}: each came to its end; metrics, weights and states of all training are the undisturbed run's"
    )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
