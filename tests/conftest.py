"""Tests may import megatron-core before the package: the platform prepares it first."""

import os
from collections.abc import Iterator

import pytest

# isort: off
from tests.support import gpus  # before the platform, whose functions of torch.cuda it would ask

gpus.stay_on_the_cpu()
import megatron_longpo.runtime.platform  # noqa: E402, F401

# isort: on

# What a doctor found on this machine is no matter of the tests.
os.environ.setdefault("MEGATRON_LONGPO_DOCTOR_RECORD", "ignore")


@pytest.fixture(autouse=True)
def _no_process_group_stays() -> Iterator[None]:
    """A test that leaves a process group fails: a test of the next file would not get one of its own."""
    yield
    import torch.distributed as dist

    if dist.is_initialized():
        from megatron_longpo.runtime.process_groups import stop_processes

        stop_processes()
        pytest.fail("this test has left its process group; stop_processes() ends it")


@pytest.fixture(autouse=True)
def _no_rank_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """What start_processes puts into the environment goes with the test: accelerate would take a later one for a rank."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        if name in os.environ:
            monkeypatch.setenv(name, os.environ[name])
        else:
            monkeypatch.setenv(name, "")  # so that the test's end removes what the test itself sets
            monkeypatch.delenv(name)
