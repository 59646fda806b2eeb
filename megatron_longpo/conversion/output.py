"""The output folder of a conversion: it appears complete or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_longpo.checkpoint.checksums import CHECKSUMS
from megatron_longpo.errors import CheckpointError
from megatron_longpo.runtime.collectives import raise_on_all_ranks, rank
from megatron_longpo.runtime.files import FolderLock
from megatron_longpo.runtime.log import log

# Free space needed per byte of weights: headers, indices and the tokenizer come on top.
_SPACE_PER_BYTE = 1.01
_STAGING_PREFIX, _STAGING_SUFFIX = ".", ".writing"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_INDEX_SUFFIXES = (".index.json",)
# An exported model must not pass on code, or pickles, that came with the imported one.
_CODE_SUFFIXES = (".py", ".pyc", ".so", ".pkl", ".pickle", ".ckpt", ".npy", ".npz")
# Files that make loaders look for something else than this model: PEFT's adapters (transformers), quantised weights (GPTQ, AWQ,
# ModelOpt; vLLM), Mistral's own format (vLLM), the modules of an embedding model (sentence-transformers).
_LOADER_FILES = frozenset(
    {
        *("adapter_config.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json", "params.json"),
        *("modules.json", "config_sentence_transformers.json", "trainer_state.json"),
    }
)
_TEMPLATES = "additional_chat_templates"


def check_new(output: Path) -> None:
    """Check that an output folder is new, or empty.

    Raises:
        CheckpointError: it is neither.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output}: already exists; choose another folder, or remove it")


@contextmanager
def staging_folder(output: Path, size: int) -> Iterator[Path]:
    """Yield a folder to write to, which is renamed to ``output`` when all processes are done; on failure it is removed.

    What a killed conversion left there is removed first. The folder is locked, so that two conversions cannot write the same
    output. Collective.

    Args:
        output: output folder.
        size: bytes that will be written.

    Raises:
        CheckpointError: another conversion writes to ``output``, the disk is too small, some process does not see the folder,
            or any process raised this in the body.
    """
    staging = output.with_name(f"{_STAGING_PREFIX}{output.name}{_STAGING_SUFFIX}")
    with contextlib.ExitStack() as lock:
        with raise_on_all_ranks(output):
            if rank() == 0:
                staging.mkdir(parents=True, exist_ok=True)
                lock.enter_context(FolderLock(staging, name=output, error=CheckpointError))
                _clear(staging)
                _check_space(staging, output, size)
        try:
            with raise_on_all_ranks(output):
                if not staging.is_dir():
                    raise CheckpointError(
                        f"{output}: rank {rank()} does not see what rank 0 writes there; use a folder that all nodes share"
                    )
            with raise_on_all_ranks(output):
                yield staging
            with raise_on_all_ranks(output):
                if rank() == 0:
                    if output.is_dir():
                        output.rmdir()
                    os.replace(staging, output)
        except BaseException:
            if rank() == 0:
                shutil.rmtree(staging, ignore_errors=True)
            raise


def final_name(folder: Path) -> str:
    """Name of a folder once its conversion is done: that of the output for a staging folder, its own for any other."""
    if folder.name.startswith(_STAGING_PREFIX) and folder.name.endswith(_STAGING_SUFFIX):
        return folder.name.removeprefix(_STAGING_PREFIX).removesuffix(_STAGING_SUFFIX)
    return folder.name


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _check_space(staging: Path, output: Path, size: int) -> None:
    free = shutil.disk_usage(staging).free
    if free < size * _SPACE_PER_BYTE:
        staging.rmdir()
        raise CheckpointError(
            f"{output}: needs {size / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB free; free space, or choose another disk"
        )


def copy_assets(source: Path, target: Path) -> list[str]:
    """Copy the files of a model folder that a model needs beside its weights: tokenizer, chat templates, configuration, texts.

    Weights, code, hidden files and whatever makes a loader look for another model stay behind.

    Returns:
        Names of the files that were left out, except weights, their indices and hidden files.
    """
    target.mkdir(exist_ok=True)
    left_out = []
    for path in sorted(source.iterdir()):
        if not path.is_file() or path.name.startswith(".") or path.name.endswith((*_WEIGHT_SUFFIXES, *_INDEX_SUFFIXES)):
            continue
        if path.name == CHECKSUMS:
            continue  # of the folder that it is in
        if path.name.endswith(_CODE_SUFFIXES) or path.name in _LOADER_FILES:
            left_out.append(path.name)
        else:
            if path.is_symlink() and not _is_of_the_model(path):
                log(f"note: {path} is a link to {path.resolve()}, whose content becomes a part of the model")
            shutil.copyfile(path, target / path.name)
    for path in sorted((source / _TEMPLATES).glob("*.jinja")):
        (target / _TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(path, target / _TEMPLATES / path.name)
    return left_out


def _is_of_the_model(link: Path) -> bool:
    """Whether a link leads to a file of its folder, or of the hub's cache that the folder is in (``snapshots/REVISION``)."""
    folder = link.parent.resolve()
    return link.resolve().parent in (folder, folder.parent.parent / "blobs")


def remove_auto_map(folder: Path) -> None:
    """Remove from the JSON files of a model folder the key that tells transformers to load code from the folder."""
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            continue  # not JSON that transformers could read either
        if isinstance(content, dict) and content.pop("auto_map", None) is not None:
            path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
