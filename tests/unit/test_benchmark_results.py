"""Results that benchmarks keep: those of other code are not taken for this one's."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import benchmark_estimate
import benchmark_plan
import pytest

from common import code_hash
from megatron_longpo.simulation.request import Report


def test_the_hash_is_that_of_modules_and_machines_but_for_what_is_left_out(tmp_path: Path) -> None:
    for name in ("a.py", "planner/b.py", "planner/machines/c.yaml", "training/memory.py", "readme.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    whole, rest = (code_hash(*without, package=tmp_path) for without in ((), ("planner", "training/memory.py")))
    assert len(whole) == 12 and whole != rest
    (tmp_path / "readme.md").write_text("other")
    assert code_hash(package=tmp_path) == whole
    for name in ("planner/b.py", "planner/machines/c.yaml", "training/memory.py"):
        (tmp_path / name).write_text(f"changed {name}")
        assert code_hash(package=tmp_path) != whole
        assert code_hash("planner", "training/memory.py", package=tmp_path) == rest
    script = tmp_path / "a.py"
    assert code_hash(package=tmp_path, script=script) != code_hash(package=tmp_path)


def test_a_sitting_of_other_code_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark_plan.check_code(tmp_path)
    benchmark_plan.check_code(tmp_path)
    monkeypatch.setattr(benchmark_plan, "code_hash", lambda **_: "0123456789ab")
    with pytest.raises(SystemExit, match=r"is of other code \([0-9a-f]{12}\) than this \(0123456789ab\); name another"):
        benchmark_plan.check_code(tmp_path)
    # A folder of before there was such a note.
    (tmp_path / "code.json").unlink()
    (tmp_path / "predictions.json").touch()
    with pytest.raises(SystemExit, match="is of other code"):
        benchmark_plan.check_code(tmp_path)


def test_simulated_peaks_are_kept_and_the_estimate_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    simulated = []

    def simulate(requests: list[object], *, quiet: bool) -> list[Report]:
        simulated.extend(requests)
        return [Report(layout="one", recompute="nothing", peak_bytes=2**30, peak={"place": "here"}) for _ in requests]

    said = [2**29, 2**31]
    monkeypatch.setattr(benchmark_estimate, "simulate", simulate)
    monkeypatch.setattr(benchmark_estimate, "estimate", lambda *_: types.SimpleNamespace(tensor_bytes=said.pop(0)))
    monkeypatch.setattr(benchmark_estimate, "PAIRS", benchmark_estimate.PAIRS[:1])
    monkeypatch.setattr(sys, "argv", ["benchmark_estimate.py", "--found", str(tmp_path / "found")])
    benchmark_estimate.main()
    benchmark_estimate.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| mistral")]
    assert len(simulated) == 1
    assert [row.split(" | ")[-3:] for row in rows] == [["1.00", "0.50", "-50.0% |"], ["1.00", "2.00", "+100.0% |"]]
    (file,) = (tmp_path / "found").iterdir()
    assert "estimate" not in json.loads(file.read_text())
    # Code that simulates.
    monkeypatch.setattr(benchmark_estimate, "code_hash", lambda *_: "other")
    said.append(2**30)
    benchmark_estimate.main()
    assert len(simulated) == 2
