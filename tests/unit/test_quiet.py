"""Known messages of libraries are silenced, in a process as a user starts it; all others are shown."""

from __future__ import annotations

import subprocess
import sys

from tests.support.launch import environment

PROGRAM = """
from megatron_longpo.runtime import platform
import logging, warnings
import tqdm, transformers
warnings.warn("Transformer Engine and Apex are not installed. Falling back to Torch optimizers.")
logging.getLogger("megatron.core.dist_checkpointing.strategies.common").warning("load_common is deprecated")
list(tqdm.tqdm([1, 2]))
list(transformers.utils.logging.tqdm([1, 2]))
warnings.warn("something else")
logging.getLogger("megatron.core.dist_checkpointing.strategies.torch").warning("another warning")
"""


def test_only_messages_with_a_reason_are_silenced() -> None:
    variables = environment()
    for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        variables.pop(name, None)
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    shown = [line for line in done.stderr.splitlines() if not line.startswith(" ")]
    assert [line.rpartition(": ")[2] for line in shown] == ["something else", "another warning"], done.stderr
