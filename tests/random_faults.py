"""Random faults over one run: ``python -m tests.random_faults --folder F --faults 40 --steps 300 --seed S``.

A tiny model is trained by two processes, once undisturbed and once with faults drawn by the seed, each at a step of its own. The
same samples must be used in each step, metrics.jsonl must have each step once, and its figures and the final weights and states
must be those of the undisturbed run: bit for bit, or with ``--layouts``, where each launch has another layout, to rounding: final
weights to 1e-5. Some steps are not finite or spikes in both runs, as if it were the samples' fault, so both skip them.

Broken off, the same command goes on with the next fault. It takes about ten minutes on two cores, so it is not among the tests.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_longpo.checkpoint.folders import folder_of, whole_steps
from megatron_longpo.runtime.files import HOLDER_FILE, write_atomically
from megatron_longpo.runtime.status import read_status
from tests.support.damages import DAMAGES
from tests.support.data import make_data
from tests.support.launch import PYTHON, Running, environment, run, torchrun
from tests.support.models import make_model
from tests.support.runs import assert_same_samples, assert_same_tensors, metrics_of, tensors_of

# What ends a launch, and how often it is drawn.
KINDS = {
    "SIGTERM": 3,
    "SIGUSR1": 3,
    "SIGTERM to the launcher": 2,
    "kill": 4,
    "kill in save": 5,
    "kill the launcher": 3,
    "stop": 3,
    "limit": 3,
    "limit for a while": 2,
    "restart by torchrun": 2,
    "second run": 2,
    "lock of a dead process": 2,
    "half a line of metrics": 2,
    **dict.fromkeys(DAMAGES, 4),
}
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "dp2": (2, ()),
    "one": (1, ()),
    "tp2": (2, ("--tensor-model-parallel-size", "2", "--sequence-parallel")),
    "pp2": (2, ("--pipeline-model-parallel-size", "2")),
    "cp2": (2, ("--context-parallel-size", "2")),
}
_SAMPLES = 6
_BATCH = 2
# A launch that takes longer hangs.
_SECONDS = 300.0


class Faults:
    """The run and what happens to it.

    Args:
        folder: folder of everything.
        steps: steps of the run.
        faults: number of faults.
        seed: seed of what happens.
        changes_layout: whether each launch has another layout.
    """

    def __init__(self, folder: Path, *, steps: int, faults: int, seed: int, changes_layout: bool) -> None:
        self.folder, self.steps, self.seed, self.changes_layout = folder, steps, seed, changes_layout
        self.output, self.ledger = folder / "run", folder / "run.jsonl"
        rng = random.Random(seed)
        names = list(KINDS)
        self.kinds = [*rng.sample(names, min(len(names), faults))]
        self.kinds += rng.choices(names, list(KINDS.values()), k=faults - len(self.kinds))
        self.at = sorted(rng.choices(range(3, steps - 8), k=faults))
        # Not among the last steps: a run whose last steps were skipped is not finished.
        bad = rng.sample(range(30, steps - 10), 6)
        self.of_data = dict(zip(map(str, bad), ("nan loss", "gradient", "high loss") * 2, strict=True))

    def prepare(self) -> None:
        """Model and data, unless they are there."""
        if (self.folder / "data.json").exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        make_model("llama", self.folder / "hf", num_hidden_layers=2)
        convert = ["convert", "import", "--hf", str(self.folder / "hf"), "--output", str(self.folder / "ckpt")]
        run([PYTHON, "-m", "megatron_longpo.cli", *convert])
        make_data(self.folder / "data", _SAMPLES, longest=60)

    def start(
        self,
        output: Path,
        ledger: Path,
        *,
        layout: str = "dp2",
        launcher: Sequence[str] = (),
        flags: Sequence[str] = (),
        **extra: str,
    ) -> Running:
        """Start the command that trains the run."""
        arguments = ["-m", "tests.support.meddling_training", "--data-path", str(self.folder / "data")]
        arguments += ["--load", str(self.folder / "ckpt"), "--save", str(output), "--objective", "sft"]
        arguments += ["--global-batch-size", str(_BATCH), "--train-iters", str(self.steps), "--save-interval", "4"]
        arguments += ["--keep-last", "3", "--lr", "1e-3", "--adam-eps", "1e-4", "--no-tensorboard"]
        arguments += ["--plot-interval", "100000", "--check-for-spiky-loss", "--heartbeat-timeout-seconds", "12"]
        processes, layout_flags = LAYOUTS[layout]
        arguments += [*layout_flags, *flags]
        line = [PYTHON, *arguments] if processes == 1 else torchrun(processes, *launcher, *arguments)
        env = {"MEDDLE": "nothing", "MEDDLE_LEDGER": str(ledger), "MEDDLE_DATA": json.dumps(self.of_data), **extra}
        return Running(line, env=environment(**env))

    def undisturbed(self) -> float:
        """Train the run without faults; seconds that it took."""
        output, began = self.folder / "whole", time.monotonic()
        if not output.exists() or read_status(output).state != "finished":
            self.start(output, self.folder / "whole.jsonl").wait()
        return time.monotonic() - began

    def fault(self, number: int) -> dict[str, Any]:
        """Let one fault happen; what came of it."""
        rng, kind = random.Random(f"{self.seed}/{number}"), self.kinds[number]
        layout = rng.choice(list(LAYOUTS)) if self.changes_layout else "dp2"
        processes = LAYOUTS[layout][0]
        steps = whole_steps(self.output) if self.output.exists() else []
        done = steps[-1] if steps else 0
        # Setbacks may have left the run behind.
        step = max(done + 1, self.at[number])
        rank = rng.randrange(processes)
        env = {"MEDDLE_STEP": str(step), "MEDDLE_RANK": str(rank), "MEDDLE_DELAY": str(rng.uniform(0, 0.08))}
        more: dict[str, Any] = {}
        what, then = kind, []
        if kind in DAMAGES:
            what = rng.choice(["SIGTERM", "kill"])
        elif kind == "second run":
            what, env["MEDDLE_GO"] = "wait", str(self.folder / f"go_{number}")
        elif kind == "lock of a dead process":
            what = "SIGTERM"
            self._leave_lock(rng)
        elif kind == "half a line of metrics":
            what = "kill"
        elif kind == "restart by torchrun":
            what = "kill"
            env["MEDDLE_ONCE"] = str(self.folder / f"once_{number}")
            if processes > 1:
                more["launcher"] = ["--max-restarts=1"]
                then = [{"what": "SIGTERM", "step": step + 3, "rank": rank}]
        elif kind == "limit for a while":
            more["flags"] = ["--on-save-failure", "continue"]
            then = [{"what": "SIGTERM", "step": step + 5, "rank": rank}]
        elif processes == 1 and kind in ("SIGTERM to the launcher", "kill the launcher", "stop"):
            # There is no launcher, and nobody watches a single process.
            what = "kill"
        env |= {"MEDDLE": what, "MEDDLE_MORE": json.dumps(then)}
        began = time.monotonic()
        running = self.start(self.output, self.ledger, layout=layout, **more, **env)
        if kind == "second run":
            self._start_second(running, Path(env["MEDDLE_GO"]))
        ended = running.wait(timeout=_SECONDS, expect=None)
        found: dict[str, Any] = {
            "number": number,
            "kind": kind,
            "layout": layout,
            "step": step,
            "rank": rank,
            "began_at": done,
            "status": ended.returncode,
            "seconds": round(time.monotonic() - began, 1),
            "said": [line[:300] for line in ended.stderr.splitlines() if line.startswith("error:")],
        }
        assert ended.returncode, (
            f"{kind} at step {step} did not end the run:\n{ended.stdout[-2000:]}\n{ended.stderr[-2000:]}"
        )
        found["damage"] = self._damage(kind, rng)
        if kind == "half a line of metrics":
            with open(self.output / "metrics.jsonl", "ab") as stream:
                stream.write(b'{"step": 9')
        return found

    def _damage(self, kind: str, rng: random.Random) -> str:
        """Damage the newest checkpoint if that is the fault; there must be another, or the run would begin again."""
        steps = whole_steps(self.output)
        if kind not in DAMAGES or len(steps) < 2:
            return ""
        return f"step {steps[-1]}: {DAMAGES[kind](folder_of(self.output, steps[-1]), rng)}"

    def _leave_lock(self, rng: random.Random) -> None:
        """Of a process that has died here, or of one on another machine."""
        dead = subprocess.Popen(["true"])
        dead.wait()
        host = rng.choice([socket.gethostname(), "elsewhere"])
        self.output.mkdir(exist_ok=True)
        holder = {"host": host, "process": dead.pid, "started": "2026-01-02T03:04:05+00:00", "command": "train"}
        (self.output / HOLDER_FILE).write_text(json.dumps(holder) + "\n", encoding="utf-8")

    def _start_second(self, first: Running, go: Path) -> None:
        """A second run on the folder, while the first one waits after a step; it must be refused."""
        deadline = time.monotonic() + _SECONDS
        while not go.with_name(go.name + ".waiting").exists():
            assert first.poll() is None and time.monotonic() < deadline, first.output()
            time.sleep(0.1)
        second = self.start(self.output, self.folder / "second.jsonl").wait(expect=None)
        said = f"{second.stdout}\n{second.stderr}"
        assert second.returncode not in (0, None) and "works on it" in said, (second.returncode, said)
        go.touch()

    def finish(self) -> None:
        """Let the run come to its end, and compare it with the undisturbed one."""
        if read_status(self.output).state != "finished":
            self.start(self.output, self.ledger).wait()
        flat = assert_same_samples(self.ledger, self.folder / "whole.jsonl", steps=self.steps)
        epochs = [sorted(flat[start : start + _SAMPLES]) for start in range(0, len(flat), _SAMPLES)]
        assert all(epoch == list(range(_SAMPLES)) for epoch in epochs)
        figures = [metrics_of(self.folder / name) for name in ("run", "whole")]
        assert [r["step"] for r in figures[0]] == list(range(1, self.steps + 1))
        assert [r.get("skipped") for r in figures[0]] == [r.get("skipped") for r in figures[1]]
        final = [folder_of(self.folder / name, self.steps) for name in ("run", "whole")]
        if self.changes_layout:
            _assert_close(figures[0], figures[1])
            _assert_weights_close(*final)
        else:
            assert figures[0] == figures[1]
            assert_same_tensors(*final)


def _happened(fault: Mapping[str, Any]) -> str:
    """Kind of a fault; a damage for which there was only one checkpoint, so that it could not happen, is none."""
    is_none = fault["kind"] in DAMAGES and not fault["damage"]
    return "end of a launch before there were two checkpoints" if is_none else str(fault["kind"])


def _assert_close(figures: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> None:
    """Losses differ by the rounding of all steps before: between two undisturbed layouts by 1.0e-5 in the worst of 300 steps."""
    for one, other in zip(figures, others, strict=True):
        for name in ("loss", "nll"):
            if name in one and "skipped" not in one:
                difference = abs(one[name] - other[name])
                assert difference <= 5e-5 * abs(other[name]), (one["step"], name, one[name], other[name])


def _assert_weights_close(first: Path, other: Path) -> None:
    """To 1e-5; two undisturbed layouts differ by 1.4e-6 after 300 steps, and by 4.3e-5 in the optimizer's states."""
    found = [tensors_of(folder) for folder in (first, other)]
    assert found[0].keys() == found[1].keys()
    for key in (key for key in found[0] if not key.startswith("optimizer")):
        # Layouts pad the vocabulary to different sizes.
        sizes = zip(found[0][key].shape, found[1][key].shape, strict=True)
        shared = tuple(slice(min(pair)) for pair in sizes)
        x, y = (tensors[key][shared].double() for tensors in found)
        assert (x - y).norm() <= 1e-5 * y.norm() + 1e-12, key


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--faults", type=int, default=40)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--layouts", action="store_true", help="each launch has another layout")
    options = parser.parse_args(arguments)
    faults = Faults(
        options.folder, steps=options.steps, faults=options.faults, seed=options.seed, changes_layout=options.layouts
    )
    report = options.folder / "report.json"
    asked = {name: getattr(options, name) for name in ("faults", "steps", "seed", "layouts")}
    content: dict[str, Any] = {"asked": asked, "faults": []}
    if report.exists():
        content = json.loads(report.read_text(encoding="utf-8"))
        if content["asked"] != asked:
            raise SystemExit(f"{report}: was made with {content['asked']}; give another folder")
    faults.prepare()
    content["undisturbed_seconds"] = content.get("undisturbed_seconds") or faults.undisturbed()
    for number in range(len(content["faults"]), options.faults):
        content["faults"].append(faults.fault(number))
        write_atomically(report, (json.dumps(content, indent=1) + "\n").encode())
        print(json.dumps(content["faults"][-1]), flush=True)
    faults.finish()
    ledger = faults.ledger.read_text(encoding="utf-8").splitlines()
    kinds = collections.Counter(_happened(fault) for fault in content["faults"])
    seconds = sum(fault["seconds"] for fault in content["faults"])
    print(
        f"seed {options.seed}: {options.faults} faults over {options.steps} steps, {len(ledger)} steps computed, {seconds:.0f} s"
    )
    print(", ".join(f"{count} {kind}" for kind, count in kinds.most_common()))
    print("no sample lost or doubled; metrics, weights and states are those of the undisturbed run")
    content["result"] = "equal"
    write_atomically(report, (json.dumps(content, indent=1) + "\n").encode())


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
