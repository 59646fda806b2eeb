"""Who names the cause when a process of several fails before they have made a group."""

from __future__ import annotations

from typing import NoReturn

import pytest
import torch.distributed as dist

from megatron_longpo.errors import DataError
from megatron_longpo.runtime import failure


class _Ended(BaseException):
    pass


def _end(code: int) -> NoReturn:
    raise _Ended(code)


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Lets a rank fail, and gives the last line that it says."""
    monkeypatch.setattr(failure.os, "_exit", _end)
    monkeypatch.setattr(failure, "_LINGER_SECONDS", 0.0)
    # Another test of this process may have made a group.
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)

    def failing(rank: str, error: Exception) -> str:
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)

        def action() -> None:
            raise error

        with pytest.raises(_Ended, match="2" if isinstance(error, DataError) else "1"):
            failure.run_or_fail(action)
        return (capsys.readouterr().err.strip().splitlines() or [""])[-1]

    return failing


def test_where_ranks_cannot_ask_the_first_names_it(fail) -> None:  # type: ignore[no-untyped-def]
    assert fail("1", DataError("no such file")) == ""
    assert fail("0", DataError("no such file")) == "error: no such file"
    assert fail("1", RuntimeError("out of memory")) == ""


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (DataError("no such file"), "error: no such file"),
        (RuntimeError("out of memory"), "error: rank 1 failed: RuntimeError: out of memory"),
    ],
)
def test_under_torchrun_whoever_fails_first_names_it(  # type: ignore[no-untyped-def]
    fail, error: Exception, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a rank other than the first, which may fail alone; and only one."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    assert fail("1", error) == told
    assert fail("0", error) == ""
