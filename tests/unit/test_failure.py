"""Who names the cause when a process of several fails."""

from __future__ import annotations

from typing import NoReturn

import pytest

from megatron_longpo import failure
from megatron_longpo.errors import DataError


class _Ended(BaseException):
    pass


def _end(code: int) -> NoReturn:
    raise _Ended(code)


@pytest.mark.parametrize(
    ("rank", "apart", "error", "told"),
    [
        # What fails before ranks can ask one another fails on all of them alike.
        ("0", False, DataError("no such file"), "error: no such file"),
        ("1", False, DataError("no such file"), ""),
        ("1", False, RuntimeError("out of memory"), ""),
        # A rank that works by itself fails by itself.
        ("1", True, DataError("no such file"), "error: rank 1: no such file"),
        ("1", True, RuntimeError("out of memory"), "error: rank 1 failed: RuntimeError: out of memory"),
    ],
)
def test_the_rank_that_knows_the_cause_names_it(
    rank: str,
    apart: bool,
    error: Exception,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(failure.os, "_exit", _end)
    monkeypatch.setattr(failure, "_LINGER_SECONDS", 0.0)
    monkeypatch.setattr(failure, "_apart", False)
    # Another test of this process may have made a group.
    monkeypatch.setattr(failure.dist, "is_initialized", lambda: False)

    def action() -> None:
        failure.work_apart(apart)
        raise error

    with pytest.raises(_Ended, match="2" if isinstance(error, DataError) else "1"):
        failure.run_or_fail(action)
    assert (capsys.readouterr().err.strip().splitlines() or [""])[-1] == told
