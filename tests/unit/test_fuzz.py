"""Every reader on some changed files, and on all that ever broke one; the long run is ``python -m tests.fuzz``."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from tests.support.launch import PYTHON, ROOT, environment

pytestmark = pytest.mark.slow

KEPT = ROOT / "tests" / "fuzz" / "kept"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What became of each input, by reader; made in a process without threads, which forks a child per reader."""
    folder = tmp_path_factory.mktemp("fuzz")
    line = [PYTHON, "-m", "tests.fuzz", "--folder", str(folder), "--check"]
    done = subprocess.run(
        line, cwd=ROOT, env=environment(HF_HUB_OFFLINE="1"), capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    found: dict[str, dict[str, str]] = json.loads((folder / "outcomes.json").read_text())
    return found


def test_changed_files_are_read_or_refused(outcomes: dict[str, dict[str, str]]) -> None:
    """No traceback, no code of the input, no memory or time beyond the limits, no damage that a checksum should show."""
    wrong = {
        f"{reader} {name}": what
        for reader, of in outcomes.items()
        for name, what in of.items()
        if what.startswith("finding")
    }
    assert not wrong, json.dumps(wrong, indent=1)


def test_every_reader_and_every_kept_input_was_run(outcomes: dict[str, dict[str, str]]) -> None:
    from tests.fuzz.readers import readers

    assert set(outcomes) == set(readers())
    for reader in os.listdir(KEPT):
        kept = {path.name for path in (KEPT / reader).iterdir()}
        assert kept and kept <= set(outcomes[reader])
