"""Random losses of a run that uploads: ``python -m tests.random_stores --folder F --launches 14 --seed S [--processes 2]``.

A tiny run with ``--upload-to`` a real S3 server (moto's) is killed in every launch but the last, at a random moment. Before the
next launch its folder is lost, or the newest checkpoint in the store or in the folder is damaged, or nothing happens; in a third
of the launches the store answers one request in twenty with 503. With two processes or more, by torchrun, what is killed is one
rank, the launcher, or everything at once as a machine is lost; all of it must end within a minute. Metrics and final weights
must be those of the undisturbed run, bit for bit.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil

from megatron_longpo.checkpoint.folders import folder_of, latest_step
from megatron_longpo.checkpoint.remote import step_of
from tests.support.data import make_data
from tests.support.launch import ROOT, Running, command, environment, run
from tests.support.models import make_model
from tests.support.runs import assert_same_tensors, metrics_of
from tests.support.s3 import BUCKET, S3Server

_STEPS = 60
_LOSSES = ("nothing", "folder", "store", "store and folder", "here")
_VICTIMS = ("one rank", "one rank", "the launcher", "everything")
# Seconds within which everything ends after one of several processes was killed.
_END_SECONDS = 60.0


class _UnreliableServer(S3Server):
    """Answers a share of the requests with 503, and takes its time for uploads.

    Args:
        seed: decides which requests, by the order in which they come.
    """

    def __init__(self, seed: int) -> None:
        self.share, self.refusals = 0.0, 0
        self._rng = random.Random(seed)
        super().__init__()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] == "PUT":
            time.sleep(0.02)
        if self._rng.random() < self.share:
            self.refusals += 1
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("503 Service Unavailable", [("Content-Length", "0")])
            return [b""]
        return super().__call__(environ, start_response)


def train(folder: Path, output: Path, *flags: str, processes: int) -> list[str]:
    """Command line of a run without a reference that saves every step."""
    paths = {"data_path": folder / "data", "load": folder / "ckpt", "save": output}
    settings = {"global_batch_size": 2, "train_iters": _STEPS, "save_interval": 1, "objective": "sft", "lr": 1e-3}
    launcher = None if processes == 1 else processes
    line = command(
        "train", "--no-tensorboard", processes=launcher, **paths, **settings, adam_eps=1e-4, plot_interval=1000
    )
    return [*line, *flags]


def damage(rng: random.Random, server: S3Server, output: Path, what: str) -> list[str]:
    """Let something happen between two launches; what could happen, as there was something to lose."""
    happened = []
    stored = [name for name in server.names("run/") if step_of(name.removeprefix("run/")) is not None]
    if "store" in what and stored:
        newest = max(name.split("/")[1] for name in stored)
        key = rng.choice([name for name in stored if name.split("/")[1] == newest])
        content = server.read(key)
        kind = rng.choice(("bit", "cut", "missing"))
        if kind == "missing" or not content:
            server.client.delete_object(Bucket=BUCKET, Key=key)
        elif kind == "cut":
            server.write(key, content[:-1])
        else:
            server.flip_a_bit(key)
        happened.append(f"{kind} in the store" if content else "missing in the store")
    if "here" in what and (step := latest_step(output)) is not None:
        path = rng.choice(sorted(folder_of(output, step).glob("*.distcp")))
        changed = bytearray(path.read_bytes())
        changed[rng.randrange(len(changed))] ^= 4
        path.write_bytes(changed)
        happened.append("bit here")
    if "folder" in what and output.exists():
        shutil.rmtree(output)
        happened.append("folder lost")
    return happened


def kill(rng: random.Random, running: Running, processes: int) -> str:
    """Kill a launch, or one of its processes, after which the others must end by themselves; what was killed."""
    if processes == 1:
        running.kill()
        return "everything"
    ranks, victim = running.children(), rng.choice(_VICTIMS)
    if victim == "everything" or not ranks:
        running.kill()
        return "everything"
    with contextlib.suppress(ProcessLookupError):
        os.kill(running.pid if victim == "the launcher" else rng.choice(ranks), signal.SIGKILL)
    deadline = time.monotonic() + _END_SECONDS
    while running.poll() is None or any(psutil.pid_exists(pid) for pid in ranks):
        assert time.monotonic() < deadline, f"{victim} was killed, and others go on: {running.output()}"
        time.sleep(0.1)
    return victim


def losses(folder: Path, *, launches: int, seed: int, processes: int) -> collections.Counter[str]:
    """Train with losses, and without; what happened, by name.

    Raises:
        AssertionError: the two runs differ, or a launch printed a traceback.
    """
    rng, server = random.Random(seed), _UnreliableServer(seed)
    make_model("llama", folder / "hf", num_hidden_layers=2)
    run(command("convert", "import", hf=folder / "hf", output=folder / "ckpt", no_verify=True))
    make_data(folder / "data", 6, longest=60)
    output, env = folder / "run", environment(**server.env)
    flags = ("--upload-to", f"s3://{BUCKET}/run", "--keep-last", "3")
    metrics_file = output / "metrics.jsonl"
    found: collections.Counter[str] = collections.Counter()
    for number in range(launches):
        server.share = rng.choice((0.0, 0.0, 0.05)) if number < launches - 1 else 0.0
        # Several processes start slowly: mostly the kill is drawn from the first new step on.
        waits_for_step = processes > 1 and rng.random() < 0.7
        before = _size(metrics_file) if waits_for_step else -1
        running = Running(train(folder, output, *flags, processes=processes), env=env)
        if number < launches - 1:
            began = time.monotonic()
            while _size(metrics_file) <= before and running.poll() is None and time.monotonic() < began + 60:
                time.sleep(0.05)
            time.sleep(rng.uniform(0.3, 4.0))
            if running.poll() is None:
                found[f"kills of {kill(rng, running, processes)}"] += 1
        else:
            running.wait()
        said, errors = running.output()
        # torchrun prints one of its own when a rank is killed.
        ours = "Traceback" if processes == 1 else f'File "{ROOT}/megatron_longpo'
        assert ours not in errors, errors
        found["resumed"] += "resumed from" in said
        found["copied from the store"] += "copying s3://" in said
        if number < launches - 1:
            what = rng.choice(_LOSSES)
            found.update(damage(rng, server, output, what) or ["nothing lost"])
    found["requests answered with 503"] = server.refusals
    server.close()
    run(train(folder, folder / "plain", processes=processes))
    metrics = metrics_of(output)
    assert metrics == metrics_of(folder / "plain") and [r["step"] for r in metrics] == list(range(1, _STEPS + 1))
    assert_same_tensors(folder_of(output, _STEPS), folder_of(folder / "plain", _STEPS))
    return found


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--launches", type=int, default=14)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1, help="ranks of the run; above 1 by torchrun")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True)
    found = losses(options.folder, launches=options.launches, seed=options.seed, processes=options.processes)
    print(
        f"seed {options.seed}, {options.processes} process(es): equal to the undisturbed run; "
        + ", ".join(f"{k} {n}" for k, n in found.items())
    )


if __name__ == "__main__":
    main()
