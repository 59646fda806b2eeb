"""The simulating process: requests as lines on standard input, reports as lines of a file. Arguments: that file, and the card.

A process of its own, since ``torch.cuda`` and torch's collectives are replaced for good (``start.py`` starts it).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from megatron_longpo.simulation import shim
from megatron_longpo.simulation.request import Card

if __name__ == "__main__":
    os.environ["MEGATRON_LONGPO_PLATFORM"] = "cuda"
    # Before anything that imports torch.
    shim_library = shim.load(shim.build())
    from megatron_longpo.simulation.device import install

    shim_library.replace_guard()

    # Before anything that imports megatron-core.
    install(Card.from_json(sys.argv[2]))
    from megatron_longpo.runtime.failure import run_or_fail
    from megatron_longpo.simulation.step import serve

    run_or_fail(lambda: serve(sys.stdin, Path(sys.argv[1])))
