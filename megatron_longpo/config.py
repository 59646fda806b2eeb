"""Configuration: dataclasses by section, read from YAML and flags, checked before any process group is made.

A field has Megatron-LM's argument name wherever Megatron-LM has the argument; its flag is that name without a section
prefix. Precedence: flag, then YAML, then the default written here. Unknown keys are refused.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
import yaml

from megatron_longpo.errors import ConfigError


@dataclass(frozen=True)
class DataConfig:
    """What is trained on."""

    data_path: str | None = None
    """Prefix of the indexed binaries (PREFIX.bin, PREFIX.idx, PREFIX.json)."""
    valid_data_path: str | None = None
    """Prefix of held-out data. They are evaluated every eval_interval steps and at the end: OUTPUT/validation.jsonl."""
    shuffle: bool = True
    """Shuffle the samples of each epoch by seed; off: file order."""
    turns: Literal["chained", "independent"] = "chained"
    """chained: the turns of a sample are one dialogue (the released code); independent: each turn alone on the document
    (the paper's Eq. 13)."""
    prefix_sharing: bool = True
    """Compute what the rows of a sample share once. Off: every row whole (same numbers, more work)."""
    seq_length: int | None = None
    """Longest row in tokens that is accepted, both rows of a sample; longer samples are refused at start. Default: no
    limit but the model's rotary range is the user's choice (see rotary_base)."""
    verify_data: bool = True
    """Check the checksums of the binaries at start."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """The loss."""

    objective: Literal["longpo", "dpo", "sft"] = "longpo"
    """longpo: preference_weight * preference loss against the short-context reference + NLL; dpo: preference loss
    against the reference on the long rows; sft: NLL of the chosen rows."""
    beta: float = 0.1
    """Strength of the constraint to the reference (paper 0.1, released script 0.01)."""
    preference_weight: float = 0.01
    """Lambda, the weight of the preference term in longpo (paper and script 0.01)."""
    nll_scope: Literal["sequence", "response"] = "sequence"
    """sequence: the NLL is the mean over the whole long chosen sequence, document included; response: over its
    responses."""
    loss_type: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """Form of the preference loss."""
    label_smoothing: float = 0.0
    """Probability that a preference is the wrong way round (sigmoid only)."""


@dataclass(frozen=True)
class ReferenceConfig:
    """The frozen reference."""

    reference: Literal["cached", "online"] = "cached"
    """cached: log-probs are computed once, with the initial weights, and kept beside the data; online: in every step."""
    reference_load: str | None = None
    """Checkpoint of the reference. Default: the one of --load."""
    reference_model: Literal["swapped", "resident"] = "swapped"
    """Online only. swapped: the initial weights wait in host memory and change places with the policy's; resident: a
    second model."""
    reference_rotary_base: float | None = None
    """RoPE theta of the reference. Default: its checkpoint's own."""
    reference_cache: str | None = None
    """Folder of the cached log-probs. Default: PREFIX.reference beside the data."""
    reference_max_tokens: int = 16384
    """Short rows are packed into sequences of at most this many tokens (a longer row is a sequence of its own)."""


@dataclass(frozen=True)
class ModelConfig:
    """What may be set of the model; its shape comes from the checkpoint."""

    rotary_base: float | None = None
    """RoPE theta of the policy (paper: 1e7). Default: the checkpoint's."""
    rope_type: Literal["default", "linear", "llama3", "yarn"] | None = None
    """Another RoPE scaling for the policy, with the numbers below by Hugging Face's names; default: none at all. The
    reference keeps its checkpoint's. Not given: the checkpoint's."""
    rotary_scaling_factor: float | None = None
    """The scaling's factor (linear, llama3, yarn)."""
    original_max_position_embeddings: int | None = None
    """Context before scaling (llama3, yarn). Default: that of the checkpoint's own scaling, else its longest."""
    attention_factor: float | None = None
    """Scale of cosines and sines (yarn). Default: from the factor."""
    beta_fast: float | None = None
    beta_slow: float | None = None
    """Rotations within the original context above which channels are kept and below which they are stretched (yarn)."""
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    """The same bounds of llama3."""
    max_position_embeddings: int | None = None
    """Longest context that the trained model claims when exported. Default: the checkpoint's, or seq_length where that
    is longer."""
    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this times the tensor-parallel size. Padding is never computed with."""
    attention_backend: Literal["auto", "flash", "fused", "memory_efficient", "unfused"] = "auto"
    """Attention kernels. auto: flash for bf16, memory_efficient for fp32 on CUDA, and says which; flash: FlashAttention as
    torch carries it; fused: cuDNN (CUDA); memory_efficient: torch's cutlass kernels (CUDA); unfused: the plain formula, slow."""
    logprob_chunk_bytes: int | None = None
    """Memory for the logits of one chunk of tokens. Default: 128 MiB on the CPU, 1 GiB on CUDA."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the work is split."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Layers of one virtual stage; interleaves the pipeline."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Virtual stages a pipeline rank (instead of num_layers_per_virtual_pipeline_stage)."""
    context_parallel_size: int = 1
    cp_comm_type: Literal["auto", "a2a", "allgather"] = "auto"
    """How context parallelism exchanges. a2a: places against heads (Ulysses; the heads must divide); allgather: keys and
    values to all, queries assigned so that the causal work is balanced (any size); auto: a2a where the heads divide."""
    sequence_parallel: bool = False
    """Shard norms and residuals over the tensor-parallel ranks."""
    use_distributed_optimizer: bool = False
    """Shard the optimizer's states over the data- and context-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients bucket by bucket while the backward still runs."""
    distributed_timeout_minutes: int = 10
    """A collective that takes longer than this is a failure."""


@dataclass(frozen=True)
class TrainingConfig:
    """How long, how much at a time, in what precision."""

    micro_batch_size: int = 1
    """Samples a data-parallel rank computes at a time."""
    global_batch_size: int = 8
    """Samples an optimizer step (paper: 8)."""
    train_iters: int | None = None
    """Optimizer steps. Default: train_epochs over the data."""
    train_epochs: float = 1.0
    """Epochs, where train_iters is not given; rounded down to whole steps, at least one."""
    eval_interval: int | None = None
    """Evaluate the held-out data (valid_data_path) every so many steps. Default: before the first and after the
    last alone."""
    eval_iters: int | None = None
    """Global batches of an evaluation, from the first sample. Default: all held-out data."""
    skip_train: bool = False
    """Evaluate the held-out data and stop; no optimizer is made, and data_path is not needed."""
    bf16: bool = False
    """Weights and activations in bfloat16, with fp32 gradients and master weights. Off: fp32."""
    recompute_granularity: Literal["auto", "none", "selective", "full"] = "auto"
    """What is computed again in the backward instead of kept: auto takes the MLPs' first products where they are cheap, beyond
    that as little as fits the memory, and says what; full means whole layers, selective the recompute_modules."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    recompute_num_layers: int = 1
    recompute_modules: tuple[str, ...] = ("core_attn",)
    """What selective recompute computes again: core_attn, mlp, or mlp_up (the MLP's first product alone; with full and
    method block, that of the layers which are not recomputed whole)."""
    seed: int = 1234
    manual_gc_interval: int = 0
    """Collect Python's garbage every so many steps on all ranks at once; 0: leave it to Python."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and learning-rate schedule."""

    optimizer: Literal["adam", "rmsprop"] = "adam"
    lr: float = 5e-7
    min_lr: float = 0.0
    lr_decay_style: Literal["cosine", "linear", "constant", "WSD"] = "cosine"
    lr_decay_iters: int | None = None
    """Steps over which the learning rate decays. Default: train_iters."""
    lr_warmup_fraction: float | None = None
    """Fraction of lr_decay_iters to warm up over."""
    lr_warmup_iters: int = 0
    """Steps to warm up over (instead of lr_warmup_fraction)."""
    lr_warmup_init: float = 0.0
    lr_wsd_decay_iters: int | None = None
    """Last steps in which a WSD schedule decays."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "linear"
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    rmsprop_alpha: float = 0.99
    """Smoothing of RMSProp's squared gradient (torch's default)."""
    rmsprop_eps: float = 1e-8
    clip_grad: float = 1.0
    """Largest norm of the whole gradient; 0: no clipping."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Where from and where to."""

    load: str | None = None
    """Converted checkpoint, or a run's output folder, whose weights training starts from."""
    save: str | None = None
    """The run's output folder. A run that finds a checkpoint of its own there goes on from it."""
    save_interval: int | None = None
    """Save every so many steps; the last step is always saved."""
    async_save: bool = False
    """Write checkpoints in the background."""
    keep_last: int | None = None
    """Keep this many of the newest checkpoints. Default: all."""
    no_save_optim: bool = False
    """Save weights alone; such a checkpoint can be exported, not resumed."""
    exit_interval: int | None = None
    """Stop, saved, after a step divisible by this (to fit a job's time limit)."""
    exit_duration_in_mins: float | None = None
    """Stop, saved, after this many minutes."""


@dataclass(frozen=True)
class LoggingConfig:
    """What is written for people."""

    log_interval: int = 1
    """Steps between lines of progress. metrics.jsonl has every step."""
    tensorboard: bool = True
    """Write TensorBoard events to OUTPUT/tensorboard."""
    wandb_project: str | None = None
    """Report to this Weights & Biases project (extra `wandb`)."""
    wandb_exp_name: str | None = None
    plot_interval: int = 25
    """Steps between redrawings of OUTPUT/curves.png; it is always drawn at the end."""
    profile: bool = False
    """Write a torch profile of some steps to OUTPUT/profile and, on CUDA, a snapshot of the allocator's memory."""
    profile_step_start: int = 10
    """Steps that are done before the profile begins."""
    profile_step_end: int = 12
    """Last step of the profile."""
    profile_ranks: tuple[int, ...] = (0,)
    """Ranks that are profiled."""


class Sections:
    """What every configuration of sections can do; see ``from_dict`` for the other way."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values by section, as YAML and JSON hold them."""
        return dict(json.loads(json.dumps(dataclasses.asdict(self))))  # type: ignore[call-overload]

    def as_yaml(self) -> str:
        return yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True)


@dataclass(frozen=True)
class Config(Sections):
    """A run: one dataclass a section."""

    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


Root = TypeVar("Root")


def from_dict(values: Any, source: str, root: type[Root] = Config) -> Root:  # type: ignore[assignment]
    """A Config, or another dataclass of sections, from plain values by section.

    Raises:
        ConfigError: not a mapping of mappings, an unknown section or key, or a value of the wrong type.
    """
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: holds {_kind(values)}; a configuration is a mapping of sections")
    sections = {f.name: f for f in dataclasses.fields(root)}  # type: ignore[arg-type]
    built: dict[str, Any] = {}
    for name, content in values.items():
        if name not in sections:
            raise ConfigError(f"{source}: section {name!r} is unknown; {_nearest(str(name), sections)}")
        if content is None:
            content = {}
        if not isinstance(content, dict):
            raise ConfigError(f"{source}: section {name!r} holds {_kind(content)}; it must be a mapping of keys")
        section_type = type(getattr(root(), name))
        fields = {f.name: f for f in dataclasses.fields(section_type)}
        checked = {}
        for key, value in content.items():
            if key not in fields:
                raise ConfigError(f"{source}: key {name}.{key} is unknown; {_nearest(str(key), fields)}")
            checked[key] = _checked(value, section_type, key, f"{source}: {name}.{key}")
        built[name] = section_type(**checked)
    return root(**built)


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"


def _kind(value: Any) -> str:
    return {dict: "a mapping", list: "a list", str: "text", type(None): "nothing", bool: "a switch"}.get(
        type(value), f"a {type(value).__name__}"
    )


def _checked(value: Any, section: type, key: str, where: str) -> Any:
    """The value as the field's type, or a ConfigError. YAML reads 5e-7 as text, so numbers in text are read here."""
    import types
    import typing

    hint = typing.get_type_hints(section)[key]
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    rule = []
    for option in options:
        if option is type(None):
            rule.append("null")
            if value is None:
                return None
        elif typing.get_origin(option) is Literal:
            allowed = typing.get_args(option)
            rule.append("one of " + ", ".join(map(str, allowed)))
            if value in allowed and isinstance(value, str):
                return value
        elif option is bool:
            rule.append("true or false")
            if isinstance(value, bool):
                return value
        elif option is int:
            rule.append("a whole number")
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        elif option is float:
            rule.append("a number")
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                return float(value)
            if isinstance(value, str):
                try:
                    return float(value)
                except ValueError:
                    pass
        elif option is str:
            rule.append("text")
            if isinstance(value, str):
                return value
        elif option == tuple[int, ...]:
            rule.append("a list of whole numbers")
            if isinstance(value, (list, tuple)) and all(type(v) is int for v in value):
                return tuple(value)
        elif typing.get_origin(option) is tuple:
            rule.append("a list of texts")
            plain = isinstance(value, (list, tuple)) and all(
                isinstance(v, (str, int)) and not isinstance(v, bool) for v in value
            )
            if plain:
                return tuple(map(str, value))
    raise ConfigError(f"{where}={value!r} is {_kind(value)}; it must be {' or '.join(rule)}")


def from_yaml(path: str | Path, root: type[Root] = Config) -> Root:  # type: ignore[assignment]
    """Read a YAML file.

    Raises:
        ConfigError: no such file, not YAML, or what ``from_dict`` refuses.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"--config {path}: there is no such file; name an existing YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: cannot be read as UTF-8 text ({error}); give a YAML file") from None
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        detail = " ".join(str(error).split())
        raise ConfigError(f"--config {path}: is not YAML ({detail}); mend it at that place") from None
    return from_dict(values, f"--config {path}", root)


def from_command_line(
    arguments: Sequence[str],
    *,
    prog: str,
    quiet: bool = False,
    root: type[Root] = Config,  # type: ignore[assignment]
    description: str = "LongPO training.",
) -> tuple[Root, bool]:
    """Configuration of ``--config FILE`` and flags; the second value says whether ``--print-config`` was given.

    Exits with status 2 on flags that cannot be read (the message goes to stderr unless ``quiet``).

    Raises:
        ConfigError: what ``from_yaml`` refuses.
    """
    arguments = list(arguments)
    path = _take_value(arguments, "--config")
    print_config = "--print-config" in arguments
    if print_config:
        arguments.remove("--print-config")
    base = from_yaml(path, root) if path is not None else root()
    config = tyro.cli(
        Annotated[root, tyro.conf.OmitArgPrefixes],  # type: ignore[arg-type]
        prog=prog,
        default=base,
        args=arguments,
        description=f"{description} Also: --config FILE.yaml (read first), --print-config (show what results, and stop).",
        config=(tyro.conf.OmitArgPrefixes,),
        console_outputs=not quiet,
    )
    return config, print_config


def _take_value(arguments: list[str], flag: str) -> str | None:
    for index, argument in enumerate(arguments):
        if argument == flag:
            if index + 1 >= len(arguments):
                raise ConfigError(f"{flag} has no value; write {flag} FILE.yaml")
            value = arguments[index + 1]
            del arguments[index : index + 2]
            return value
        if argument.startswith(flag + "="):
            value = argument[len(flag) + 1 :]
            del arguments[index]
            return value
    return None


# --------------------------------------------------------------------------------------------------
# Checks
# --------------------------------------------------------------------------------------------------


def check(config: Config) -> None:
    """What can be said of a configuration alone.

    Raises:
        ConfigError: the first value that breaks a rule.
    """
    c = config

    def positive(section: Any, *names: str) -> None:
        for name in names:
            value = getattr(section, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name}={value} must be positive; set it to at least 1, or leave it out")

    positive(c.parallel, "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    positive(c.parallel, "num_layers_per_virtual_pipeline_stage", "virtual_pipeline_model_parallel_size")
    positive(c.parallel, "distributed_timeout_minutes")
    positive(c.training, "micro_batch_size", "global_batch_size", "train_iters", "recompute_num_layers", "train_epochs")
    positive(c.training, "eval_interval", "eval_iters")
    positive(c.checkpoint, "save_interval", "keep_last", "exit_interval", "exit_duration_in_mins")
    positive(c.logging, "log_interval", "plot_interval")
    positive(c.model, "rotary_base", "max_position_embeddings", "make_vocab_size_divisible_by", "logprob_chunk_bytes")
    positive(c.reference, "reference_rotary_base", "reference_max_tokens")
    positive(c.data, "seq_length")

    if not c.objective.beta > 0:
        raise ConfigError(f"beta={c.objective.beta} must be positive; the paper uses 0.1")
    if c.objective.preference_weight < 0:
        raise ConfigError(
            f"preference_weight={c.objective.preference_weight} must not be negative; the paper uses 0.01"
        )
    if not 0 <= c.objective.label_smoothing < 0.5:
        raise ConfigError(f"label_smoothing={c.objective.label_smoothing} must be in [0, 0.5); 0 turns it off")
    if c.objective.label_smoothing and c.objective.loss_type != "sigmoid":
        raise ConfigError(
            f"label_smoothing={c.objective.label_smoothing} is defined for loss_type=sigmoid, not for "
            f"{c.objective.loss_type}; set label_smoothing to 0 or loss_type to sigmoid"
        )
    o = c.optimizer
    if not o.lr > 0:
        raise ConfigError(f"lr={o.lr} must be positive; the paper uses 5e-7")
    if not 0 <= o.min_lr <= o.lr:
        raise ConfigError(f"min_lr={o.min_lr} must lie between 0 and lr={o.lr}")
    if not 0 <= o.lr_warmup_init <= o.lr:
        raise ConfigError(f"lr_warmup_init={o.lr_warmup_init} must lie between 0 and lr={o.lr}")
    if o.lr_warmup_fraction is not None:
        if not 0 <= o.lr_warmup_fraction < 1:
            raise ConfigError(f"lr_warmup_fraction={o.lr_warmup_fraction} must be in [0, 1)")
        if o.lr_warmup_iters:
            raise ConfigError(
                f"lr_warmup_fraction={o.lr_warmup_fraction} and lr_warmup_iters={o.lr_warmup_iters} both set the "
                "warm-up; give one of them"
            )
    if o.lr_decay_style == "WSD" and o.lr_wsd_decay_iters is None:
        raise ConfigError("lr_decay_style=WSD needs lr_wsd_decay_iters, the number of its last, decaying steps")
    if o.clip_grad < 0 or o.weight_decay < 0:
        raise ConfigError(f"clip_grad={o.clip_grad} and weight_decay={o.weight_decay} must not be negative; 0 is off")
    if c.data.valid_data_path is None:
        for name in ("eval_interval", "eval_iters", "skip_train"):
            if getattr(c.training, name):
                raise ConfigError(f"{name} is about held-out data, and valid_data_path is not given; name its prefix")
    p = c.parallel
    if p.num_layers_per_virtual_pipeline_stage and p.virtual_pipeline_model_parallel_size:
        raise ConfigError(
            "num_layers_per_virtual_pipeline_stage and virtual_pipeline_model_parallel_size say the same thing twice; "
            "give one of them"
        )
    interleaved = p.num_layers_per_virtual_pipeline_stage or p.virtual_pipeline_model_parallel_size
    if interleaved and p.pipeline_model_parallel_size == 1:
        raise ConfigError(
            "a virtual pipeline needs pipeline_model_parallel_size of at least 2, not 1; raise it or leave "
            "num_layers_per_virtual_pipeline_stage out"
        )
    if p.sequence_parallel and p.tensor_model_parallel_size == 1:
        raise ConfigError(
            "sequence_parallel shards over tensor-parallel ranks, and tensor_model_parallel_size=1; raise that or turn "
            "sequence_parallel off"
        )
    if c.logging.profile and c.checkpoint.save is None:
        raise ConfigError("profile is on but save is not given; name the output folder with --save")
    if not 0 <= c.logging.profile_step_start < c.logging.profile_step_end:
        raise ConfigError(
            f"profile_step_start={c.logging.profile_step_start} must be at least 0 and less than "
            f"profile_step_end={c.logging.profile_step_end}; steps 11 and 12 are profiled with 10 and 12"
        )
    if c.checkpoint.async_save and c.checkpoint.save is None:
        raise ConfigError("async_save is on but save is not given; name the output folder with --save")
    if c.objective.objective != "longpo" and c.data.turns == "independent":
        raise ConfigError(
            f"turns=independent is LongPO's Eq. 13; objective={c.objective.objective} takes turns=chained"
        )
    if c.reference.reference == "cached" and c.reference.reference_model == "resident":
        raise ConfigError(
            "reference_model=resident keeps a second model for reference=online; with reference=cached no reference "
            "model is in memory: leave it out or set reference=online"
        )
    unknown = set(c.training.recompute_modules) - {"core_attn", "mlp", "mlp_up"}
    if unknown:
        raise ConfigError(
            f"recompute_modules={', '.join(sorted(unknown))} is unknown; use core_attn, mlp and mlp_up "
            "(norms and activations are always computed again)"
        )


def scaling_numbers(model: ModelConfig) -> dict[str, Any]:
    """The numbers of a RoPE scaling by Hugging Face's names; None where not given."""
    names = "original_max_position_embeddings attention_factor beta_fast beta_slow low_freq_factor high_freq_factor"
    return {"factor": model.rotary_scaling_factor, **{name: getattr(model, name) for name in names.split()}}


def virtual_pipeline_size(config: ParallelConfig, num_layers: int) -> int | None:
    """Virtual stages a pipeline rank, or None.

    Raises:
        ConfigError: the layers do not divide.
    """
    stages = config.pipeline_model_parallel_size
    if num_layers % stages:
        raise ConfigError(
            f"pipeline_model_parallel_size={stages} does not divide the {num_layers} layers; use one of "
            f"{_divisors(num_layers)}"
        )
    per_rank = num_layers // stages
    if config.num_layers_per_virtual_pipeline_stage:
        per_stage = config.num_layers_per_virtual_pipeline_stage
        if per_rank % per_stage:
            raise ConfigError(
                f"num_layers_per_virtual_pipeline_stage={per_stage} does not divide the {per_rank} layers of a "
                f"pipeline rank; use one of {_divisors(per_rank)}"
            )
        virtual = per_rank // per_stage
    elif config.virtual_pipeline_model_parallel_size:
        virtual = config.virtual_pipeline_model_parallel_size
        if per_rank % virtual:
            raise ConfigError(
                f"virtual_pipeline_model_parallel_size={virtual} does not divide the {per_rank} layers of a pipeline "
                f"rank; use one of {_divisors(per_rank)}"
            )
    else:
        return None
    return virtual if virtual > 1 else None


def data_parallel_size(config: Config, world_size: int) -> int:
    """Data-parallel size that the other degrees leave of the world.

    Raises:
        ConfigError: they do not divide it, or the batch does not divide over it.
    """
    p = config.parallel
    tp, pp, cp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size, p.context_parallel_size
    if world_size % (tp * pp * cp):
        raise ConfigError(
            f"tensor {tp} x pipeline {pp} x context {cp} = {tp * pp * cp} parallel ranks do not divide the world of "
            f"{world_size} processes; launch a multiple of {tp * pp * cp}"
        )
    dp = world_size // (tp * pp * cp)
    t = config.training
    if t.global_batch_size % (t.micro_batch_size * dp):
        raise ConfigError(
            f"global_batch_size={t.global_batch_size} is not a multiple of micro_batch_size={t.micro_batch_size} x "
            f"data-parallel size {dp}; use a multiple of {t.micro_batch_size * dp}"
        )
    return dp


def check_against_model(
    config: Config, *, world_size: int, num_layers: int, attention_heads: int, key_value_heads: int
) -> None:
    """Whether the degrees fit the model.

    Raises:
        ConfigError: the first that does not.
    """
    dp = data_parallel_size(config, world_size)
    p, t = config.parallel, config.training
    tp = p.tensor_model_parallel_size
    usable = [n for n in range(1, attention_heads + 1) if attention_heads % n == 0 and key_value_heads % n == 0]
    if tp not in usable:
        raise ConfigError(
            f"tensor_model_parallel_size={tp} does not divide {attention_heads} attention heads and {key_value_heads} "
            f"key-value heads; use one of {', '.join(map(str, usable))}"
        )
    virtual = virtual_pipeline_size(p, num_layers)
    microbatches = t.global_batch_size // (t.micro_batch_size * dp)
    if virtual and microbatches % p.pipeline_model_parallel_size:
        raise ConfigError(
            f"an interleaved pipeline needs its {microbatches} micro batches a step to be a multiple of "
            f"pipeline_model_parallel_size={p.pipeline_model_parallel_size}; change global_batch_size"
        )
    if t.recompute_granularity == "full" and t.recompute_method == "uniform":
        per_stage = num_layers // p.pipeline_model_parallel_size // (virtual or 1)
        if per_stage % t.recompute_num_layers:
            raise ConfigError(
                f"recompute_num_layers={t.recompute_num_layers} does not divide the {per_stage} layers of a stage; use "
                f"one of {_divisors(per_stage)}"
            )


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


def check_part(rank: int | None, world_size: int | None) -> None:
    """Which part of how many.

    Raises:
        ConfigError: one without the other, or no such part.
    """
    if rank is None and world_size is None:
        return
    if rank is None or world_size is None:
        raise ConfigError(f"rank={rank} and world_size={world_size} belong together; give both or none")
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank={rank} must be from 0 to world_size - 1 = {world_size - 1}")


def check_numbers(section: Any) -> None:
    """The numbers of a section of generation or evaluation: whole ones at least 1 (or 0), others finite.

    Raises:
        ConfigError: the first value that breaks the rule.
    """
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        least = 0 if f.name in ("min_document_tokens", "retries") else 1
        if whole and value < least:
            raise ConfigError(f"{f.name}={value} must be at least {least}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{f.name}={value} must be a number")
