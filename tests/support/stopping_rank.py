"""Two ranks, one of which stops where the other waits for it: ``stopping_rank RANK``."""

from __future__ import annotations

import datetime
import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from megatron_longpo.runtime.failure import run_or_fail
from megatron_longpo.runtime.heartbeat import start_heartbeat


def main() -> None:
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=5))
    start_heartbeat()
    dist.all_reduce(torch.ones(1))
    time.sleep(2)
    if os.environ["RANK"] == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.all_reduce(torch.ones(1))


if __name__ == "__main__":
    run_or_fail(main)
