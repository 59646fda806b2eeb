"""How a run ends when something fails: the cause is printed once, and every process ends soon."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta

from megatron_longpo.errors import LongPOError, one_line

_LINGER_SECONDS = 3.0


def _first_to_fail() -> bool:
    """Whether this rank prints the cause: the first one to get here, or rank 0 if the ranks share no store."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    # Not at the top: a command line that only prints its help should not wait for torch.
    import torch.distributed as dist

    environment = os.environ
    try:
        if dist.is_initialized():
            store = dist.distributed_c10d._get_default_store()
        elif _has_store():
            # torchrun's own store, which exists before any process group: ranks that work separately may fail separately.
            address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
            store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10), wait_for_workers=False)
        else:
            return int(environment.get("RANK", "0")) == 0
        attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
        return store.add(f"megatron_longpo/failed/{attempt}", 1) == 1
    except Exception:
        return True


def _has_store() -> bool:
    """Whether the ranks share a store, their process group's or torchrun's, by which they know who failed first."""
    import torch.distributed as dist

    return dist.is_initialized() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def run_or_fail(action: Callable[[], None]) -> None:
    """Run the main function of a program. The exit status is 2 for an error that the user can fix, and 1 for any other.

    Only one rank prints its error. The process exits without waiting for peers that are blocked on it. A rank that prints
    nothing lingers a moment, since its exit makes the launcher stop the rank that is still printing.
    """
    code, named = 0, True
    try:
        action()
    except LongPOError as error:
        code, named = 2, _first_to_fail()
        if named:
            print(f"error: {error}", file=sys.stderr)
        elif not _has_store() and os.environ.get("LOCAL_RANK") == "0":
            # On another node the cause may be another: its disk may lack a file that the first one has.
            print(f"rank {os.environ.get('RANK')}: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
    except SystemExit:
        raise
    except BaseException as error:
        code, named = 1, _first_to_fail()
        if named:
            rank = os.environ.get("RANK", "0")
            text = str(error)
            if _is_lost_peer(text):
                print(
                    f"error: rank {rank} lost a peer process ({one_line(text)}); the launcher's report names the process "
                    "that died",
                    file=sys.stderr,
                )
            else:
                traceback.print_exc()
                print(f"error: rank {rank} failed: {type(error).__name__}: {text}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        if not named:
            time.sleep(_LINGER_SECONDS)
        os._exit(code)


def _is_lost_peer(text: str) -> bool:
    signs = ("Connection closed by peer", "Connection reset by peer", "NCCL error", "ncclRemoteError", "Broken pipe")
    return any(sign in text for sign in signs)
