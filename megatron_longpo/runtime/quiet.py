"""Messages of libraries that a user can do nothing about. Each is silenced with its reason; all others remain."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Callable
from typing import Any

_WARNINGS = (
    # megatron-core on other libraries' deprecations and on its own; seen with 0.16.1 and 0.19.2 on torch 2.13 and 2.14.
    "full scope is deprecated",
    "Please use DTensor instead",
    "`load_state_dict` is deprecated",
    "`torch.distributed.reduce_op` is deprecated",
    "`torch.distributed.reduce_scatter_tensor` is deprecated",
    "`torch.distributed.all_gather_into_tensor` is deprecated",
    "`torch.distributed._reduce_scatter_base` is deprecated",
    "`torch.distributed._all_gather_base` is deprecated",
    # Seen on CUDA, where torch guesses the right device.
    "barrier(): using the device under current context",
    # megatron-core calls its own function in the old way.
    "The argument order of load has been changed",
    # Conversions run on one process without a group, on purpose.
    "torch.distributed is disabled, unavailable or uninitialized",
    # megatron-core's schedules look at it; nothing of ours relies on it.
    "The .grad attribute of a Tensor that is not a leaf",
    # Five times at every start. Neither is needed: on a CPU both are always missing, and on CUDA the log names the layers and
    # kernels that were chosen.
    "If you are using transformer_engine as the transformer implementation",
    "Transformer Engine and Apex are not installed",
    "Apex is not installed. Falling back to Torch Norm",
)

_LOGGERS = (
    # State machine for suspicious results: off, and says so at every start.
    "megatron.core.rerun_state_machine",
    # Deprecated ways of making a model, which both supported versions still need.
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.transformer",
    # "load_common is deprecated" (0.19): checkpoints of 0.16 hold a common.pt, which that function reads.
    "megatron.core.dist_checkpointing.strategies.common",
)

_BARS = {
    # Bars for loading, converting and saving weights, and lm-eval's: they leave fragments in logs and break our own bar.
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}


def quiet_libraries() -> None:
    """Silence the messages above. Call it before the libraries are imported; environment variables that are set win."""
    for name, value in _BARS.items():
        os.environ.setdefault(name, value)
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=f".*{re.escape(message)}")
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    # Some imported module resets the filters, which does not touch what shows the warnings.
    warnings.showwarning = _without_known(warnings.showwarning)


def _without_known(show: Callable[..., Any]) -> Callable[..., Any]:
    def shown(message: Warning | str, *arguments: Any, **more: Any) -> None:
        if not any(known in str(message) for known in _WARNINGS):
            show(message, *arguments, **more)

    return shown
