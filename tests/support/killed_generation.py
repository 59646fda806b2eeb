"""Generate pairs in three parts, killed ten times at random moments; then let them finish, and merge.

The program is forked rather than started afresh, so that the time goes into its work.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

from tools import generate_preference_data

KILLS, PARTS = 10, 3


def lines_in(folder: Path) -> dict[str, int]:
    """Whole lines of each stage of a part."""
    return {p.name: p.read_bytes().count(b"\n") for p in folder.glob("*.jsonl")}


def attempt(arguments: list[str], folder: Path, more: int | None) -> bool:
    """Run the program in a child and kill it once its part has gained that many lines; returns whether it finished."""
    child = os.fork()
    if child == 0:
        sys.argv = ["generate_preference_data.py", *arguments]
        try:
            generate_preference_data.main()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    limit = None if more is None else sum(lines_in(folder).values()) + more
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0, "the program failed by itself"
            return True
        if limit is not None and sum(lines_in(folder).values()) >= limit:
            # At a random moment of the work that follows.
            time.sleep(random.uniform(0.0, 0.04))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.002)


def main() -> None:
    import transformers  # noqa: F401 - once, for all children

    import megatron_longpo.generation.run  # noqa: F401

    arguments = sys.argv[1:]
    output = Path(arguments[arguments.index("--output") + 1])
    folders = [output.with_name(output.name + ".work") / f"part-{p:02d}-of-{PARTS:02d}" for p in range(PARTS)]
    rng = random.Random(7)
    kills, cut, finished = 0, set(), set()
    while kills < KILLS:
        part = rng.choice([p for p in range(PARTS) if p not in finished])
        split = ["--rank", str(part), "--world-size", str(PARTS)]
        if attempt([*arguments, *split], folders[part], 1):
            finished.add(part)
        else:
            kills += 1
            counts = lines_in(folders[part])
            # The stage that was being written.
            cut |= {n for n, c in counts.items() if 0 < c < counts["documents.jsonl"]} or {"documents.jsonl"}
    print(f"killed {kills} times; while writing: {' '.join(sorted(cut))}")
    for part in range(PARTS):
        attempt([*arguments, "--rank", str(part), "--world-size", str(PARTS)], folders[part], None)
    attempt(["merge", "--output", str(output)], folders[0], None)


if __name__ == "__main__":
    main()
