"""The planner's predictions beside real training runs on this machine's CPU, in one sitting: calibrate, predict, then run.

    python benchmarks/benchmark_plan.py --output plan-benchmark

The machine is measured first, once for runs of one process and once for runs of two (``megatron-longpo plan calibrate``). Then
all predictions are written to OUTPUT/predictions.json, with the time. Only then the runs begin: the training command itself, on
random models and random rows. Rerun the same command to resume a sitting that broke off; --redo-runs keeps calibration and
predictions and runs everything again. OUTPUT/code.json has a hash of the code that calibrates, predicts and runs: other code
needs a folder of its own, so no table mixes two.

A quiet machine is needed: what else runs makes steps slower than predicted. The load is noted with each run.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common import CONVERT, code_hash, describe_machine
from megatron_longpo.runtime.files import write_atomically
from megatron_longpo.runtime.tables import markdown_table

ROOT = Path(__file__).parent.parent
_ANSWER, _SHORT = 128, 256
# Each run computes this many steps; the first one touches all memory for the first time and does not count.
_STEPS = 3
# The largest distances that are wanted.
_TIME_BOUND, _MEMORY_BOUND = 0.15, 0.10


@dataclass(frozen=True)
class Case:
    """A run.

    Attributes:
        model: name in ``MODELS``.
        length: tokens of the longest row.
        layout: ``1``, ``cp2``, ``tp2``, ``pp2`` or ``dp2``.
        dtype: ``fp32`` or ``bf16``.
        recompute: ``none``, ``up`` (the MLPs' first products) or ``all`` (whole layers).
    """

    model: str
    length: int
    layout: str
    dtype: str
    recompute: str

    @property
    def name(self) -> str:
        return f"{self.model}-{self.length}-{self.layout}-{self.dtype}-{self.recompute}"

    @property
    def processes(self) -> int:
        return 1 if self.layout == "1" else 2

    @property
    def samples(self) -> int:
        """Samples per step: one per data-parallel rank, and as many micro batches as make a pipeline worthwhile."""
        return {"dp2": 2, "pp2": 4}.get(self.layout, 1)

    def sections(self) -> dict[str, dict[str, Any]]:
        """The configuration of the run, without paths."""
        degree = self.layout[:2]
        training: dict[str, Any] = {
            "global_batch_size": self.samples,
            "train_iters": _STEPS,
            "bf16": self.dtype == "bf16",
            "recompute_granularity": {"none": "none", "up": "selective", "all": "full"}[self.recompute],
        }
        if self.recompute != "none":
            training |= {"recompute_modules": ["mlp_up"], "recompute_method": "uniform"}
        return {
            "data": {"shuffle": False},
            "objective": {"objective": "longpo"},
            "parallel": {
                "tensor_model_parallel_size": 2 if degree == "tp" else 1,
                "sequence_parallel": degree == "tp",
                "pipeline_model_parallel_size": 2 if degree == "pp" else 1,
                "context_parallel_size": 2 if degree == "cp" else 1,
                "use_distributed_optimizer": degree in ("cp", "dp"),
            },
            "training": training,
            "optimizer": {"optimizer": "rmsprop", "lr": 1e-9, "lr_decay_style": "constant"},
            "logging": {"tensorboard": False},
        }


# Hugging Face's configurations. Heads divide by 2, so that every layout can run.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
        "max_position_embeddings": 16384,
    },
    "qwen2": {
        "model_type": "qwen2",
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "max_position_embeddings": 16384,
    },
}
CASES = [
    Case(model, int(length), layout, dtype, recompute)
    for model, length, layout, dtype, recompute in (
        line.split()
        for line in """
llama 1024 1 fp32 none
llama 2048 1 fp32 none
llama 4096 1 fp32 none
llama 4096 1 fp32 up
llama 4096 1 fp32 all
llama 4096 1 bf16 none
llama 8192 1 bf16 up
qwen2 1024 1 fp32 up
qwen2 2048 1 bf16 all
qwen2 4096 1 bf16 none
llama 4096 cp2 fp32 none
llama 8192 cp2 bf16 up
qwen2 4096 cp2 bf16 none
llama 4096 tp2 fp32 none
qwen2 2048 tp2 bf16 up
llama 2048 pp2 fp32 none
qwen2 1024 pp2 bf16 all
llama 2048 dp2 fp32 up
qwen2 2048 dp2 bf16 none
qwen2 4096 dp2 bf16 up
""".strip().splitlines()
    )
]


def main() -> None:
    """Calibrate, predict, run, report; what is done already is not done again."""
    parser = argparse.ArgumentParser(
        prog="benchmark_plan.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("plan-benchmark"), help="folder of everything")
    parser.add_argument("--seconds", type=float, default=60.0, help="about how long each calibration may take")
    parser.add_argument("--only", default="", help="only the runs whose names contain this")
    parser.add_argument("--redo-runs", action="store_true", help="run everything again; predictions stay")
    a = parser.parse_args()
    a.output.mkdir(parents=True, exist_ok=True)
    cases = [case for case in CASES if a.only in case.name]
    results = a.output / "results"
    # Before anything of a sitting of other code is removed.
    check_code(a.output)
    if a.redo_runs:
        shutil.rmtree(results, ignore_errors=True)
    results.mkdir(exist_ok=True)
    make_models(a.output)
    calibrate(a.output, a.seconds)
    predict(a.output)
    for number, case in enumerate(cases, start=1):
        path = results / f"{case.name}.json"
        if not path.exists():
            found = run(a.output, case)
            write_atomically(path, (json.dumps(found, indent=2) + "\n").encode())
        found = json.loads(path.read_text(encoding="utf-8"))
        print(
            f"{number} of {len(cases)}, {case.name}: {found['step_seconds']:.2f} s, {found['peak_gb']:.2f} GB",
            flush=True,
        )
    report(a.output, cases)


def check_code(output: Path) -> None:
    """Note the code of a sitting, or refuse to go on with one of other code."""
    path, code = output / "code.json", code_hash(script=Path(__file__))
    if not path.exists() and not (output / "predictions.json").exists() and not any(output.glob("cpu-*.yaml")):
        write_atomically(path, (json.dumps({"code": code}) + "\n").encode())
    began = json.loads(path.read_text(encoding="utf-8"))["code"] if path.exists() else "an earlier version"
    if began != code:
        sys.exit(
            f"error: the sitting in {output} is of other code ({began}) than this ({code}); name another folder with --output"
        )


def _environment() -> dict[str, str]:
    """One thread per process, whatever their number."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MEGATRON_LONGPO_PLATFORM": "cpu"}


def _check(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=_environment())
    if done.returncode:
        sys.exit(
            f"error: {' '.join(command)} ended with status {done.returncode}: {(done.stdout + done.stderr)[-3000:]}"
        )


def make_models(output: Path) -> None:
    """Random models as checkpoints, and data of every length."""
    from transformers import AutoConfig, AutoModelForCausalLM

    for name, values in MODELS.items():
        checkpoint = output / "models" / name
        if not checkpoint.exists():
            config = AutoConfig.for_model(**values)
            folder = output / "models" / f"{name}-hf"
            AutoModelForCausalLM.from_config(config, trust_remote_code=False).save_pretrained(folder)
            _check(
                [
                    sys.executable,
                    str(CONVERT),
                    "import",
                    "--hf",
                    str(folder),
                    "--output",
                    str(checkpoint),
                    "--no-verify",
                ]
            )
            shutil.rmtree(folder)
    for case in CASES:
        prefix = data_of(output, case)
        if not prefix.with_suffix(".json").exists():
            write_data(prefix, case)


def data_of(output: Path, case: Case) -> Path:
    return output / "data" / f"{case.model}-{case.length}-{case.samples}"


def write_data(prefix: Path, case: Case) -> None:
    """Samples of random tokens, all of the same lengths."""
    from megatron_longpo.data.indexed import Manifest, SampleWriter
    from megatron_longpo.simulation.data import made_up_sample

    vocabulary = MODELS[case.model]["vocab_size"]
    prefix.parent.mkdir(exist_ok=True)
    writer = SampleWriter(prefix, Manifest(vocabulary, "int32", None, None, None), "benchmark")
    sample = made_up_sample(case.length, answer=_ANSWER, turns=1, vocab_size=vocabulary, short=_SHORT)
    for _ in range(case.samples * _STEPS):
        writer.add(sample)
    writer.finish()


# --------------------------------------------------------------------------------------------------
# Predictions
# --------------------------------------------------------------------------------------------------


def calibrate(output: Path, seconds: float) -> None:
    """Measure the machine with one and with two busy processes."""
    for processes in (1, 2):
        file = output / f"cpu-{processes}.yaml"
        if not file.exists():
            command = [sys.executable, "-m", "megatron_longpo.cli", "plan", "calibrate", "--output", str(file)]
            _check([*command, "--nproc-per-node", str(processes), "--seconds", str(seconds)])


def predict(output: Path) -> None:
    """Write down what the planner says of every run, before any of them."""
    path = output / "predictions.json"
    if path.exists():
        return
    predictions = {case.name: prediction(output, case) for case in CASES}
    content = {"written": datetime.datetime.now(datetime.timezone.utc).isoformat(), "predictions": predictions}
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def prediction(output: Path, case: Case) -> dict[str, Any]:
    """Seconds of a step and peak memory of a process, by part."""
    from megatron_longpo.config import from_dict
    from megatron_longpo.model.shape import ModelShape
    from megatron_longpo.planner.machine import load_machine
    from megatron_longpo.planner.search import Search
    from megatron_longpo.planner.workload import made_up

    shape = ModelShape.read(output / "models" / case.model)
    config = from_dict(case.sections(), case.name)
    workload = made_up(config, shape, length=case.length, answer=_ANSWER, turns=1, short=_SHORT, samples=None)
    machine = load_machine(str(output / f"cpu-{case.processes}.yaml"))
    plan = Search(config, shape, machine, case.processes, workload).as_configured()
    return {
        "step_seconds": plan.seconds,
        "peak_gb": (plan.memory.total + machine.reserved_bytes) / 2**30,
        "seconds": {name: value for name, value in plan.time.parts.items() if value},
        "bytes": plan.memory.parts(),
    }


# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------


def run(output: Path, case: Case) -> dict[str, Any]:
    """Train for some steps by the training command."""
    import yaml

    folder = output / "run"
    shutil.rmtree(folder, ignore_errors=True)
    sections = case.sections()
    sections["data"]["data_path"] = str(data_of(output, case))
    sections["checkpoint"] = {"load": str(output / "models" / case.model), "save": str(folder), "no_save_optim": True}
    config = output / "run.yaml"
    config.write_text(yaml.safe_dump(sections), encoding="utf-8")
    load = os.getloadavg()[0]
    launcher = [sys.executable]
    if case.processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(case.processes), "--standalone"]
    began = time.monotonic()
    _check([*launcher, "-m", "megatron_longpo.train", "--config", str(config)])
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [record for record in map(json.loads, lines) if "step_seconds" in record]
    return {
        "step_seconds": statistics.median(record["step_seconds"] for record in steps[1:]),
        "peak_gb": max(record["peak_memory_gb"] for record in steps),
        "steps": [record["step_seconds"] for record in steps],
        "load_before": load,
        "run_seconds": time.monotonic() - began,
    }


def report(output: Path, cases: list[Case]) -> None:
    """Write OUTPUT/table.md: predictions beside measurements."""
    content = json.loads((output / "predictions.json").read_text(encoding="utf-8"))
    rows, times, peaks = [], [], []
    for case in cases:
        found = json.loads((output / "results" / f"{case.name}.json").read_text(encoding="utf-8"))
        said = content["predictions"][case.name]
        times.append(said["step_seconds"] / found["step_seconds"] - 1)
        peaks.append(said["peak_gb"] / found["peak_gb"] - 1)
        rows.append(
            [
                *map(str, dataclasses.astuple(case)),
                f"{said['step_seconds']:.2f}",
                f"{found['step_seconds']:.2f}",
                f"{times[-1]:+.0%}",
                f"{said['peak_gb']:.2f}",
                f"{found['peak_gb']:.2f}",
                f"{peaks[-1]:+.0%}",
            ]
        )
    head = "model | tokens | layout | type | recomputed | step, s: predicted | measured | | peak, GB: predicted | measured | "
    lines = [
        f"{describe_machine()}; one thread per process. Predictions written at {content['written']}, before the runs.",
        "",
        *markdown_table(head.split(" | "), rows),
        "",
        _summary("Step time", times, _TIME_BOUND),
        _summary("Peak memory", peaks, _MEMORY_BOUND),
    ]
    text = "\n".join(lines) + "\n"
    write_atomically(output / "table.md", text.encode())
    print(text)


def _summary(name: str, errors: list[float], bound: float) -> str:
    distances = np.abs(errors)
    return (
        f"{name}: {int((distances <= bound).sum())} of {len(errors)} within {bound:.0%}; median distance "
        f"{np.median(distances):.1%}, largest {distances.max():.1%}."
    )


if __name__ == "__main__":
    main()
