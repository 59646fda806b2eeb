"""What the fork server imports before it forks: this package, and what it imports late.

Only the server imports this module.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import pkgutil

import megatron_longpo

# Command lines themselves, which ``-m`` runs as ``__main__``.
_NOT_IMPORTED = ("megatron_longpo.train", "megatron_longpo.__main__")
_LATE = (
    *("torch.distributed.run", "torch.distributed.launcher.api", "matplotlib.pyplot", "tyro", "sentencepiece"),
    *(f"transformers.models.{f}.modeling_{f}" for f in ("llama", "mistral", "qwen2", "qwen3", "glm")),
    *("transformers.generation", "transformers.pipelines", "megatron.core.dist_checkpointing.strategies.async_utils"),
)

for name in [m.name for m in pkgutil.walk_packages(megatron_longpo.__path__, "megatron_longpo.")] + list(_LATE):
    # What needs an extra that is not installed is not tested either.
    with contextlib.suppress(ModuleNotFoundError):
        if name not in _NOT_IMPORTED:
            importlib.import_module(name)
# What is never collected is never written to, and so stays shared by the children.
gc.freeze()

IMPORTED_BY = os.getpid()
THREADS = len(os.listdir("/proc/self/task"))
