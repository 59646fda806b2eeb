"""Files by which runs are started: shell and batch files, manifests of Kubernetes, images."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.support.commands import parsed
from tests.support.kubernetes.make_schemas import SCHEMAS
from tests.support.launch import ROOT

SCRIPTS = Path(sysconfig.get_path("scripts"))
SLURM = sorted((ROOT / "examples" / "slurm").glob("*.sbatch"))
SHELL = [*SLURM, *sorted((ROOT / "examples").rglob("*.sh")), ROOT / ".ci" / "run"]
DOCKERFILES = sorted(ROOT.glob("Dockerfile*"))
MANIFESTS = {"pytorchjob": "KubeflowOrgV1PyTorchJob", "jobset": "JobsetV1alpha2JobSet"}

# --------------------------------------------------------------------------------------------------
# Rules
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "files"), [("shellcheck", SHELL), ("hadolint", DOCKERFILES)], ids=["shellcheck", "hadolint"]
)
def test_the_rules_for_such_files_are_kept(program: str, files: list[Path]) -> None:
    assert files
    done = subprocess.run([SCRIPTS / program, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# --------------------------------------------------------------------------------------------------
# Kubernetes
# --------------------------------------------------------------------------------------------------


def manifest(name: str) -> Any:
    return yaml.safe_load((ROOT / "examples" / "kubernetes" / f"{name}.yaml").read_text())


def errors_of(name: str, content: Any) -> list[str]:
    schema = json.loads(gzip.decompress(SCHEMAS.read_bytes()))
    schema["$ref"] = f"#/$defs/{MANIFESTS[name]}"
    found = jsonschema.Draft202012Validator(schema).iter_errors(content)
    return [f"{'.'.join(map(str, e.absolute_path))}: {e.message}" for e in found]


def pod_of(name: str, content: Any) -> Any:
    spec = content["spec"]
    if name == "pytorchjob":
        return spec["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    return spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_fits_its_published_schema(name: str) -> None:
    assert errors_of(name, manifest(name)) == []


def _misspell(name: str, content: Any) -> None:
    pod_of(name, content)["containers"][0]["imagePullPolice"] = "Always"


def _quote(name: str, content: Any) -> None:
    pod_of(name, content)["terminationGracePeriodSeconds"] = "120"


def _omit(name: str, content: Any) -> None:
    del pod_of(name, content)["containers"]


@pytest.mark.parametrize("change", [_misspell, _quote, _omit])
@pytest.mark.parametrize("name", MANIFESTS)
def test_a_mistake_in_a_manifest_is_found(name: str, change: Callable[[str, Any], None]) -> None:
    content = manifest(name)
    change(name, content)
    assert errors_of(name, content)


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_starts_training(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    container = pod_of(name, manifest(name))["containers"][0]
    line = [*container["command"], *container["args"]]
    assert line[:3] == ["python", "-m", "torch.distributed.run"]
    _, config = parsed("train", line[line.index("megatron_longpo.train") + 1 :])
    assert config.checkpoint.save == "/data/runs/longpo" and config.training.bf16
    # It may read and write its volume, in an image whose user is not root.
    assert pod_of(name, manifest(name))["securityContext"]["runAsUser"] == 10001
    assert any(mount["mountPath"] == "/dev/shm" for mount in container["volumeMounts"])


# --------------------------------------------------------------------------------------------------
# Slurm, with stand-ins for its commands; docs/cluster.md says what a real one did
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with srun, scontrol and scancel, which write their arguments to files in it."""
    programs = {
        # The configuration and the status of the run, else a step, which goes on until somebody signals it, if it is to.
        "srun": 'case "$*" in\n'
        '*--print-config*) printf "checkpoint:\\n  load: l\\n  save: the run\\n";exit;;\n'
        '*"status the run --alive"*) exit "$(cat silent)";;\n'
        '*"status the run"*) exit "$(cat answer)";;\n'
        "esac\n"
        'printf "%s\\n" "$@" >srun.args\n'
        'echo "$OMP_NUM_THREADS" >threads\n'
        '[ -e hold ] || exit "$(cat status)"\n'
        "trap 'exit 7' USR1 TERM\n"
        "echo $$ >started\nwhile :; do sleep 0.05; done",
        "scontrol": 'case $1 in show) echo node0; echo node1;; *) echo "$*" >>scontrol.args;; esac',
        "scancel": 'echo "$*" >>scancel.args; kill -USR1 "$(cat started)"',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for name, status in (("status", 0), ("silent", 0), ("answer", 75)):
        (tmp_path / name).write_text(str(status))
    job = {"JOB_ID": "41", "JOB_NODELIST": "node[0-1]", "JOB_NUM_NODES": "2", "GPUS_ON_NODE": "4", "CPUS_ON_NODE": "30"}
    for key, value in job.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    for key in ("OMP_NUM_THREADS", "MASTER_ADDR", "MASTER_PORT", "SLURM_ARRAY_TASK_ID", "CONTAINER_IMAGE", "PYTHON"):
        monkeypatch.delenv(key, raising=False)
    return tmp_path


def batch(slurm: Path, name: str, *arguments: str, status: int = 0) -> list[str]:
    """Run a batch file; the arguments that srun got."""
    file = ROOT / "examples" / "slurm" / f"{name}.sbatch"
    done = subprocess.run(
        ["bash", file, *arguments], cwd=slurm, capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == status, done.stderr
    return (slurm / "srun.args").read_text().splitlines()


def test_training_starts_one_torchrun_on_each_node(slurm: Path) -> None:
    line = batch(slurm, "train", "--lr", "1e-6")
    words = " ".join(line)
    assert "-m torch.distributed.run --nnodes 2 --nproc-per-node 4" in words
    assert "--rdzv-endpoint node0:20041 --rdzv-id 41.0 -m megatron_longpo.train --lr 1e-6" in words
    assert not any("container" in word for word in line)
    # 30 cores for 4 processes, rounded up.
    assert (slurm / "threads").read_text() == "8\n"


def test_a_container_holds_the_step(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONTAINER_IMAGE", "/images/longpo.sqsh")
    for file in SLURM:
        words = batch(slurm, file.stem, "x")
        assert "--container-image=/images/longpo.sqsh" in words and f"--container-mounts={slurm}:{slurm}" in words
    monkeypatch.setenv("CONTAINER_MOUNTS", "/data:/data,/runs:/runs")
    assert "--container-mounts=/data:/data,/runs:/runs" in batch(slurm, "train")


@pytest.mark.parametrize(
    ("silent", "answer", "restarts", "requeued"),
    [
        (0, 75, 0, True),
        (0, 2, 0, False),  # something must be changed first
        (1, 75, 0, False),  # the sign of life is an earlier launch's
        (0, 75, 20, False),  # often enough
    ],
)
def test_a_training_job_is_requeued_if_its_run_goes_on(
    slurm: Path, monkeypatch: pytest.MonkeyPatch, silent: int, answer: int, restarts: int, requeued: bool
) -> None:
    for name, status in (("status", 1), ("silent", silent), ("answer", answer)):
        (slurm / name).write_text(str(status))
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
    batch(slurm, "train", status=1)
    assert (slurm / "scontrol.args").exists() == requeued


@pytest.mark.parametrize(("status", "requeued"), [(75, True), (2, False), (0, False)])
def test_rounds_are_requeued_if_training_goes_on(slurm: Path, status: int, requeued: bool) -> None:
    (slurm / "status").write_text(str(status))
    batch(slurm, "evolve", status=status)
    assert (slurm / "scontrol.args").exists() == requeued


def until_out_of_time(slurm: Path, name: str) -> int:
    """Run a batch file until it gets Slurm's signal before the time limit; its exit status."""
    (slurm / "hold").touch()
    job = subprocess.Popen(["bash", ROOT / "examples" / "slurm" / f"{name}.sbatch"], cwd=slurm, start_new_session=True)
    try:
        ends = time.monotonic() + 20
        while not (slurm / "started").is_file() or not (slurm / "started").read_text():
            assert time.monotonic() < ends
            time.sleep(0.02)
        job.send_signal(signal.SIGUSR1)
        return job.wait(20)
    finally:
        if job.poll() is None or name in ("generate", "evaluate"):
            os.killpg(job.pid, signal.SIGKILL)


@pytest.mark.parametrize("name", ["train", "generate", "evaluate", "evolve"])
def test_a_job_that_is_out_of_time_is_requeued(slurm: Path, name: str) -> None:
    # That an earlier launch failed does not count.
    for file, answer in (("answer", 2), ("silent", 1)):
        (slurm / file).write_text(str(answer))
    status = until_out_of_time(slurm, name)
    assert (slurm / "scontrol.args").read_text() == "requeue 41\n"
    if name == "train":
        # The ranks saved first.
        assert (slurm / "scancel.args").read_text() == "--signal=USR1 41\n" and status == 7


@pytest.mark.parametrize("mounts", [None, "/lustre/runs:/runs"])
def test_a_job_that_failed_as_its_time_ran_out_is_not_requeued(
    slurm: Path, monkeypatch: pytest.MonkeyPatch, mounts: str | None
) -> None:
    """Also where the run's folder is seen in the container only: the status is asked where the run was."""
    asked = ""
    if mounts is not None:
        monkeypatch.setenv("CONTAINER_IMAGE", "/images/longpo.sqsh")
        monkeypatch.setenv("CONTAINER_MOUNTS", mounts)
        asked = f"*--container-mounts={mounts}"
    srun = (slurm / "srun").read_text().replace('*"status the run', f'{asked}*"status the run')
    (slurm / "srun").write_text(srun.replace("trap 'exit 7'", "trap 'echo 2 >answer; exit 1'"))
    assert until_out_of_time(slurm, "train") == 1 and (slurm / "scancel.args").exists()
    assert not (slurm / "scontrol.args").exists()


def test_rounds_that_failed_as_their_time_ran_out_are_not_requeued(slurm: Path) -> None:
    (slurm / "srun").write_text((slurm / "srun").read_text().replace("exit 7", "exit 2"))
    assert until_out_of_time(slurm, "evolve") == 2 and not (slurm / "scontrol.args").exists()


def test_the_tasks_of_an_array_share_an_evaluation(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "8")
    line = batch(slurm, "evaluate", "--tasks", "ruler")
    assert line[1:] == ["-m", "megatron_longpo.cli", "evaluate", "--tasks", "ruler", "--rank", "3", "--world-size", "8"]


def test_command_lines_in_the_comments_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = []
    for file in [*SLURM, *sorted((ROOT / "examples" / "torchrun").glob("*.sh"))]:
        comments = "\n".join(line[1:] for line in file.read_text().splitlines() if line.startswith("#"))
        program = rf"examples/\w+/{re.escape(file.name)} (.*)"
        for line in re.findall(program, comments.replace("\\\n", " ")):
            command = "train" if file.suffix == ".sh" else file.stem
            arguments = [word.strip("'") for word in line.split()]
            parsed(command, arguments)
            found.append(file)
            break
    assert set(found) == {*SLURM, *(ROOT / "examples" / "torchrun").glob("*.sh")}


# --------------------------------------------------------------------------------------------------
# torchrun
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["one_node", "several_nodes", "elastic"])
def test_an_example_of_torchrun_is_accepted(name: str, tmp_path: Path) -> None:
    """By torchrun's own parser."""
    (tmp_path / "python").write_text('#!/bin/sh\nshift 2\nprintf "%s\\n" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    variables = {"PYTHON": str(tmp_path / "python"), "NODES": "2:4", "MASTER_ADDR": "node0", "PATH": os.environ["PATH"]}
    file = ROOT / "examples" / "torchrun" / f"{name}.sh"
    done = subprocess.run([file, "--lr", "1e-6"], env=variables, capture_output=True, text=True, check=True)
    from torch.distributed.run import parse_args

    read = parse_args(done.stdout.splitlines())
    assert read.training_script == "megatron_longpo.train" and read.training_script_args == ["--lr", "1e-6"]
    assert read.nproc_per_node == "gpu"
    if name != "one_node":
        assert (read.nnodes, read.rdzv_backend, read.rdzv_endpoint) == ("2:4", "c10d", "node0:29500")


# --------------------------------------------------------------------------------------------------
# Images
# --------------------------------------------------------------------------------------------------


def instructions(file: Path) -> list[tuple[str, str]]:
    """Instructions of a Dockerfile, continued lines joined."""
    lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in joined.splitlines() if line]


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_an_image_is_whole(file: Path) -> None:
    steps = instructions(file)
    for word, rest in steps:
        if word == "COPY":
            *sources, _ = rest.split()
            assert all((ROOT / source).exists() for source in sources), rest
    last = [word for word, _ in steps]
    last = last[len(last) - 1 - last[::-1].index("FROM") :]
    assert {"LABEL", "USER", "HEALTHCHECK", "ENTRYPOINT"} <= set(last)
    assert [rest for word, rest in steps if word == "ENTRYPOINT"][-1] == '["megatron-longpo"]'


def test_the_cpu_image_takes_the_pinned_torch(tmp_path: Path) -> None:
    """The step that reads the version, in a shell."""
    (run,) = [rest for word, rest in instructions(ROOT / "Dockerfile.cpu") if word == "RUN" and "sed" in rest]
    sh = shutil.which("sh")
    assert sh is not None
    found = re.search(r"torch=\$\(sed .*?\.txt\)", run)
    assert found is not None
    done = subprocess.run(
        [sh, "-c", f'{found[0]}; echo "$torch"'], cwd=ROOT, capture_output=True, text=True, check=True
    )
    pinned = re.findall(r'^(torch==[\d.]+); python_version >= "3.12"$', (ROOT / "constraints.txt").read_text(), re.M)
    assert done.stdout.split() == pinned and len(pinned) == 1


@pytest.mark.parametrize("became", ["2.8", "2.9"])
def test_the_image_for_gpus_keeps_the_torch_of_its_base(became: str, tmp_path: Path) -> None:
    """Its step with stand-ins for python and pip: the second call of python sees what pip left."""
    (run,) = [rest for word, rest in instructions(ROOT / "Dockerfile") if word == "RUN" and "pip" in rest]
    (tmp_path / "torch").write_text("2.8")
    for name, body in (("python", "cat torch"), ("pip", f"printf {became} >torch")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", run], cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
    )
    assert (done.returncode == 0) == (became == "2.8"), done.stderr
    assert became == "2.8" or "torch 2.8 of the base became 2.9" in done.stderr


def test_compose_builds_what_there_is() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    for service in services.values():
        build = service["build"]
        stages = re.findall(r"^FROM .* AS (\w+)$", (ROOT / build["dockerfile"]).read_text(), re.M)
        assert build["target"] in stages
    assert (ROOT / services["demo"]["entrypoint"][1]).exists()


def test_the_context_of_a_build_has_no_history() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", ".venv-*", ".demo"} <= set(ignored)
