"""``pip install .``: the wheel has the console command, the type marker and the files that the package reads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.support.launch import ROOT

# Files of the package that are not modules.
DATA = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "megatron_longpo").rglob("*")
    if path.is_file() and path.suffix not in (".py", ".pyc")
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the tree, built from a copy: building leaves files in the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split("\n")
    if not any(names):  # not a git checkout
        names = [str(p.relative_to(ROOT)) for p in ROOT.glob("*.*")] + ["LICENSE", "NOTICE"]
        names += [str(p.relative_to(ROOT)) for p in (ROOT / "megatron_longpo").rglob("*") if p.is_file()]
    for name in filter(None, names):
        if (ROOT / name).is_file():
            target = folder / "tree" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    pip(sys.executable, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(folder / "tree"))
    (built,) = folder.glob("*.whl")
    return built


def pip(python: str, *arguments: str) -> None:
    line = [python, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    modules = [str(p.relative_to(ROOT)) for p in (ROOT / "megatron_longpo").rglob("*.py")]
    assert {*modules, *DATA} == {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert "megatron_longpo/py.typed" in names
    assert any(name.endswith("LICENSE") for name in names) and any(name.endswith("NOTICE") for name in names)


def test_pip_install_gives_the_console_command(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own, with the dependencies of this one."""
    venv.create(tmp_path / "env", with_pip=True)
    binaries = tmp_path / "env" / "bin"
    pip(str(binaries / "python"), "install", "--no-deps", str(wheel))
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    # By a .pth file, not by system-site-packages: this environment may itself be a virtual one.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def command(*arguments: str) -> str:
        line = [str(binaries / "megatron-longpo"), *arguments]
        done = subprocess.run(line, capture_output=True, text=True, timeout=60, cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert (
        "{train,status,watch,compare-runs,replay,simulate,plan,doctor,convert,preprocess,generate,evaluate,evolve}"
        in command("--help")
    )
    assert "seed: 5" in command("train", "--seed", "5", "--print-config")
    assert "--max-shard-size" in command("convert", "export", "--help")
    where = "import megatron_longpo; print(megatron_longpo.__file__, megatron_longpo.__version__)"
    done = subprocess.run(
        [str(binaries / "python"), "-c", where], capture_output=True, text=True, cwd=tmp_path, env=env
    )
    assert done.stdout.startswith(str(site))


_ASK = "MEGATRON_LONGPO_TEST_INDEX"


@pytest.mark.skipif(not os.environ.get(_ASK), reason=f"asks the package index for minutes; set {_ASK}=1 to run it")
def test_what_pip_installs_on_a_gpu_machine_is_what_is_meant(tmp_path: Path) -> None:
    """In a new environment of Python 3.12: names and versions that pip resolves, without installing them."""
    python = shutil.which("python3.12")
    if python is None:
        pytest.skip("there is no python3.12")
    subprocess.run([python, "-m", "venv", str(tmp_path / "env")], check=True)
    report = tmp_path / "report.json"
    line = [str(tmp_path / "env" / "bin" / "python"), "-m", "pip", "install", "-q", "--dry-run", "--ignore-installed"]
    subprocess.run([*line, "--report", str(report), f"{ROOT}[gpu]"], check=True, timeout=900, cwd=tmp_path)
    check_resolved(json.loads(report.read_text(encoding="utf-8"))["install"])


def check_resolved(install: list[dict[str, Any]]) -> None:
    """A CUDA build of torch with its libraries, megatron-core for Python 3.12, wheels, and nothing that is compiled by hand."""
    versions = {entry["metadata"]["name"].lower(): entry["metadata"]["version"] for entry in install}
    assert versions["megatron-core"].startswith("0.19.") and "triton" in versions
    assert [name for name in versions if name.startswith("nvidia-nccl-cu")], "torch without CUDA"
    assert not versions.keys() & {"apex", "flash-attn", "transformer-engine"}
    sources = {entry["metadata"]["name"] for entry in install if not entry["download_info"]["url"].endswith(".whl")}
    # Pure Python, whose index has no wheel; and this project.
    assert sources <= {"rouge_score", "rouge-score", "megatron_longpo"}, sources
