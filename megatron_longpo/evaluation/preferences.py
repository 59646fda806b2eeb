"""The preference suite's run: the trainer's held-out evaluation, on checkpoints converted for it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from typing_extensions import override

from megatron_longpo.checkpoint.huggingface import check_model_folder, read_hf_config, weight_bytes
from megatron_longpo.config import Config, check, check_against_model, from_dict
from megatron_longpo.conversion.import_hf import import_hf
from megatron_longpo.data.indexed import read_manifest
from megatron_longpo.data.vocabulary import folder_vocabulary_hash
from megatron_longpo.engines.base import model_identity
from megatron_longpo.errors import ConfigError
from megatron_longpo.evaluation.folder import SuiteFolder
from megatron_longpo.evaluation.results import read_or_begin
from megatron_longpo.evaluation.sections import SuiteConfig
from megatron_longpo.evaluation.suites.base import Launch, ReadySuite, SuiteResult
from megatron_longpo.evaluation.suites.preference import PreferenceConfig
from megatron_longpo.model.families import shape_from_hf
from megatron_longpo.runtime.collectives import on_rank0
from megatron_longpo.runtime.log import log
from megatron_longpo.runtime.process_groups import start_processes, stop_processes
from megatron_longpo.training import held_out
from megatron_longpo.training.plan import check_data, check_same_architecture, make_plan
from megatron_longpo.training.session import open_session

_TIMEOUT_MINUTES = 30


def check_inputs(launch: Launch) -> None:
    """Check everything that can be known before the process group starts.

    Raises:
        ConfigError, DataError, CheckpointError: the first thing that does not fit.
    """
    config, share = launch.config, launch.share
    options = config.section(PreferenceConfig)
    manifest = read_manifest(_pairs(config))
    folders = list(dict.fromkeys(Path(folder) for folder in (config.model, _reference(config))))
    for folder in folders:
        check_model_folder(folder)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if share.world_size != world_size:
        raise ConfigError(
            f"tasks=preference computes with all {world_size} processes of a launch together, not in {share.world_size} parts; "
            "launch it with torchrun, without --rank"
        )
    if world_size % options.model_parallel_size:
        raise ConfigError(
            f"context_parallel_size x tensor_model_parallel_size = {options.model_parallel_size} does not divide the "
            f"{world_size} processes; launch a multiple of {options.model_parallel_size}"
        )
    shape, *others = [
        shape_from_hf(read_hf_config(folder), str(folder / "config.json")).replace(
            tokenizer_hash=folder_vocabulary_hash(folder)
        )
        for folder in folders
    ]
    training = _training_config(config, model=folders[0], reference=folders[-1], world_size=world_size, bf16=False)
    check(training)
    check_against_model(
        training,
        world_size=world_size,
        num_layers=shape.num_layers,
        attention_heads=shape.num_attention_heads,
        key_value_heads=shape.num_query_groups,
    )
    for reference in others:
        check_same_architecture(shape, reference, training)
    check_data(training, _pairs(config), manifest, shape)
    # The models are converted into the folder, and removed at the end.
    needed, free = sum(map(weight_bytes, folders)), shutil.disk_usage(config.output).free
    if share.rank == 0 and free < needed:
        raise ConfigError(
            f"output={config.output}: tasks=preference converts {needed / 1e9:.2f} GB of weights there for a while, but its disk "
            f"has {free / 1e9:.2f} GB free; free space, or choose another disk"
        )


def identity(config: SuiteConfig) -> dict[str, Any]:
    """What the metrics depend on."""
    model = Path(config.model)
    return {
        "version": held_out.VERSION,
        "model": {"model": model_identity(model), "bf16": _computes_in_bf16(model, config.engine.dtype)},
        "reference": model_identity(Path(_reference(config))),
        "pairs": read_manifest(_pairs(config)).bin_sha256,
        "beta": config.section(PreferenceConfig).beta,
    }


@dataclass
class ReadyPreferences(ReadySuite):
    """The suite with its folder open.

    Attributes:
        config: checked configuration.
        folder: the open folder; all processes must see it.
    """

    config: SuiteConfig
    folder: SuiteFolder

    @override
    def run(self) -> SuiteResult | None:
        """Evaluate all pairs with all processes; the result on rank 0, else None."""
        reports = self.folder.share.rank == 0
        try:
            self.folder.wait_for_parts()
            start_processes(_TIMEOUT_MINUTES)
            result = _stored_result(self.config.output, self.folder)
            if result is None:
                result = self._evaluate()
            else:
                log("preference: already evaluated", active=reports)
            # Rank 0 has written everything before the others leave.
            dist.barrier()
        finally:
            self.folder.close()
        stop_processes()
        return result if reports else None

    def _evaluate(self) -> SuiteResult:
        """Convert the models, run the trainer's held-out evaluation, and write samples.jsonl; collective."""
        folder, share = self.folder, self.folder.share
        # A killed run may have left its copies.
        work = folder.folder / "work"
        if share.rank == 0:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
        dist.barrier()
        session = open_session(make_plan(self._converted(work), share.world_size))
        session.score_reference()
        session.load_weights()
        # Read on rank 0, so that all processes skip the same samples.
        kept = on_rank0(lambda: held_out.kept_metrics(dict(row) for row in folder.rows()))
        if kept:
            log(f"preference: {len(kept)} samples of an earlier run are kept", active=share.rank == 0)

        def keep(numbers: Sequence[int], table: dict[str, np.ndarray]) -> None:
            if share.rank == 0:
                folder.add(held_out.kept_rows(numbers, table))

        table = session.held_out.evaluate(kept, keep)
        metrics = held_out.summary(table)
        if share.rank == 0:
            shutil.rmtree(work, ignore_errors=True)
            held_out.write_rows(table, folder.folder / "samples.jsonl", folder.settings["pairs"])
        return SuiteResult(folder.settings, {"preference": metrics["samples"]}, metrics)

    def _converted(self, work: Path) -> Config:
        """Convert the models into ``work``; the trainer's configuration for evaluating them. Collective."""
        model, reference = self.config.model, _reference(self.config)
        checkpoint = reference_checkpoint = work / "model"
        import_hf(model, checkpoint)
        if reference != model:
            reference_checkpoint = work / "reference"
            import_hf(reference, reference_checkpoint)
        return _training_config(
            self.config,
            model=checkpoint,
            reference=reference_checkpoint,
            world_size=self.folder.share.world_size,
            bf16=self.folder.settings["model"]["bf16"],
        )


def _training_config(config: SuiteConfig, *, model: Path, reference: Path, world_size: int, bf16: bool) -> Config:
    """The trainer's configuration for evaluating a model.

    Args:
        config: configuration of the evaluation.
        model, reference: checkpoints.
        world_size: number of processes.
        bf16: whether to compute in bf16.
    """
    options = config.section(PreferenceConfig)
    values = {
        "data": {"valid_data_path": options.pairs},
        "objective": {"beta": options.beta},
        "reference": {
            "reference_load": str(reference),
            "reference_cache": str(config.output / "preference" / "reference"),
        },
        "parallel": {
            "context_parallel_size": options.context_parallel_size,
            "tensor_model_parallel_size": options.tensor_model_parallel_size,
        },
        "training": {
            "skip_train": True,
            "global_batch_size": world_size // options.model_parallel_size,
            "bf16": bf16,
        },
        "checkpoint": {"load": str(model)},
    }
    return from_dict(values, "preference")


def _reference(config: SuiteConfig) -> str:
    """Folder of the reference model."""
    return config.section(PreferenceConfig).reference_model or config.model


def _computes_in_bf16(model: Path, dtype: str) -> bool:
    """Precision of the trainer: fp32 if the user asks for it or the model is stored in it, else bf16."""
    if dtype != "auto":
        return dtype != "float32"
    config = read_hf_config(model)
    return str(config.get("dtype", config.get("torch_dtype"))) != "float32"


def _pairs(config: SuiteConfig) -> str:
    """Prefix of the pairs."""
    pairs = config.section(PreferenceConfig).pairs
    assert pairs is not None
    return pairs


def _stored_result(output: Path, folder: SuiteFolder) -> SuiteResult | None:
    """What results.json has of an earlier run with the same settings, or None."""
    stored = read_or_begin(output)["suites"].get("preference")
    if stored is None or stored["settings"] != folder.settings or not (folder.folder / "samples.jsonl").exists():
        return None
    return SuiteResult(stored["settings"], stored["asked"], stored["metrics"])
