"""What is known of a run before its hours of work: packages, credentials, disks, permissions, and what is worth a second look."""

from __future__ import annotations

import netrc
import os
import shutil
from pathlib import Path
from urllib.parse import urlparse

from megatron_longpo.checkpoint.assets import template_hash, template_of
from megatron_longpo.checkpoint.folders import ASSETS, latest_step
from megatron_longpo.config import Config, data_sources
from megatron_longpo.data.indexed import Manifest
from megatron_longpo.errors import CheckpointError, ConfigError, PlatformError
from megatron_longpo.model.kernels import names_of
from megatron_longpo.model.shape import ModelShape
from megatron_longpo.runtime import machine_record, platform
from megatron_longpo.training.best import rule_of
from megatron_longpo.training.optimization import fuses_weight_gradients
from megatron_longpo.training.plan import RunPlan
from megatron_longpo.training.session import Session
from megatron_longpo.training.trackers import check_trackers
from megatron_longpo.training.uploads import check_store

_SHOWN_HASH = 12


def check_run(plan: RunPlan) -> None:
    """Check what the machine must offer, on every rank and before any process group exists.

    Raises:
        ConfigError: a package or credentials are missing, a folder cannot be written to, the disk cannot hold one checkpoint, or
            save_best names no metric of the run.
    """
    config = plan.config
    if config.checkpoint.save_best is not None:
        rule_of(config.checkpoint.save_best, plan.objective)
    if plan.output is None or config.training.skip_train:
        return
    check_trackers(config.logging)
    if config.logging.wandb_project:
        _check_wandb_credentials(config.logging.wandb_project)
    _check_writable("save", plan.output)
    if config.checkpoint.upload_to is not None:
        # One process per node, since credentials may be missing on one of them.
        check_store(config.checkpoint.upload_to, write=os.environ.get("LOCAL_RANK", "0") == "0")
    if config.reference.reference == "cached" and plan.objective.reference_rows is not None:
        for folder in _cache_folders(plan):
            # A table that is there may be the one that is asked for, and reading it takes no permission to write.
            if not any(folder.glob("*.npy")):
                _check_writable("reference_cache", folder)
    needed, free = checkpoint_bytes(plan.shape, plan.config), free_bytes(plan.output)
    if free < needed:
        raise ConfigError(
            f"save={plan.output}: a checkpoint needs at least {needed / 1e9:.1f} GB, but the disk has {free / 1e9:.1f} GB free; "
            "free space, choose another --save, or set --no-save-optim to save weights only"
        )


def _cache_folders(plan: RunPlan) -> list[Path]:
    """Folders of the reference's log-probs, those of the held-out data included."""
    config = plan.config
    if config.reference.reference_cache is not None:
        return [Path(config.reference.reference_cache)]
    prefixes = [source.prefix for source in data_sources(config.data.data_path or ())]
    if config.data.valid_data_path is not None:
        prefixes.append(config.data.valid_data_path)
    # The default is PREFIX.reference, beside the data.
    return [Path(f"{prefix}.reference") for prefix in prefixes]


def checkpoint_bytes(shape: ModelShape, config: Config) -> int:
    """Size of one checkpoint in bytes, at least: weights, and the optimizer's master weights and moments."""
    heads = 2 if shape.untie_embeddings_and_output_weights else 1
    weights = shape.num_layers * shape.layer_weights + heads * shape.vocab_size * shape.hidden_size
    per_weight = 2 if config.training.bf16 else 4
    if not config.checkpoint.no_save_optim:
        moments = 2 if config.optimizer.optimizer == "adam" else 1
        per_weight += 4 * moments + (4 if config.training.bf16 else 0)
    return weights * per_weight


def refuse_wrong_kernels(session: Session) -> None:
    """Refuse what the last ``megatron-longpo doctor`` found wrong on this machine, if the run would use it.

    Raises:
        PlatformError: a kernel or implementation of the run is wrong here.
    """
    path = machine_record.record_path()
    record = None if path is None else machine_record.read_record(path)
    if record is None or not record.wrong:
        return
    current, model = platform.CURRENT, session.chunks[0]
    dtype = model.config.params_dtype
    used = [machine_record.attention_kernel(name, dtype) for name in names_of(model.attention.kernels)]
    used += [machine_record.common_kernel(name, dtype) for name in machine_record.COMMON]
    if model.implementation.is_transformer_engine:
        used.append(machine_record.LAYERS)
    elif fuses_weight_gradients(session.config):
        used.append(machine_record.common_kernel(machine_record.WEIGHT_GRADIENTS, dtype))
    machine = machine_record.machine_of(current.name, current.facts())
    for wrong in machine_record.wrong_kernels(record, machine, used):
        raise PlatformError(
            f"{wrong.kernel}: megatron-longpo doctor found it wrong on this machine ({path}, {record.date}: {wrong.detail}); "
            f"{wrong.remedy}. If the machine was mended, run the doctor again; {machine_record.VARIABLE}=ignore trains anyway"
        )


def cautions(plan: RunPlan) -> list[str]:
    """What may not be meant, a line each: another chat template, positions that the model never saw, a disk that will be full.

    Raises:
        CheckpointError: a file of the model's tokenizer cannot be read.
    """
    lines = [*_template_cautions(plan), *_position_cautions(plan)]
    if plan.output is not None and not plan.config.training.skip_train:
        lines += _disk_cautions(plan, plan.output)
    return lines


def _template_cautions(plan: RunPlan) -> list[str]:
    own = template_of(plan.load / ASSETS)
    mine = template_hash(own) if own is not None else None
    lines = []
    data = plan.config.data
    prefixes = " ".join(source.prefix for source in data_sources(data.data_path or ()))
    sets: list[tuple[str, str, Manifest | None]] = [
        ("the data", prefixes, plan.manifest),
        ("the held-out data", str(data.valid_data_path), plan.valid_manifest),
    ]
    for name, prefix, manifest in sets:
        theirs = manifest.template_hash if manifest is not None else None
        if theirs is None or theirs == mine:
            continue
        has = f"the model's own is {mine[:_SHOWN_HASH]}" if mine else "the model has none of its own"
        lines.append(
            f"chat template: {name} ({prefix}) were made with {theirs[:_SHOWN_HASH]}, but {has}; an export of this "
            "run carries that of the data it was trained on"
        )
    if plan.valid_manifest is not None and plan.valid_manifest.template_hash != plan.manifest.template_hash:
        lines.append(
            "chat template: the held-out data were made with another one than the data, so their figures differ from it"
        )
    return lines


def _position_cautions(plan: RunPlan) -> list[str]:
    lines = []
    shape, policy = plan.shape, plan.policy_shape
    longest, context = plan.manifest.longest, shape.max_position_embeddings
    same_rope = policy.rotary_base == shape.rotary_base and policy.rope_scaling == shape.rope_scaling
    if longest > context and same_rope:
        lines.append(
            f"positions: the longest row has {longest} tokens, but the model claims a context of {context} and keeps its RoPE "
            f"(theta {shape.rotary_base:g}); LongPO raises it (--rotary-base 1e7), or give --rope-type yarn with a factor"
        )
    scored = {"short": plan.manifest.longest_short, "long": longest}.get(plan.objective.reference_rows or "", 0)
    if scored > plan.reference_shape.max_position_embeddings:
        lines.append(
            f"positions: the reference scores rows of up to {scored} tokens, but its model claims a context of "
            f"{plan.reference_shape.max_position_embeddings}; shorten the chunks (preprocess --short-seq-length), or give "
            "--reference-load a model of a longer context"
        )
    return lines


def _disk_cautions(plan: RunPlan, output: Path) -> list[str]:
    checkpoint = plan.config.checkpoint
    retained = checkpoint.save_retain_interval
    if checkpoint.keep_last is not None and retained is None:
        return []
    done = latest_step(output) or 0
    interval = retained or checkpoint.save_interval
    count = 1 if interval is None else plan.train_iters // interval - done // interval
    needed, free = count * checkpoint_bytes(plan.shape, plan.config), free_bytes(output)
    if needed <= free:
        return []
    return [
        f"disk: {count} checkpoints need at least {needed / 1e9:.1f} GB, but {output} has {free / 1e9:.1f} GB free; set "
        "--keep-last, or raise --save-interval"
    ]


def _check_writable(name: str, folder: Path) -> None:
    found = existing(folder)
    if not found.is_dir():
        raise ConfigError(f"{name}={folder}: {found} is not a folder; choose another")
    if os.statvfs(found).f_flag & os.ST_RDONLY:
        raise ConfigError(
            f"{name}={folder}: {found} is on a read-only file system; mount it writable, or choose another "
            f"--{name.replace('_', '-')}"
        )
    if not os.access(found, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{name}={folder}: {found} cannot be written to; change its permissions, or choose another "
            f"--{name.replace('_', '-')}"
        )


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = Path(os.path.abspath(path))
    return next((folder for folder in (path, *path.parents) if folder.exists()), path)


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk that a folder is on, or will be.

    Raises:
        CheckpointError: the disk cannot be asked.
    """
    try:
        return shutil.disk_usage(existing(folder)).free
    except OSError as error:
        raise CheckpointError(
            f"{folder}: its disk cannot be asked for its space ({error}); choose another folder"
        ) from None


def _check_wandb_credentials(project: str) -> None:
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun", "shared") or os.environ.get("WANDB_API_KEY"):
        return
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        known = host in netrc.netrc(path).hosts
    except (OSError, netrc.NetrcParseError):
        known = False
    if not known:
        raise ConfigError(
            f"wandb_project={project}: there are no credentials for {host}, neither WANDB_API_KEY nor an entry of {path}; run "
            "`wandb login`, or set WANDB_MODE=offline"
        )
