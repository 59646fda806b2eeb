"""Configuration of a training run: dataclasses by section, read from YAML and flags, checked before any process group is made.

A field has the name of Megatron-LM's argument wherever Megatron-LM has one; its flag is that name without a section prefix.
Precedence: flag, then YAML, then the default written here. Unknown keys are refused. The range of a number is in its
annotation (``schema.py``); rules that concern several fields are in the functions below the sections.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml

from megatron_longpo.errors import ConfigError
from megatron_longpo.schema import (
    Count,
    ModelSizeFactor,
    NaturalNumber,
    PositiveFloat,
    Range,
    check_ranges,
    convert_fields,
    kind_of,
    nearest,
)

# What multiplies a weight or a loss stays within fp32, which ends at 3.4e38: Adam divides lr by 1 - beta1 in its first step.
LARGEST = 1e36
RECOMPUTE_MODULES = ("core_attn", "mlp", "mlp_up")


# --------------------------------------------------------------------------------------------------
# Sections
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataConfig:
    """The data that the model is trained on."""

    data_path: str | tuple[str, ...] | None = None
    """Path prefix of the indexed binaries (PREFIX.bin, PREFIX.idx, PREFIX.json). Several: `0.7 A 0.3 B` draws them in these
    proportions; `A B` takes each sample of all of them once per epoch."""
    valid_data_path: str | None = None
    """Path prefix of held-out data, evaluated every eval_interval steps and after the last one. Results go to
    OUTPUT/validation.jsonl."""
    shuffle: bool = True
    """Shuffle the samples of each epoch by the seed. Off: file order."""
    turns: Literal["chained", "independent"] = "chained"
    """chained: the turns of a sample form one dialogue (the released code); independent: each turn stands on the document by
    itself (the paper's Eq. 13)."""
    prefix_sharing: bool = True
    """Compute what the rows of a sample have in common once. Off: compute every row in full, for the same numbers at a higher
    cost."""
    seq_length: Count | None = None
    """Longest row of a sample, in tokens; data with longer ones are refused at the start. Default: no limit, and staying within
    the model's rotary range is up to you (see rotary_base)."""
    verify_data: bool = True
    """Verify the checksums of the binaries at the start."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """The loss."""

    objective: Literal["longpo", "dpo", "sft", "solopo"] = "longpo"
    """longpo: preference_weight times the preference loss against the short-context reference, plus NLL; dpo: preference loss
    only, against the reference on the long rows; sft: NLL of the chosen rows; solopo: preference loss of the short rows, plus
    solo_alpha times the distance of the chosen answer's reward between short and long context (loss_type=simpo or orpo)."""
    beta: Annotated[float, Range(gt=0, fix="the paper uses 0.1")] = 0.1
    """Strength of the constraint to the reference (0.1 in the paper, 0.01 in the released script)."""
    preference_weight: Annotated[float, Range(ge=0, le=LARGEST, fix="the paper uses 0.01")] = 0.01
    """Weight of the preference term in longpo, the paper's lambda (0.01 in the paper and the released script)."""
    nll_scope: Literal["sequence", "response"] = "sequence"
    """sequence: NLL is the mean over the whole long chosen sequence, document included; response: over its responses only."""
    loss_type: Literal["sigmoid", "sigmoid_norm", "robust", "ipo", "hinge", "simpo", "orpo"] = "sigmoid"
    """Form of the preference loss. simpo and orpo need no reference: none is loaded, scored or cached."""
    label_smoothing: Annotated[float, Range(ge=0, lt=0.5, fix="0 turns it off")] = 0.0
    """Probability that the two answers of a pair are swapped (loss_type=sigmoid, sigmoid_norm, robust or simpo)."""
    simpo_gamma: Annotated[float, Range(ge=0, le=LARGEST, fix="the paper uses 0.3 to 1.6")] = 0.5
    """Margin between the rewards of the two answers (loss_type=simpo only)."""
    rpo_alpha: Annotated[float, Range(ge=0, le=LARGEST, fix="0 turns it off; the paper uses 1")] = 0.0
    """Weight of the NLL per token of the chosen answers, which is added to the loss of longpo, dpo or solopo (RPO)."""
    solo_alpha: Annotated[float, Range(ge=0, le=LARGEST, fix="the paper uses 1 to 4")] = 1.0
    """Weight of the short-to-long reward alignment in solopo."""


@dataclass(frozen=True)
class ReferenceConfig:
    """The frozen reference model."""

    reference: Literal["cached", "online"] = "cached"
    """cached: log-probs are computed once, with the initial weights, and stored with the data; online: in every step."""
    reference_load: str | None = None
    """Checkpoint of the reference, or its URL. Default: that of --load."""
    reference_model: Literal["swapped", "resident"] = "swapped"
    """For reference=online. swapped: the initial weights wait in host memory and trade places with the policy's; resident: the
    reference is a second model on the device."""
    reference_rotary_base: PositiveFloat | None = None
    """RoPE theta of the reference. Default: its checkpoint's."""
    reference_cache: str | None = None
    """Folder of the cached log-probs. Default: PREFIX.reference, next to the data."""
    reference_max_tokens: Count = 16384
    """Short rows are packed into sequences of at most this many tokens; a longer row is a sequence by itself."""
    reference_only: bool = False
    """Score the data with the reference, write the cache and stop: training then begins at once, perhaps on other machines."""


@dataclass(frozen=True)
class RopeChanges:
    """Changes to a model's RoPE and to its longest context. Default: as the model is."""

    rotary_base: PositiveFloat | None = None
    """RoPE theta of the policy (paper: 1e7). Default: the checkpoint's."""
    rope_type: Literal["default", "linear", "llama3", "yarn"] | None = None
    """RoPE scaling of the policy, with the numbers below, which have Hugging Face's names; `default` is no scaling. Default: the
    checkpoint's. The reference always keeps its checkpoint's."""
    rotary_scaling_factor: float | None = None
    """Factor of the scaling (linear, llama3, yarn)."""
    original_max_position_embeddings: int | None = None
    """Context length before scaling, in tokens (llama3, yarn). Default: that of the checkpoint's own scaling, else its
    longest."""
    attention_factor: float | None = None
    """Scale of cosines and sines (yarn). Default: derived from the factor."""
    beta_fast: float | None = None
    """Rotations within the original context above which a channel is kept (yarn)."""
    beta_slow: float | None = None
    """Rotations within the original context below which a channel is stretched (yarn)."""
    low_freq_factor: float | None = None
    """Rotations within the original context below which a channel is stretched (llama3)."""
    high_freq_factor: float | None = None
    """Rotations within the original context above which a channel is kept (llama3)."""
    max_position_embeddings: Count | None = None
    """Longest context, in tokens, that the exported model claims. Default: the checkpoint's, or seq_length if that is
    longer."""


@dataclass(frozen=True)
class ModelConfig(RopeChanges):
    """What can be set about the model; its shape comes from the checkpoint."""

    make_vocab_size_divisible_by: Count = 128
    """The vocabulary is padded to a multiple of this times the tensor-parallel size. Padding never takes part in a result."""
    attention_backend: Literal["auto", "flash", "fused", "memory_efficient", "unfused"] = "auto"
    """Attention kernels. auto: on CUDA flash for bf16, with fused for large blocks where the GPU has it, and memory_efficient for
    fp32; the log says which; flash: torch's own FlashAttention; fused: cuDNN (CUDA); memory_efficient: torch's cutlass kernels
    (CUDA); unfused: the plain formula, slow."""
    model_size_factor: ModelSizeFactor = 1.0
    """Factor by which a model may exceed the limits of its numbers (SECURITY.md), such as 4096 layers."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Linear layers. transformer_engine: Transformer Engine's (CUDA); local: megatron-core's own; auto: Transformer Engine's
    where it is installed and computes what torch does; the log says which."""
    logprob_chunk_bytes: Count | None = None
    """Memory for the logits of one chunk of tokens, in bytes. Default: 128 MiB on the CPU, 1 GiB on CUDA."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the work is divided among processes."""

    tensor_model_parallel_size: Count = 1
    """Ranks that share each weight matrix."""
    pipeline_model_parallel_size: Count = 1
    """Pipeline stages that the layers are divided into."""
    num_layers_per_virtual_pipeline_stage: Count | None = None
    """Layers per virtual stage; interleaves the pipeline."""
    virtual_pipeline_model_parallel_size: Count | None = None
    """Virtual stages per pipeline rank, instead of num_layers_per_virtual_pipeline_stage."""
    decoder_first_pipeline_num_layers: Count | None = None
    """Layers of the first pipeline rank. Default: as many as the others have."""
    decoder_last_pipeline_num_layers: Count | None = None
    """Layers of the last pipeline rank. Default: as many as the others have."""
    account_for_embedding_in_pipeline_split: bool = False
    """Count the embedding as a layer when layers are divided among pipeline ranks: the first rank has one layer less."""
    account_for_loss_in_pipeline_split: bool = False
    """Count the loss as a layer when layers are divided among pipeline ranks: the last rank has one layer less."""
    context_parallel_size: Count = 1
    """Ranks that share each sequence."""
    auto_layout: bool = False
    """Let the planner choose the degrees, the exchange of context parallelism and the micro batch size that are left out, for the
    processes that there are; the log says what and why. A value that a YAML file has in common with the default is left out."""
    cp_comm_type: Literal["auto", "a2a", "allgather"] = "auto"
    """Communication of context parallelism. a2a: trade positions for heads (Ulysses; the size must divide the heads);
    allgather: gather keys and values on all ranks, with queries assigned so that causal work is balanced (any size); auto:
    a2a where the size divides the heads."""
    sequence_parallel: bool = False
    """Shard norms and residuals across tensor-parallel ranks."""
    use_distributed_optimizer: bool = False
    """Shard optimizer states across data- and context-parallel ranks."""
    grad_reduce_in_bf16: bool = False
    """Keep and reduce gradients in bfloat16 (with bf16) instead of fp32: half their memory and traffic. Sums over micro batches
    and ranks are then rounded each time, so it costs precision the more of them there are."""
    gradient_accumulation_fusion: bool = True
    """Add gradients of megatron-core's linear layers to their fp32 sums inside the product (CUDA, with bf16, unless
    grad_reduce_in_bf16). Otherwise they are rounded to bfloat16 in each micro batch first, and Transformer Engine's always
    are."""
    overlap_grad_reduce: bool = False
    """Reduce gradients bucket by bucket while the backward pass is still running."""
    overlap_param_gather: bool = False
    """Gather updated weights bucket by bucket while the next step's forward is running (with use_distributed_optimizer and
    overlap_grad_reduce)."""
    distributed_timeout_minutes: Count = 10
    """Minutes after which a collective counts as failed."""


@dataclass(frozen=True)
class TrainingConfig:
    """Length of the run, size of the batches, precision, recomputation."""

    micro_batch_size: Count = 1
    """Samples that each data-parallel rank processes at once."""
    global_batch_size: Count = 8
    """Samples per optimizer step (paper: 8). Data with fewer samples are used whole in each step, each sample once."""
    train_iters: Count | None = None
    """Optimizer steps. Default: train_epochs over the data."""
    train_epochs: PositiveFloat = 1.0
    """Epochs, if train_iters is not given; rounded down to whole steps, but at least one. An epoch has as many samples as all
    data sets together."""
    eval_interval: Count | None = None
    """Steps between evaluations of the held-out data (valid_data_path). Default: only before the first and after the last
    step."""
    eval_iters: Count | None = None
    """Global batches per evaluation, counted from the first sample. Default: all held-out data."""
    skip_train: bool = False
    """Evaluate the held-out data and stop. Neither an optimizer nor data_path is needed."""
    bf16: bool = False
    """Weights and activations in bfloat16, gradients and master weights in fp32. Off: everything in fp32."""
    fp8_format: Literal["hybrid"] | None = None
    """Products of Transformer Engine's linear layers in FP8 (with bf16 and transformer_impl=transformer_engine): E4M3 forward,
    E5M2 for gradients. Attention, log-probs, the reference and held-out data stay in bfloat16."""
    fp8_recipe: Literal["delayed", "tensorwise"] = "tensorwise"
    """How fp8_format scales a tensor. tensorwise: by its own largest number; delayed is not offered."""
    recompute_granularity: Literal["auto", "none", "selective", "full"] = "auto"
    """Activations that the backward pass recomputes instead of keeping. selective: those of recompute_modules; full: whole
    layers; auto: the MLPs' first products where that is cheap, and beyond that as little as fits into memory; the log says
    what was chosen."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """For full. uniform: recompute all layers, in groups of recompute_num_layers; block: recompute the first
    recompute_num_layers layers of each stage."""
    recompute_num_layers: Count = 1
    """Layers per group (uniform), or layers that are recomputed per stage (block)."""
    recompute_modules: tuple[str, ...] = ("core_attn",)
    """Modules for selective: core_attn, mlp, or mlp_up (the MLP's first product only; with full and block, that of the layers
    that are not recomputed)."""
    cpu_offloading_num_layers: Annotated[int, Range(ge=0, fix="0 turns it off")] | None = None
    """Layers of each stage whose activations wait in host memory between forward and backward: the first that are not recomputed
    as a whole. Default: none, or what recompute_granularity=auto chooses on CUDA where computing a layer takes longer than
    copying."""
    seed: int = 1234
    """Seed of the sample order, and of the random numbers of each rank."""
    deterministic_mode: bool = False
    """Use only operations that give the same bits in every run on the same machines; slower on CUDA, and an operation that has
    no such form ends the run. On the CPU every run is deterministic."""
    manual_gc_interval: int = 0
    """Steps between collections of Python's garbage, done by all ranks at the same time. 0: leave it to Python."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and learning-rate schedule."""

    optimizer: Literal["adam", "rmsprop"] = "adam"
    """adam: AdamW, whose weight decay is decoupled; rmsprop: torch's, whose weight decay is added to the gradient."""
    lr: Annotated[float, Range(gt=0, le=LARGEST, fix="the paper uses 5e-7")] = 5e-7
    """Peak learning rate (paper: 5e-7)."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["cosine", "linear", "constant", "WSD"] = "cosine"
    """Shape of the decay."""
    lr_decay_iters: int | None = None
    """Steps over which the learning rate decays. Default: train_iters."""
    lr_warmup_fraction: Annotated[float, Range(ge=0, lt=1, fix="0.1 warms up over the first tenth")] | None = None
    """Fraction of lr_decay_iters for the warm-up."""
    lr_warmup_iters: int = 0
    """Steps of the warm-up, instead of lr_warmup_fraction: step k of w trains at k/w of the peak rate. (Runs that began before
    0.2.0 trained it at (k - 1)/w, and keep that.)"""
    lr_warmup_init: float = 0.0
    """Learning rate that the warm-up starts above."""
    lr_wsd_decay_iters: int | None = None
    """Steps of the decay at the end of a WSD schedule."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "linear"
    """Shape of the decay at the end of a WSD schedule."""
    weight_decay: Annotated[float, Range(ge=0, le=LARGEST, fix="0 turns it off")] = 0.0
    """Weight decay."""
    adam_beta1: Annotated[float, Range(ge=0, lt=1, fix="0.9 is usual")] = 0.9
    """Adam's decay rate of the gradient's mean."""
    adam_beta2: Annotated[float, Range(ge=0, lt=1, fix="0.999 is usual")] = 0.999
    """Adam's decay rate of the squared gradient's mean."""
    adam_eps: Annotated[float, Range(ge=0, le=LARGEST, fix="1e-8 is usual")] = 1e-8
    """Adam's epsilon."""
    rmsprop_alpha: Annotated[float, Range(ge=0, lt=1, fix="0.99 is usual")] = 0.99
    """RMSProp's decay rate of the squared gradient's mean (torch's default)."""
    rmsprop_eps: Annotated[float, Range(ge=0, le=LARGEST, fix="1e-8 is usual")] = 1e-8
    """RMSProp's epsilon."""
    clip_grad: Annotated[float, Range(ge=0, fix="0 turns clipping off")] = 1.0
    """Largest norm of the whole gradient. 0: no clipping."""
    optimizer_cpu_offload: bool = False
    """Keep optimizer states and fp32 weights in host memory and update them there (with use_distributed_optimizer)."""
    optimizer_offload_fraction: Annotated[float, Range(gt=0, le=1, fix="1 offloads everything")] = 1.0
    """Fraction of the parameters that optimizer_cpu_offload concerns."""
    overlap_cpu_optimizer_d2h_h2d: bool = False
    """With optimizer_cpu_offload, copy gradients to the host and weights back parameter by parameter while others are updated."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints that are loaded and saved."""

    load: str | None = None
    """Converted checkpoint, or output folder of a run, whose weights training starts from; or a URL of either."""
    save: str | None = None
    """Output folder of the run. A run that finds its own checkpoint there resumes from it."""
    save_interval: Count | None = None
    """Steps between checkpoints. The last step is always saved."""
    async_save: bool = False
    """Write checkpoints in the background."""
    keep_last: Count | None = None
    """Number of checkpoints to keep, newest first. Default: all, or 1 with save_retain_interval."""
    save_retain_interval: Count | None = None
    """Steps between checkpoints that are kept for good, beside those of keep_last; a multiple of save_interval."""
    upload_to: str | None = None
    """URL (s3://BUCKET/RUN with the extra `s3`, gs://, az://, file://) that complete checkpoints are copied to in the background.
    A run whose own folder has none, or older ones, goes on from there. keep_last and save_retain_interval hold there as well."""
    upload_retry_minutes: PositiveFloat = 10.0
    """Minutes for which an upload that fails is tried again until on_save_failure decides, or, at the end, the run fails."""
    save_best: str | None = None
    """Held-out metric by which the best checkpoint is saved and kept beside keep_last, after an evaluation (eval_interval): nll,
    loss, rewards/margins, rewards/accuracies, ...; with a direction of your own `kl/rejected:max`. OUTPUT/best stands for it
    wherever a checkpoint is named."""
    save_hf_interval: Count | None = None
    """Steps between exports of the weights in Hugging Face's form, to OUTPUT/hf_* beside the checkpoint of the same step."""
    no_save_optim: bool = False
    """Save weights only. Such a checkpoint can be exported but not resumed from."""
    exit_interval: Count | None = None
    """Save and stop after a step divisible by this, to fit a job's time limit."""
    exit_duration_in_mins: PositiveFloat | None = None
    """Save and stop after this many minutes."""
    exit_signal_handler: bool = True
    """Save and stop, with exit status 75, after the step in which a process of the run gets a signal of exit_signal; the same
    command then goes on. Off: signals have their usual effect, and what was done since the last checkpoint is done again."""
    exit_signal: tuple[str, ...] = ("SIGTERM", "SIGUSR1")
    """Signals that ask a run to save and stop, such as a scheduler's before a time limit."""


@dataclass(frozen=True)
class FaultsConfig:
    """What a run does about numbers, machines and disks that fail."""

    max_skipped_steps: NaturalNumber = 10
    """Steps of the run that may be skipped because their loss or gradient is NaN, infinite or a spike; one more ends the run. A
    skipped step changes no weight, and OUTPUT/skipped names its samples. 0: the first one ends the run."""
    check_for_spiky_loss: bool = False
    """Skip a step, too, whose loss is above the median of the last spiky_loss_window losses by more than spiky_loss_deviations
    of their deviations (1.4826 times their median absolute deviation, and at least 1% of the median)."""
    spiky_loss_deviations: PositiveFloat = 10.0
    """Deviations above which a loss is a spike."""
    spiky_loss_window: Annotated[int, Range(ge=20)] = 100
    """Losses that a loss is compared with. With fewer than 20 of them, in the first steps, there are no spikes."""
    heartbeat_timeout_seconds: Annotated[
        float, Range(ge=0, fix="35 tolerates a network that is lost for 20 s; 0: never")
    ] = 35.0
    """Seconds without a sign of life after which a rank counts as dead and the run ends, to be restarted: its process is stopped,
    or its machine or the network to it is down. 0: never; then only distributed_timeout_minutes ends the wait for it."""
    check_weight_hash_across_dp_replicas_interval: Count | None = None
    """Steps between comparisons, bit for bit, of the weights of ranks that should have the same; a rank whose memory or
    arithmetic fails is named, and the run ends. Default: never."""
    check_rerun_interval: Count | None = None
    """Steps between checks in which one micro batch is computed twice from the same state, and all that its modules give and all
    gradients are compared: bit for bit on the CPU and with deterministic_mode, otherwise by norms to 1e-5, in bf16 to 1/128, and
    in blocks of 1024 values to eight times that. It takes two micro batches more, with virtual pipeline stages twice as many as
    there are stages. Default: never."""
    on_rerun_mismatch: Literal["stop", "continue"] = "stop"
    """What to do when they differ, after rank, machine and place are named. continue: only warn."""
    on_save_failure: Literal["stop", "continue"] = "stop"
    """What to do when a checkpoint or a line of metrics cannot be written, as on a full, read-only or vanished disk. continue:
    train on and write again when it is time to, until the last step, which must be saved. The checkpoints that are there stay in
    both cases."""


@dataclass(frozen=True)
class LoggingConfig:
    """What is logged."""

    log_interval: Count = 1
    """Steps between progress lines. metrics.jsonl has every step."""
    log_format: Literal["text", "json"] = "text"
    """text: lines for people; json: one object per line, with time, level and message, and the metrics of a step by name."""
    fingerprint_interval: Count | None = None
    """Steps between fingerprints of the batch, the gradients and the weights in metrics.jsonl, by which `compare-runs` finds
    where two runs of the same layout part. Default: none."""
    log_straggler: bool = False
    """At each log interval compare the ranks' own work (without waiting for others) by phase, data reading among them; name those
    that are slow in the log, metrics.jsonl, the trackers, `status` and `watch`."""
    straggler_threshold: Annotated[float, Range(gt=1, fix="1.5 names a rank that takes half as long again")] = 1.5
    """How many times as long as the median of its peers a rank must take to be named, both per step and per unit of its work."""
    straggler_minmax_count: Count = 1
    """Most ranks that a warning names, the slowest first."""
    tensorboard: bool = True
    """Write TensorBoard events to OUTPUT/tensorboard."""
    wandb_project: str | None = None
    """Weights & Biases project to report to (extra `wandb`)."""
    wandb_exp_name: str | None = None
    """Name of the run at Weights & Biases. Default: one that it makes up."""
    mlflow_experiment: str | None = None
    """MLflow experiment to report to (extra `mlflow`)."""
    mlflow_run_name: str | None = None
    """Name of the run at MLflow. Default: one that it makes up."""
    mlflow_tracking_uri: str | None = None
    """Address of the MLflow server, or file:FOLDER. Default: MLflow's own (MLFLOW_TRACKING_URI)."""
    swanlab_project: str | None = None
    """SwanLab project to report to (extra `swanlab`)."""
    swanlab_exp_name: str | None = None
    """Name of the run at SwanLab. Default: one that it makes up."""
    swanlab_mode: Literal["online", "local", "offline"] = "online"
    """online: SwanLab's server; local: its local dashboard; offline: files that are uploaded later."""
    prometheus_port: Annotated[int, Range(ge=1, le=65535, fix="9400 is usually free")] | None = None
    """Port at which rank 0 offers the latest metrics to Prometheus (extra `prometheus`)."""
    prometheus_file: str | None = None
    """File, ending in .prom, that has the latest metrics for the textfile collector of Prometheus' node exporter (extra
    `prometheus`)."""
    plot_interval: Count = 25
    """Steps between updates of OUTPUT/curves.png, which is always drawn at the end. Updates are left out where they would take
    more than a twentieth of the time."""
    profile: bool = False
    """Write a torch profile of some steps to OUTPUT/profile and, on CUDA, a snapshot of the allocator's memory."""
    profile_step_start: Annotated[int, Range(ge=0, fix="0 begins with the first step")] = 10
    """Steps that are done before the profile begins."""
    profile_step_end: int = 12
    """Last step of the profile."""
    profile_ranks: tuple[int, ...] = (0,)
    """Ranks that are profiled."""


class Sections:
    """A configuration: a dataclass whose fields are dataclasses, one per section. ``from_dict`` is the way back."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values by section, as YAML and JSON hold them."""
        return dict(json.loads(json.dumps(dataclasses.asdict(self))))  # type: ignore[call-overload]

    def as_yaml(self) -> str:
        """The configuration as a YAML file."""
        return yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True)


@dataclass(frozen=True)
class Config(Sections):
    """Configuration of a training run."""

    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


Root = TypeVar("Root")


def from_dict(values: Any, source: str, root: type[Root] = Config) -> Root:  # type: ignore[assignment]
    """Build a configuration from plain values by section.

    Args:
        values: section -> key -> value; None stands for an empty mapping.
        source: where the values come from, for errors.
        root: class of the configuration, a dataclass of sections.

    Raises:
        ConfigError: not a mapping of mappings, an unknown section or key, or a value of the wrong type.
    """
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: holds {kind_of(values)}; a configuration is a mapping of sections")
    default = root()
    sections = [f.name for f in dataclasses.fields(root)]  # type: ignore[arg-type]
    built: dict[str, Any] = {}
    for name, content in values.items():
        if name not in sections:
            raise ConfigError(f"{source}: section {name!r} is unknown; {nearest(str(name), sections)}")
        content = {} if content is None else content
        if not isinstance(content, dict):
            raise ConfigError(f"{source}: section {name!r} holds {kind_of(content)}; it must be a mapping of keys")
        section_type = type(getattr(default, name))
        built[name] = section_type(**convert_fields(section_type, content, f"{source}: {name}."))
    return root(**built)


def from_yaml(path: str | Path, root: type[Root] = Config) -> Root:  # type: ignore[assignment]
    """Read a configuration from a YAML file.

    Raises:
        ConfigError: whatever ``read_yaml`` and ``from_dict`` refuse.
    """
    return from_dict(read_yaml(path), f"--config {Path(path)}", root)


# Settings, not data.
_MOST_YAML_BYTES = 2**24


def changed_fields(config: Config) -> frozenset[str]:
    """Names of the fields, of all sections, that differ from their defaults."""
    values, defaults = config.as_dict(), Config().as_dict()
    return frozenset(
        name for section, fields in values.items() for name, value in fields.items() if value != defaults[section][name]
    )


def read_yaml(path: str | Path) -> Any:
    """Content of a YAML file.

    Raises:
        ConfigError: no such file, or invalid YAML.
    """
    path = Path(path)
    try:
        with open(path, "rb") as stream:
            content = stream.read(_MOST_YAML_BYTES + 1)
        if len(content) > _MOST_YAML_BYTES:
            raise ConfigError(f"--config {path}: has more than {_MOST_YAML_BYTES} bytes; give a YAML file of settings")
        text = content.decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"--config {path}: there is no such file; name an existing YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: cannot be read as UTF-8 text ({error}); give a YAML file") from None
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        detail = " ".join(str(error).split())
        raise ConfigError(f"--config {path}: is not valid YAML ({detail}); fix it there") from None


# --------------------------------------------------------------------------------------------------
# Checks
# --------------------------------------------------------------------------------------------------


def check(config: Config) -> None:
    """Check what a configuration says by itself, before anything is known of the data, the model or the machine.

    Raises:
        ConfigError: the first value that breaks a rule.
    """
    check_ranges(config)
    _check_objective(config)
    _check_optimizer(config.optimizer)
    if config.optimizer.optimizer_cpu_offload and not config.parallel.use_distributed_optimizer:
        raise ConfigError(
            "optimizer_cpu_offload is for the distributed optimizer; set use_distributed_optimizer as well, or leave it out"
        )
    if config.data.data_path is not None:
        data_sources(config.data.data_path)
    _check_held_out(config)
    _check_parallel(config.parallel)
    if config.parallel.grad_reduce_in_bf16 and not config.training.bf16:
        raise ConfigError("grad_reduce_in_bf16 is for training in bfloat16; set bf16 as well, or leave it out")
    _check_output(config)
    training = config.training
    if (
        training.cpu_offloading_num_layers
        and training.recompute_granularity == "full"
        and training.recompute_method == "uniform"
    ):
        raise ConfigError(
            f"cpu_offloading_num_layers={training.cpu_offloading_num_layers} concerns layers that are not recomputed as a whole, "
            "and recompute_granularity=full with recompute_method=uniform recomputes all of them; use recompute_method=block, or "
            "leave it out"
        )
    _check_fp8(config)
    unknown = set(config.training.recompute_modules) - set(RECOMPUTE_MODULES)
    if unknown:
        raise ConfigError(
            f"recompute_modules={', '.join(sorted(unknown))} is unknown; use core_attn, mlp and mlp_up "
            "(norms and activation functions are always recomputed)"
        )


def _check_fp8(config: Config) -> None:
    """Rules of FP8 products that need no machine."""
    training, implementation = config.training, config.model.transformer_impl
    if training.fp8_recipe == "delayed":
        raise ConfigError(
            "fp8_recipe=delayed scales by what earlier steps have seen, so that a product that is computed again gives other "
            "numbers, and a resumed run as well; use fp8_recipe=tensorwise"
        )
    if training.fp8_format is None:
        return
    if not training.bf16:
        raise ConfigError(
            f"fp8_format={training.fp8_format} is for training in bfloat16; set bf16 as well, or leave it out"
        )
    if implementation != "transformer_engine":
        raise ConfigError(
            f"fp8_format={training.fp8_format} is computed by Transformer Engine's linear layers, and "
            f"transformer_impl={implementation} may be others; set transformer_impl=transformer_engine, or leave fp8_format out"
        )
    if training.cpu_offloading_num_layers:
        raise ConfigError(
            f"cpu_offloading_num_layers={training.cpu_offloading_num_layers} would copy the FP8 weights that "
            f"fp8_format={training.fp8_format} keeps for the backward to host memory as well; leave one of them out"
        )


# Losses that label smoothing is defined for.
_SMOOTHED = ("sigmoid", "sigmoid_norm", "robust", "simpo")


def _check_objective(config: Config) -> None:
    """Rules of the loss and its reference."""
    loss, reference = config.objective, config.reference
    if loss.label_smoothing and loss.loss_type not in _SMOOTHED:
        raise ConfigError(
            f"label_smoothing={loss.label_smoothing} is defined for loss_type={', '.join(_SMOOTHED)}, not for {loss.loss_type}; "
            "set label_smoothing to 0 or another loss_type"
        )
    if loss.objective == "sft" and loss.rpo_alpha:
        raise ConfigError(
            f"rpo_alpha={loss.rpo_alpha} adds an NLL to a preference loss, which objective=sft has not; leave it out, and set "
            "nll_scope=response for the NLL of the answers"
        )
    if loss.objective == "solopo" and loss.loss_type not in ("simpo", "orpo"):
        raise ConfigError(
            f"objective=solopo compares the rewards of an answer on two contexts, and loss_type={loss.loss_type} would need a "
            "reference on both; use loss_type=simpo or orpo"
        )
    if loss.objective in ("dpo", "solopo") and loss.loss_type == "orpo" and not loss.rpo_alpha:
        raise ConfigError(
            f"loss_type=orpo is a term beside an NLL, which objective={loss.objective} has not; set rpo_alpha=1 (the paper's "
            "ORPO), or objective=longpo"
        )
    if loss.objective != "longpo" and config.data.turns == "independent":
        raise ConfigError(f"turns=independent is LongPO's Eq. 13; objective={loss.objective} takes turns=chained")
    if reference.reference == "cached" and reference.reference_model == "resident":
        raise ConfigError(
            "reference_model=resident keeps a second model for reference=online; with reference=cached no reference "
            "model is in memory: leave it out or set reference=online"
        )


def _check_optimizer(optimizer: OptimizerConfig) -> None:
    """Rules of the learning-rate schedule."""
    for name in ("min_lr", "lr_warmup_init"):
        value = getattr(optimizer, name)
        if not 0 <= value <= optimizer.lr:
            raise ConfigError(f"{name}={value} must be between 0 and lr={optimizer.lr}; lower it or raise lr")
    if optimizer.lr_warmup_fraction is not None and optimizer.lr_warmup_iters:
        raise ConfigError(
            f"lr_warmup_fraction={optimizer.lr_warmup_fraction} and lr_warmup_iters={optimizer.lr_warmup_iters} both set "
            "the warm-up; give one of them"
        )
    if optimizer.lr_decay_style == "WSD" and optimizer.lr_wsd_decay_iters is None:
        raise ConfigError("lr_decay_style=WSD needs lr_wsd_decay_iters; give the number of its last, decaying steps")


def _check_held_out(config: Config) -> None:
    """Options of held-out evaluation need held-out data."""
    if config.data.valid_data_path is not None:
        return
    for name, section in (
        *((name, config.training) for name in ("eval_interval", "eval_iters", "skip_train")),
        ("save_best", config.checkpoint),
    ):
        value = getattr(section, name)
        if value:
            raise ConfigError(
                f"{name}={value} concerns held-out data, but valid_data_path is not given; name the data's prefix with "
                "--valid-data-path"
            )


_STAGE_SIZES = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
_COUNTED = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")


def _check_parallel(parallel: ParallelConfig) -> None:
    """Rules between the degrees of parallelism."""
    if parallel.num_layers_per_virtual_pipeline_stage and parallel.virtual_pipeline_model_parallel_size:
        raise ConfigError(
            f"num_layers_per_virtual_pipeline_stage={parallel.num_layers_per_virtual_pipeline_stage} and "
            f"virtual_pipeline_model_parallel_size={parallel.virtual_pipeline_model_parallel_size} both set the virtual "
            "stages; give one of them"
        )
    interleaved = parallel.num_layers_per_virtual_pipeline_stage or parallel.virtual_pipeline_model_parallel_size
    if interleaved and parallel.pipeline_model_parallel_size == 1:
        raise ConfigError(
            "a virtual pipeline needs pipeline_model_parallel_size of at least 2, not 1; raise it, or leave out "
            "num_layers_per_virtual_pipeline_stage and virtual_pipeline_model_parallel_size"
        )
    sizes = {name: getattr(parallel, name) for name in _STAGE_SIZES if getattr(parallel, name) is not None}
    counted = {name: True for name in _COUNTED if getattr(parallel, name)}
    for name, value in {**sizes, **counted}.items():
        if parallel.pipeline_model_parallel_size == 1:
            raise ConfigError(
                f"{name}={value} divides layers among pipeline ranks, but pipeline_model_parallel_size=1; raise that or leave "
                f"{name} out"
            )
    if sizes and counted:
        raise ConfigError(
            f"{next(iter(sizes))}={next(iter(sizes.values()))} and {next(iter(counted))} both set the sizes of the first and "
            "last stages; give one of them"
        )
    if sizes and parallel.num_layers_per_virtual_pipeline_stage:
        raise ConfigError(
            f"num_layers_per_virtual_pipeline_stage={parallel.num_layers_per_virtual_pipeline_stage} is one number for all "
            f"stages, but {next(iter(sizes))}={next(iter(sizes.values()))} makes them unequal; give "
            "virtual_pipeline_model_parallel_size instead"
        )
    if parallel.overlap_param_gather and not (parallel.use_distributed_optimizer and parallel.overlap_grad_reduce):
        raise ConfigError(
            "overlap_param_gather gathers what the distributed optimizer has updated, in the buckets of overlap_grad_reduce; set "
            "use_distributed_optimizer and overlap_grad_reduce as well, or leave it out"
        )
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        raise ConfigError(
            "sequence_parallel shards across tensor-parallel ranks, but tensor_model_parallel_size=1; raise that or turn "
            "sequence_parallel off"
        )


# SIGKILL and SIGSTOP cannot be caught; the rest of the system's signals mean that something is broken.
EXIT_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU")


def _check_output(config: Config) -> None:
    """Rules of what a run reads and writes by URL, of what it keeps, and of when it stops."""
    checkpoint = config.checkpoint
    for option, url in (
        ("load", checkpoint.load),
        ("reference_load", config.reference.reference_load),
        ("upload_to", checkpoint.upload_to),
    ):
        if url is not None and (is_url(url) or option == "upload_to"):
            check_url(option, url)
    if checkpoint.save is not None and is_url(checkpoint.save):
        check_url("save", checkpoint.save)
        raise ConfigError(
            f"save={checkpoint.save} is a URL, but a run's metrics, lock and half-written checkpoints need a file system; use "
            f"--save FOLDER --upload-to {checkpoint.save}"
        )
    _check_retention(checkpoint)
    for name in config.checkpoint.exit_signal:
        if name not in EXIT_SIGNALS:
            raise ConfigError(
                f"exit_signal={name} is not a signal that a run can stop on; use {', '.join(EXIT_SIGNALS)}"
            )
    for name, is_on in (
        *(
            (name, getattr(config.checkpoint, name))
            for name in ("async_save", "save_best", "save_hf_interval", "upload_to")
        ),
        ("profile", config.logging.profile),
    ):
        if is_on and config.checkpoint.save is None:
            raise ConfigError(f"{name} is on but save is not given; name the output folder with --save")
    start, end = config.logging.profile_step_start, config.logging.profile_step_end
    if start >= end:
        raise ConfigError(
            f"profile_step_start={start} must be less than profile_step_end={end}; steps 11 and 12 are profiled with 10 and 12"
        )


def is_url(path: str | Path) -> bool:
    """Whether a path is a URL, such as ``s3://bucket/run``."""
    return "://" in str(path)


def check_url(name: str, url: str) -> None:
    """Check the form of a URL.

    Args:
        name: setting that it comes from.
        url: the URL.

    Raises:
        ConfigError: it is none, or might hold a secret; then it is not quoted.
    """
    scheme, separator, rest = url.partition("://")
    place = rest.partition("/")[0]
    if "@" in place or "?" in url or "#" in url:
        raise ConfigError(
            f"{name}: its URL has a '@' before the path, a '?' or a '#', which could be credentials; URLs are logged and stored, "
            "so give credentials as your store's package reads them, such as AWS_PROFILE or AWS_ACCESS_KEY_ID"
        )
    if not separator or not scheme or "::" in url or not (place or scheme == "file"):
        raise ConfigError(f"{name}={url} is no URL of a folder; write it as s3://BUCKET/RUN or file:///FOLDER")


def _check_retention(checkpoint: CheckpointConfig) -> None:
    retained, interval = checkpoint.save_retain_interval, checkpoint.save_interval
    if retained is None:
        return
    if interval is None:
        raise ConfigError(
            f"save_retain_interval={retained} keeps some of the checkpoints of save_interval, which is not given; set it too"
        )
    if retained % interval:
        raise ConfigError(
            f"save_retain_interval={retained} must be a multiple of save_interval={interval}, by which steps are saved; use "
            f"{max(1, round(retained / interval)) * interval}"
        )


# --------------------------------------------------------------------------------------------------
# Several data sets
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataSource:
    """One of the data sets that a run trains on.

    Attributes:
        prefix: path prefix of its binaries.
        weight: how often it is drawn, in proportion to the others; None: each of its samples once per epoch.
    """

    prefix: str
    weight: float | None = None


def data_sources(data_path: str | tuple[str, ...]) -> tuple[DataSource, ...]:
    """The data sets that ``data_path`` names: ``P``, ``0.7 A 0.3 B``, or ``A B``.

    Raises:
        ConfigError: weights and prefixes do not alternate, a weight is not positive, or a prefix comes twice.
    """
    words = (data_path,) if isinstance(data_path, str) else data_path
    if not words:
        raise ConfigError("data_path is empty; name the prefix of preprocessed data with --data-path PREFIX")
    numbers = [_number(word) for word in words] if len(words) > 1 else [None]
    given = f"data_path={' '.join(words)}"
    if all(number is None for number in numbers):
        sources = tuple(DataSource(word) for word in words)
    else:
        weights, prefixes = numbers[::2], numbers[1::2]
        if None in weights or any(n is not None for n in prefixes) or len(weights) != len(prefixes):
            raise ConfigError(
                f"{given}: weights and prefixes do not alternate; write 0.7 A 0.3 B, or A B without any weight"
            )
        sources = tuple(DataSource(p, w) for p, w in zip(words[1::2], weights, strict=True))
        for weight, source in zip(words[::2], sources, strict=True):
            if not 0 < (source.weight or 0) < math.inf:
                raise ConfigError(
                    f"{given}: the weight {weight} of {source.prefix} must be positive and finite; leave a data set out that "
                    "is not to be used"
                )
    for number, source in enumerate(sources):
        if source.prefix in [earlier.prefix for earlier in sources[:number]]:
            raise ConfigError(f"{given}: {source.prefix} comes twice; give it once, with the sum of the weights")
    return sources


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


# --------------------------------------------------------------------------------------------------
# What settings come to with a model and a number of processes
# --------------------------------------------------------------------------------------------------


def scaling_numbers(changes: RopeChanges) -> dict[str, Any]:
    """Numbers of a RoPE scaling by Hugging Face's names; None where not given."""
    return {
        "factor": changes.rotary_scaling_factor,
        "original_max_position_embeddings": changes.original_max_position_embeddings,
        "attention_factor": changes.attention_factor,
        "beta_fast": changes.beta_fast,
        "beta_slow": changes.beta_slow,
        "low_freq_factor": changes.low_freq_factor,
        "high_freq_factor": changes.high_freq_factor,
    }


def virtual_pipeline_size(config: ParallelConfig, num_layers: int) -> int | None:
    """Virtual stages per pipeline rank; None without interleaving.

    Raises:
        ConfigError: the layers cannot be divided so.
    """
    virtual = len(pipeline_split(config, num_layers)[0])
    return virtual if virtual > 1 else None


def pipeline_split(config: ParallelConfig, num_layers: int) -> tuple[tuple[int, ...], ...]:
    """Number of layers of each virtual stage of each pipeline rank: ``split[rank][virtual stage]``.

    The model's layers run through all ranks' first virtual stages, then through all ranks' second ones, and so on.

    Raises:
        ConfigError: the layers cannot be divided so.
    """
    units = _units_per_rank(config, num_layers)
    virtual = _virtual_stages(config, units)
    split = [[n // virtual] * virtual for n in units]
    # The embedding and the loss took the place of a layer.
    split[0][0] -= config.account_for_embedding_in_pipeline_split
    split[-1][-1] -= config.account_for_loss_in_pipeline_split
    return tuple(map(tuple, split))


def _units_per_rank(config: ParallelConfig, num_layers: int) -> list[int]:
    """Layers per pipeline rank, those that stand for the embedding and the loss included."""
    stages = config.pipeline_model_parallel_size
    first, last = config.decoder_first_pipeline_num_layers, config.decoder_last_pipeline_num_layers
    if first is None and last is None:
        counted = [name for name in _COUNTED if getattr(config, name)]
        units = num_layers + len(counted)
        if units % stages:
            what = f"the {num_layers} layers" + (
                f" and {len(counted)} more for {', '.join(counted)}" if counted else ""
            )
            raise ConfigError(
                f"pipeline_model_parallel_size={stages} does not divide {what}; use one of {_divisors(units)}, or give the first "
                "or last stage another size with decoder_first_pipeline_num_layers or decoder_last_pipeline_num_layers"
            )
        return [units // stages] * stages
    between, left = stages - (first is not None) - (last is not None), num_layers - (first or 0) - (last or 0)
    given = ", ".join(f"{name}={getattr(config, name)}" for name in _STAGE_SIZES if getattr(config, name) is not None)
    if left < between or (left % between if between else left):
        others = f"{between} other pipeline ranks" if between else "no other pipeline rank"
        raise ConfigError(
            f"{given} leaves {left} of the {num_layers} layers for {others}; choose a size that leaves each of them the same "
            "number of layers, at least one"
        )
    each = left // between if between else 0
    return [*([first] if first is not None else []), *[each] * between, *([last] if last is not None else [])]


def _virtual_stages(config: ParallelConfig, units: list[int]) -> int:
    """Virtual stages per pipeline rank, at least 1."""
    per_stage, virtual = config.num_layers_per_virtual_pipeline_stage, config.virtual_pipeline_model_parallel_size
    for n in units:
        if per_stage and n % per_stage:
            raise ConfigError(
                f"num_layers_per_virtual_pipeline_stage={per_stage} does not divide the {n} layers of a pipeline rank; use one "
                f"of {_divisors(n)}"
            )
        if virtual and n % virtual:
            raise ConfigError(
                f"virtual_pipeline_model_parallel_size={virtual} does not divide the {n} layers of a pipeline rank; use one of "
                f"{_divisors(math.gcd(*units))}"
            )
    return units[0] // per_stage if per_stage else virtual or 1


def data_parallel_size(config: Config, world_size: int) -> int:
    """Data-parallel size: what the other degrees leave of the world.

    Raises:
        ConfigError: they do not divide the world, or the batch cannot be divided evenly.
    """
    parallel, training = config.parallel, config.training
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    context = parallel.context_parallel_size
    ranks = tensor * pipeline * context
    if world_size % ranks:
        raise ConfigError(
            f"tensor {tensor} x pipeline {pipeline} x context {context} = {ranks} parallel ranks do not divide the world of "
            f"{world_size} processes; launch a multiple of {ranks}"
        )
    data = world_size // ranks
    if training.global_batch_size % (training.micro_batch_size * data):
        raise ConfigError(
            f"global_batch_size={training.global_batch_size} is not a multiple of "
            f"micro_batch_size={training.micro_batch_size} x data-parallel size {data}; use a multiple of "
            f"{training.micro_batch_size * data}"
        )
    return data


def check_against_model(
    config: Config, *, world_size: int, num_layers: int, attention_heads: int, key_value_heads: int
) -> None:
    """Check that the degrees of parallelism fit the model.

    Raises:
        ConfigError: the first that does not.
    """
    data = data_parallel_size(config, world_size)
    parallel, training = config.parallel, config.training
    tensor = parallel.tensor_model_parallel_size
    usable = [n for n in range(1, attention_heads + 1) if attention_heads % n == 0 and key_value_heads % n == 0]
    if tensor not in usable:
        raise ConfigError(
            f"tensor_model_parallel_size={tensor} does not divide {attention_heads} attention heads and {key_value_heads} "
            f"key-value heads; use one of {', '.join(map(str, usable))}"
        )
    virtual = virtual_pipeline_size(parallel, num_layers)
    micro_batches = training.global_batch_size // (training.micro_batch_size * data)
    if virtual and micro_batches % parallel.pipeline_model_parallel_size:
        raise ConfigError(
            f"an interleaved pipeline needs its {micro_batches} micro batches per step to be a multiple of "
            f"pipeline_model_parallel_size={parallel.pipeline_model_parallel_size}; change global_batch_size"
        )
    largest = max(n for rank in pipeline_split(parallel, num_layers) for n in rank)
    if training.cpu_offloading_num_layers and training.cpu_offloading_num_layers >= largest:
        raise ConfigError(
            f"cpu_offloading_num_layers={training.cpu_offloading_num_layers} must be less than the {largest} layers of a stage, "
            "since the last one is needed at once; lower it"
        )
    if training.recompute_granularity == "full" and training.recompute_method == "uniform":
        stages = [n for rank in pipeline_split(parallel, num_layers) for n in rank]
        for per_stage in stages:
            if per_stage % training.recompute_num_layers:
                raise ConfigError(
                    f"recompute_num_layers={training.recompute_num_layers} does not divide the {per_stage} layers of a stage; "
                    f"use one of {_divisors(math.gcd(*stages))}"
                )


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


def check_part(rank: int | None, world_size: int | None) -> None:
    """Check which part of how many is asked for.

    Raises:
        ConfigError: one is given without the other, or there is no such part.
    """
    if rank is None and world_size is None:
        return
    if rank is None or world_size is None:
        raise ConfigError(f"rank={rank} and world_size={world_size} belong together; give both or neither")
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank={rank} must be from 0 to world_size - 1 = {world_size - 1}; number the parts from 0")
