"""Pair generation in three parts, killed ten times at random moments, then let finish and merged.

The program is forked rather than started anew each time, so that the time goes into its work.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
KILLS, PARTS = 10, 3


def attempt(arguments: list[str], seconds: float | None) -> bool:
    """Run the program in a child, killed after so many seconds; says whether it finished."""
    import generate_preference_data

    child = os.fork()
    if child == 0:
        sys.argv = ["generate_preference_data.py", *arguments]
        try:
            generate_preference_data.main()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    end = None if seconds is None else time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0, "the program failed by itself"
            return True
        if end is not None and time.monotonic() >= end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.002)


def main() -> None:
    import transformers  # noqa: F401 - once, for all children

    import megatron_longpo.generation.engines  # noqa: F401

    arguments, longest = sys.argv[2:], float(sys.argv[1])
    rng = random.Random(7)
    kills, finished = 0, set()
    while kills < KILLS:
        part = rng.randrange(PARTS)
        split = ["--rank", str(part), "--world-size", str(PARTS)]
        # A part that is finished is begun again once in a while, as a scheduler would.
        if attempt([*arguments, *split], rng.uniform(0.0, longest)):
            finished.add(part)
            longest *= 0.7
        else:
            kills += 1
    print(f"killed {kills} times; finished between: {sorted(finished)}")
    for part in range(PARTS):
        attempt([*arguments, "--rank", str(part), "--world-size", str(PARTS)], None)
    output = arguments[arguments.index("--output") + 1]
    attempt(["merge", "--output", output], None)


if __name__ == "__main__":
    main()
