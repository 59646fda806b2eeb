"""The plan of a run: its configuration, checked against checkpoint, data and world size before any process group exists."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_longpo.checkpoint.folders import latest_step, resolve
from megatron_longpo.config import (
    Config,
    DataSource,
    check,
    check_against_model,
    data_sources,
    scaling_numbers,
    virtual_pipeline_size,
)
from megatron_longpo.data.indexed import Manifest, read_manifest
from megatron_longpo.errors import ConfigError, DataError
from megatron_longpo.model.attention import resolve_comm_type
from megatron_longpo.model.fp8 import check_fp8_widths
from megatron_longpo.model.gpt import transformer_config
from megatron_longpo.model.rotary import changed_scaling
from megatron_longpo.model.shape import ModelShape
from megatron_longpo.runtime import process_groups
from megatron_longpo.runtime.process_groups import Parallel
from megatron_longpo.training.objective import ObjectiveSpec, spec_of
from megatron_longpo.training.optimization import check_schedule


@dataclass(frozen=True)
class RunPlan:
    """What a run does, as far as it is known before the model is built; identical on every rank.

    Attributes:
        config: the resolved configuration. ``make_plan`` leaves recompute_granularity=auto in it, and
            ``memory.decide_recompute`` replaces it.
        load: checkpoint that training starts from.
        reference_load: checkpoint of the reference.
        shape, reference_shape: shapes of the two checkpoints.
        manifest: manifest of the data; of several data sets, what can be said of them together.
        valid_manifest: manifest of the held-out data, or None.
        train_iters: optimizer steps of the whole run.
        comm_type, comm_reason: how context parallelism exchanges, and why.
    """

    config: Config
    load: Path
    reference_load: Path
    shape: ModelShape
    reference_shape: ModelShape
    manifest: Manifest
    valid_manifest: Manifest | None
    train_iters: int
    comm_type: str
    comm_reason: str

    @property
    def output(self) -> Path | None:
        """Output folder of the run; None: nothing is written."""
        return Path(self.config.checkpoint.save) if self.config.checkpoint.save else None

    @property
    def objective(self) -> ObjectiveSpec:
        return spec_of(self.config.objective.objective, self.config.objective.loss_type)

    @property
    def samples_per_step(self) -> int:
        """Samples of an optimizer step: the global batch, or all samples if there are fewer, so that none comes twice."""
        return min(self.config.training.global_batch_size, self.manifest.samples)

    @property
    def reference_rotary_base(self) -> float:
        return self.config.reference.reference_rotary_base or self.reference_shape.rotary_base

    @property
    def policy_shape(self) -> ModelShape:
        """Shape of the trained model, with the policy's RoPE and the context length that it is trained on."""
        model, data = self.config.model, self.config.data
        trained = data.seq_length or self.manifest.longest
        return self.shape.replace(
            rotary_base=model.rotary_base or self.shape.rotary_base,
            rope_scaling=changed_scaling(self.shape, model.rope_type, scaling_numbers(model), "model"),
            max_position_embeddings=model.max_position_embeddings or max(self.shape.max_position_embeddings, trained),
            weights_hash=None,
        )


def make_plan(config: Config, world_size: int) -> RunPlan:
    """Check a configuration against itself, its checkpoints, its data and the world size.

    Args:
        config: the configuration as the user gave it.
        world_size: number of processes.

    Raises:
        ConfigError, CheckpointError, DataError, PlatformError: the first thing that does not fit.
    """
    check(config)
    if config.parallel.auto_layout:
        raise ConfigError(
            "auto_layout is resolved by the command; start the run by `megatron-longpo train`, or leave it out"
        )
    _check_reference_only(config)
    if config.checkpoint.load is None:
        raise ConfigError("load is not given; name a converted checkpoint with --load CKPT")
    if config.training.skip_train and config.data.data_path is None:
        # There is no training data; the sizes of the held-out data stand in for it.
        config = dataclasses.replace(
            config, data=dataclasses.replace(config.data, data_path=config.data.valid_data_path)
        )
    if config.data.data_path is None:
        raise ConfigError("data_path is not given; name the prefix of preprocessed data with --data-path PREFIX")
    assert config.checkpoint.load is not None
    load = resolve(config.checkpoint.load)
    if config.training.skip_train and config.checkpoint.save is not None:
        own = Path(config.checkpoint.save)
        if latest_step(own) is not None and own.resolve() not in (load.resolve(), *load.resolve().parents):
            raise ConfigError(
                f"skip_train evaluates load={config.checkpoint.load}, but save={own} holds the checkpoints of another run; "
                f"use --load {own} to evaluate those, or leave --save out"
            )
    reference_load = load
    if config.reference.reference_load is not None:
        reference_load = resolve(config.reference.reference_load, name="reference_load")
    shape, reference_shape = ModelShape.read(load), ModelShape.read(reference_load)
    check_against_model(
        config,
        world_size=world_size,
        num_layers=shape.num_layers,
        attention_heads=shape.num_attention_heads,
        key_value_heads=shape.num_query_groups,
    )
    parallel = config.parallel
    if config.training.fp8_format is not None:
        check_fp8_widths(shape, parallel.tensor_model_parallel_size)
    comm_type, comm_reason = resolve_comm_type(
        parallel.cp_comm_type,
        shape.num_attention_heads,
        shape.num_query_groups,
        parallel.context_parallel_size,
        parallel.tensor_model_parallel_size,
    )
    # Raises where the platform cannot run this layout (runtime/platform.py).
    transformer_config(shape, config, use_transformer_engine=False)
    check_same_architecture(shape, reference_shape, config)
    sources = data_sources(config.data.data_path)
    manifests = [read_manifest(source.prefix) for source in sources]
    for source, found in zip(sources, manifests, strict=True):
        check_data(config, source.prefix, found, shape)
    _check_same_template(sources, manifests)
    manifest = Manifest.combined(manifests, [source.weight for source in sources])
    valid_manifest = None
    if config.data.valid_data_path is not None:
        valid_manifest = read_manifest(config.data.valid_data_path)
        check_data(config, config.data.valid_data_path, valid_manifest, shape)
    training = config.training
    per_step = min(training.global_batch_size, manifest.samples)
    train_iters = training.train_iters or max(1, math.floor(training.train_epochs * manifest.samples / per_step))
    check_schedule(config, train_iters)
    return RunPlan(
        config=config,
        load=load,
        reference_load=reference_load,
        shape=shape,
        reference_shape=reference_shape,
        manifest=manifest,
        valid_manifest=valid_manifest,
        train_iters=train_iters,
        comm_type=comm_type,
        comm_reason=comm_reason,
    )


def _check_reference_only(config: Config) -> None:
    """Rules of a run that only scores the data."""
    if not config.reference.reference_only:
        return
    loss = config.objective
    if config.reference.reference != "cached" or spec_of(loss.objective, loss.loss_type).reference_rows is None:
        raise ConfigError(
            f"reference_only writes the cache of reference=cached, which objective={loss.objective} with "
            f"loss_type={loss.loss_type} and reference={config.reference.reference} does not read; leave reference_only out"
        )
    if config.training.skip_train:
        raise ConfigError("reference_only and skip_train are two ways to leave out the training; give one of them")


def check_same_architecture(shape: ModelShape, reference: ModelShape, config: Config) -> None:
    """Check that a reference has the architecture of the model.

    Raises:
        ConfigError: it has not.
    """
    ignored = {
        "rotary_base": 0.0,
        "max_position_embeddings": 0,
        "weights_hash": None,
        "dtype": "",
        "rope_scaling": None,
        "base_model": None,
        "base_revision": None,
    }
    if shape.replace(**ignored) != reference.replace(**ignored):
        raise ConfigError(
            f"reference_load={config.reference.reference_load} differs in architecture from load={config.checkpoint.load}; "
            "use a reference of the same family, sizes and tokenizer"
        )


def _check_same_template(sources: Sequence[DataSource], manifests: Sequence[Manifest]) -> None:
    made = [(s.prefix, m.template_hash) for s, m in zip(sources, manifests, strict=True) if m.template_hash is not None]
    for prefix, template_hash in made[1:]:
        if template_hash != made[0][1]:
            raise DataError(
                f"{prefix}.json: the chat template ({template_hash[:12]}) is not that of {made[0][0]} ({made[0][1][:12]}), and "
                "the model would learn both; preprocess the data sets with the same --chat-template"
            )


def check_data(config: Config, prefix: str, manifest: Manifest, shape: ModelShape) -> None:
    """Check that preprocessed data fit the configuration and the model.

    Raises:
        ConfigError, DataError: they do not.
    """
    path = f"{prefix}.json"
    if manifest.vocab_size > shape.vocab_size:
        raise DataError(
            f"{path}: vocab_size={manifest.vocab_size} is larger than the model's {shape.vocab_size}; preprocess the data "
            "with the model's tokenizer"
        )
    if manifest.tokenizer_hash and shape.tokenizer_hash and manifest.tokenizer_hash != shape.tokenizer_hash:
        raise DataError(
            f"{path}: tokenizer {manifest.tokenizer} ({manifest.tokenizer_hash[:12]}) is not the model's "
            f"({shape.tokenizer_hash[:12]}); preprocess the data with the model's tokenizer"
        )
    objective = config.objective
    spec = spec_of(objective.objective, objective.loss_type)
    if manifest.samples_without_short and (spec.reference_rows == "short" or spec.prefers_short):
        raise DataError(
            f"{path}: {manifest.samples_without_short} of {manifest.samples} samples have no short_context, which "
            f"objective={objective.objective} needs; use objective=dpo or sft, or give each turn its short_context"
        )
    limit = config.data.seq_length
    if limit is not None and manifest.longest > limit:
        raise DataError(
            f"{path}: its longest row has {manifest.longest} tokens, more than seq_length={limit}; raise seq_length, or "
            f"preprocess the data with --seq-length {limit}"
        )
    if config.data.turns == "independent" and not manifest.independent_turns:
        raise ConfigError(
            f"turns=independent needs each turn's own prompt, which {path} lacks because its input was tokenised already; "
            "use turns=chained, or preprocess from text"
        )


def groups_of(plan: RunPlan) -> Parallel:
    """Create the process groups of a plan; collective."""
    parallel = plan.config.parallel
    return process_groups.set_up(
        tensor=parallel.tensor_model_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
        virtual=virtual_pipeline_size(parallel, plan.shape.num_layers),
        context=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        comm_type=plan.comm_type,
        seed=plan.config.training.seed,
        timeout_minutes=parallel.distributed_timeout_minutes,
    )
