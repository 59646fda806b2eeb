"""Loaders for the pickles of distributed checkpoints that run no code.

torch.distributed.checkpoint stores its index (``.metadata``) as a pickle and opens it with ``pickle.load``, and it loads entries
that are not tensors with ``torch.load(weights_only=False)``. A pickle can name any function and have it called, so opening a
checkpoint from a stranger would run the stranger's code. Here the index is read by an unpickler that knows only the classes an
index consists of, and entries by torch's own restricted loader. Both replace the functions that torch calls, so checkpoints keep
their format, and those written before are read as well.
"""

from __future__ import annotations

import pickle
import types
from typing import IO, Any

import torch

# Modules and the names that the index of a checkpoint refers to: classes that only hold values, and one look-up of a layout.
_ALLOWED: dict[str, frozenset[str]] = {
    "pathlib": frozenset({"Path", "PosixPath", "PurePosixPath", "PurePath", "WindowsPath", "PureWindowsPath"}),
    "pathlib._local": frozenset({"Path", "PosixPath", "PurePosixPath", "PurePath", "WindowsPath", "PureWindowsPath"}),
    "collections": frozenset({"OrderedDict"}),
    "torch": frozenset({"Size"} | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)}),
    "torch.serialization": frozenset({"_get_layout"}),
    "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo"}),
    "torch.distributed.checkpoint.metadata": frozenset(
        {"Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties"}
        | {"ChunkStorageMetadata", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING"}
    ),
    "torch.distributed.checkpoint.planner": frozenset(
        {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"}
    ),
    "megatron.core.dist_checkpointing.strategies.torch": frozenset({"MCoreSavePlan", "MCoreMetadata"}),
}


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(
            f"it refers to {module}.{name}, which the index of a checkpoint never does; it was not run. Do not use this "
            "checkpoint: convert the model again from its safetensors"
        )


class _SafePickle(types.ModuleType):
    """``pickle`` as torch's checkpoint reader sees it: ``load`` runs no code."""

    def __init__(self) -> None:
        super().__init__("pickle")

    def load(self, file: IO[bytes], **_: Any) -> Any:
        return _IndexUnpickler(file).load()

    def __getattr__(self, name: str) -> Any:
        return getattr(pickle, name)


class _SafeTorch(types.ModuleType):
    """``torch`` as modules that load checkpoints see it: ``load`` takes tensors and plain values only.

    Args:
        seen: ``torch`` as the module sees it so far.
    """

    def __init__(self, seen: Any) -> None:
        super().__init__("torch")
        self._seen = seen

    def load(self, *args: Any, **kwargs: Any) -> Any:
        return torch.load(*args, **{**kwargs, "weights_only": True})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._seen, name)


def load_checkpoints_safely() -> None:
    """Replace the unsafe loaders that torch's and megatron-core's checkpoint readers call (torch 2.6 to 2.14).

    The environment variable ``TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD`` has no effect on them.
    """
    import megatron.core.dist_checkpointing.strategies.common as common
    import torch.distributed.checkpoint.default_planner as planner
    import torch.distributed.checkpoint.filesystem as filesystem
    from megatron.core.msc_utils import MultiStorageClientFeature

    module: Any
    for module in (planner, filesystem, common):
        if not isinstance(module.torch, _SafeTorch):
            module.torch = _SafeTorch(module.torch)
    filesystem_module: Any = filesystem
    filesystem_module.pickle = _SafePickle()
    # megatron-core 0.16.1 uses the readers of multi-storage-client wherever that is installed; 0.19.2 only when it is told to.
    MultiStorageClientFeature.disable()
