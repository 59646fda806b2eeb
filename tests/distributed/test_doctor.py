"""The doctor on several ranks: it passes, each fault is named by its line, and a hang ends as one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.doctor.steps import layouts
from megatron_longpo.runtime.machine_record import VARIABLE, read_record
from tests.support.launch import PYTHON, environment, run, torchrun


def test_two_ranks_pass_and_leave_a_report_and_a_record(tmp_path: Path) -> None:
    arguments = ["-m", "megatron_longpo.doctor", "--json", "found.json", "--folder", ".", "--time-limit", "900"]
    arguments += ["--check-time-limit", "300"]
    env = environment(**{VARIABLE: str(tmp_path / "record.json")})
    done = run(torchrun(2, *arguments), env=env, folder=tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    status = {line["name"]: line["status"] for line in found["lines"]}
    assert set(status.values()) == {"pass", "skipped"}, status
    assert [name for name, value in status.items() if value == "skipped"] == [
        *("memory for the model", "Transformer Engine's layers against local ones, bfloat16"),
    ]
    assert {f"step, {layout.name}, float32" for layout in layouts(2)} <= status.keys()
    assert {
        "attention flash, bfloat16",
        "all_to_all over CP, bfloat16",
        "checkpoint, saved and resumed in DP 2",
    } <= status.keys()
    assert found["status"] == "pass" and found["facts"]["torch"]
    assert "send and receive over PP, float32" in done.stdout and "fail" not in done.stdout
    record = read_record(tmp_path / "record.json")
    assert record is not None and record.wrong == ()
    # What it wrote for the checks is gone.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.json", "record.json"]


def test_a_wrong_kernel_is_reported_and_recorded(tmp_path: Path) -> None:
    """On one rank, by the command line; the kernel is replaced in the process."""
    program = (
        "import sys, torch\n"
        "from megatron_longpo import cli\n"
        "from megatron_longpo.model.kernels import CpuFlash\n"
        "real = CpuFlash.backward\n"
        "CpuFlash.backward = lambda self, block, grad_out, out, lse: real(self, block, grad_out, out.flip(0), lse)\n"
        "cli.run('doctor', prog='doctor', arguments=sys.argv[1:])\n"
    )
    env = environment(**{VARIABLE: str(tmp_path / "record.json")})
    done = run([PYTHON, "-c", program, "--time-limit", "1"], env=env, folder=tmp_path, expect=4)
    assert "--attention-backend unfused" in done.stdout
    record = read_record(tmp_path / "record.json")
    assert record is not None
    assert [wrong.kernel for wrong in record.wrong] == ["attention/flash/bfloat16", "attention/flash/float32"]


def test_a_kernel_that_hangs_is_reported_and_recorded(tmp_path: Path) -> None:
    program = (
        "import sys, time\n"
        "from megatron_longpo import cli\n"
        "from megatron_longpo.model.kernels import CpuFlash\n"
        "CpuFlash.forward = lambda self, block: time.sleep(600)\n"
        "cli.run('doctor', prog='doctor', arguments=sys.argv[1:])\n"
    )
    env = environment(**{VARIABLE: str(tmp_path / "record.json")})
    done = run([PYTHON, "-c", program, "--check-time-limit", "1"], env=env, folder=tmp_path, expect=4)
    assert "rank 0 hangs by itself" in done.stderr
    hang, rest = json.loads((tmp_path / "doctor.json").read_text())["lines"]
    assert (hang["name"], hang["status"], rest["status"]) == ("attention flash, bfloat16", "fail", "skipped")
    assert "no answer within 1 s" in hang["detail"]
    record = read_record(tmp_path / "record.json")
    assert record is not None and [wrong.kernel for wrong in record.wrong] == ["attention/flash/bfloat16"]


EXPECTED: dict[str, tuple[str, list[str]]] = {
    "ready": ("pass", []),
    "a rank dropped": (
        "fail",
        [
            *("all_reduce over world, float32", "all_reduce over TP, bfloat16"),
            *("all_reduce over CP, float32", "all_reduce over DP, float32"),
        ],
    ),
    "pieces permuted": ("fail", ["all_to_all over CP, bfloat16"]),
    "another tensor gathered": ("fail", [f"all_gather over {kind}, bfloat16" for kind in ("TP", "CP", "DP")]),
    "a slow broadcast": ("slow", ["broadcast over world, int32"]),
    "a slow disk": ("slow", ["disk speed"]),
    # And what comes next is looked at as ever.
    "a folder of one node": ("fail", ["disk space", "checkpoint"]),
    "a model of one node": ("fail", ["memory"]),
    "a sum left out": ("fail", ["step, CP 2 a2a, float32"]),
    "a tensor lost": ("fail", ["checkpoint, saved and resumed in DP 2", "checkpoint, resumed in CP 2 allgather"]),
}


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with what one launch found of all faults."""
    folder = tmp_path_factory.mktemp("faults")
    # torchrun's own status says only that ranks failed.
    done = run(torchrun(2, "-m", "tests.support.doctor_faults", str(folder)), expect=1, timeout=600)
    assert "exitcode  : 4" in done.stderr
    return folder


@pytest.mark.parametrize("fault", EXPECTED)
def test_a_fault_between_ranks_is_named_by_its_lines(faults: Path, fault: str) -> None:
    status, names = EXPECTED[fault]
    lines: list[list[Any]] = json.loads((faults / "found.json").read_text())[fault]
    by_status = {found: [name for name, kind, _ in lines if kind == found] for found in ("slow", "fail")}
    # On a machine that does other work besides anything may be slow.
    assert by_status["fail"] == (names if status == "fail" else [])
    assert status != "slow" or set(names) <= set(by_status["slow"])
    assert len(lines) > len(names) or fault in ("a tensor lost",)


def test_a_collective_that_hangs_is_a_line_that_names_it_and_the_rank(faults: Path) -> None:
    lines = json.loads((faults / "doctor.json").read_text())["lines"]
    hang, rest = lines[-2:]
    assert (hang["name"], hang["status"], rest["status"]) == ("collectives over TP", "fail", "skipped")
    assert "no answer within 8 s from rank 0-1 in reduce_scatter over TP, bfloat16" in hang["detail"]
    assert "NCCL_DEBUG" in hang["remedy"]
