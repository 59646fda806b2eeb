"""A forked command line does what a fresh one does, and a launch of forked workers ends as torchrun's."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from tests.support.launch import PYTHON, Running, environment, run, torchrun

PROGRAM = """
import os, sys
print(__name__, sys.argv[1:], os.getcwd(), os.environ["WORD"], len(os.listdir("/proc/self/task")))
print("to stderr", file=sys.stderr)
sys.exit(3)
"""
# Rank 1 ends with an error; the others would wait for it.
UNEQUAL = """
import os, sys, time
print(f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}", flush=True)
if os.environ["RANK"] == "1":
    sys.exit(3)
time.sleep(300)
"""


def test_a_forked_command_line_does_what_a_fresh_one_does(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    for line in (["-c", PROGRAM, "--flag", "value"], [str(tmp_path / "program.py"), "--flag", "value"]):
        fresh, forked = (run([PYTHON, *line], env=environment(WORD="x"), expect=3, fresh=f) for f in (True, False))
        assert forked.stdout == fresh.stdout and forked.stderr == fresh.stderr == "to stderr\n"
        assert fresh.stdout.startswith("__main__ ['--flag', 'value'] /") and fresh.stdout.endswith(" x 1\n")


@pytest.mark.parametrize("fresh", [False, True], ids=["forked", "fresh"])
def test_a_rank_that_fails_ends_the_launch(tmp_path: Path, fresh: bool) -> None:
    (tmp_path / "program.py").write_text(UNEQUAL)
    done = run(torchrun(3, str(tmp_path / "program.py")), expect=1, timeout=60, fresh=fresh)
    assert sorted(done.stdout.splitlines()) == ["rank 0 of 3", "rank 1 of 3", "rank 2 of 3"]
    assert "exitcode  : 3" in done.stderr


def test_kill_ends_a_launch_and_its_workers(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("import time\ntime.sleep(300)\n")
    running = Running(torchrun(2, str(tmp_path / "program.py")))
    deadline = time.monotonic() + 60
    while len(running.children()) < 2:
        assert running.poll() is None and time.monotonic() < deadline, running.output()
        time.sleep(0.05)
    workers = [psutil.Process(pid) for pid in running.children()]
    running.kill()
    assert running.poll() == -9
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
