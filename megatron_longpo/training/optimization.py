"""Optimizer and learning-rate schedule: those of megatron-core, and RMSProp, which the released LongPO script uses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_longpo.config import Config
from megatron_longpo.errors import ConfigError
from megatron_longpo.model.gpt import PolicyModel
from megatron_longpo.model.layers import fuse_weight_gradients
from megatron_longpo.runtime import platform, products


def wrap_for_training(chunks: list[PolicyModel], config: Config) -> list[DistributedDataParallel]:
    """Wrap model chunks in Megatron's DDP, which sums gradients over the data- and context-parallel ranks.

    The sums are in fp32 unless grad_reduce_in_bf16.
    """
    parallel = config.parallel
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=not parallel.grad_reduce_in_bf16,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        # The trainer checks loss and gradient norm itself, and its error names a fix.
        check_for_nan_in_grad=False,
    )
    wrapped = [
        DistributedDataParallel(
            config=chunk.config,
            ddp_config=ddp_config,
            module=chunk,
            # Interleaved chunks are reduced one by one; only the first may be cut into buckets.
            disable_bucketing=index > 0 or not parallel.overlap_grad_reduce,
        )
        for index, chunk in enumerate(chunks)
    ]
    if fuses_weight_gradients(config):
        for chunk in chunks:
            fuse_weight_gradients(chunk)
    if parallel.overlap_param_gather:
        for chunk, model in zip(chunks, wrapped, strict=True):
            chunk.before_weight = _waiting(model)
    return wrapped


def fuses_weight_gradients(config: Config, device: torch.device | None = None) -> bool:
    """Whether gradients of megatron-core's linear layers are added to their sums inside the product: 16-bit weights with fp32
    sums, where the device has such a product.

    Args:
        config: configuration of the run.
        device: device of the run. Default: this process's.
    """
    wanted = config.parallel.gradient_accumulation_fusion and not config.parallel.grad_reduce_in_bf16
    return wanted and config.training.bf16 and products.are_fused(device or platform.CURRENT.device)


def weight_gradients(config: Config, *, is_transformer_engine: bool) -> str:
    """How gradients of linear layers' weights get into their fp32 sums where the device could add them inside the product, for
    the log.

    Args:
        config: configuration of the run.
        is_transformer_engine: whether the layers are Transformer Engine's.
    """
    if not fuses_weight_gradients(config):
        return ""
    if is_transformer_engine:
        return (
            "; gradients of weights are rounded to bfloat16 in each micro batch, since gradient_accumulation_fusion is of "
            "megatron-core's layers only (transformer_impl=local)"
        )
    return "; gradients of weights are added inside their products"


def _waiting(model: DistributedDataParallel) -> Callable[[torch.nn.Parameter], None]:
    """A function that waits until a weight has been gathered."""
    return lambda parameter: model.param_to_bucket_group[parameter].finish_param_sync()


def gather_weights(model: Sequence[DistributedDataParallel]) -> None:
    """Gather weights of the last step that overlap_param_gather would gather in the next forward; collective.

    Needed wherever weights are read other than by the training forward.
    """
    for chunk in model:
        if not chunk.ddp_config.overlap_param_gather:
            continue
        for group in chunk.bucket_groups:
            if not group.param_gather_dispatched or group.param_gather_handle is not None:
                group.start_param_sync(force_sync=True)


class Optimizer(ChainedOptimizer):
    """megatron-core's optimizer, which leaves out an update by a gradient that is not finite.

    It looks between the norm, which clipping needs anyway, and the update. megatron-core itself does so only with loss scaling
    (fp16).

    Attributes:
        has_replicas: whether each data-parallel replica computes the norm by itself. One whose memory or arithmetic fails may
            then be the only one to see NaN, and all must leave the update out alike.
    """

    has_replicas = False

    def get_grad_norm(self) -> float:
        norm = float(super().get_grad_norm())
        if self.has_replicas:
            flag = torch.tensor([not math.isfinite(norm)], dtype=torch.int32, device=platform.CURRENT.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            norm = math.nan if flag.item() and math.isfinite(norm) else norm
        self._norm = norm
        return norm

    def step_with_ready_grads(self) -> bool:
        return math.isfinite(self._norm) and bool(super().step_with_ready_grads())


def build_optimizer(config: Config, model: list[DistributedDataParallel]) -> Optimizer:
    """Build megatron-core's optimizer over the model chunks."""
    optimizer_config = config.optimizer
    settings = MegatronOptimizerConfig(
        optimizer="adam",
        lr=optimizer_config.lr,
        min_lr=optimizer_config.min_lr,
        weight_decay=optimizer_config.weight_decay,
        adam_beta1=optimizer_config.adam_beta1,
        adam_beta2=optimizer_config.adam_beta2,
        adam_eps=optimizer_config.rmsprop_eps if optimizer_config.optimizer == "rmsprop" else optimizer_config.adam_eps,
        bf16=config.training.bf16,
        params_dtype=torch.bfloat16 if config.training.bf16 else torch.float32,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        clip_grad=optimizer_config.clip_grad,
    )
    if optimizer_config.optimizer_cpu_offload:
        _offload(settings, config)
    # A shard of an fp32 weight is a view of it, which an optimizer takes only if no gradient flows through it.
    with torch.set_grad_enabled(not optimizer_config.optimizer_cpu_offload):
        optimizer = get_megatron_optimizer(settings, model, use_gloo_process_groups=False)
    if optimizer_config.optimizer == "rmsprop":
        for inner in inner_optimizers(optimizer):
            for part in device_optimizers(inner):
                _become_rmsprop(part, optimizer_config.rmsprop_alpha)
    found = Optimizer(wrappers_of(optimizer))
    replicas = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    found.has_replicas = replicas > 1 and not config.parallel.use_distributed_optimizer
    return found


def _offload(settings: MegatronOptimizerConfig, config: Config) -> None:
    """Set megatron-core's options for optimizer states in host memory."""
    optimizer = config.optimizer
    settings.optimizer_cpu_offload = True
    settings.optimizer_offload_fraction = optimizer.optimizer_offload_fraction
    settings.overlap_cpu_optimizer_d2h_h2d = optimizer.overlap_cpu_optimizer_d2h_h2d
    settings.pin_cpu_grads = settings.pin_cpu_params = platform.CURRENT.is_cuda
    # Without it the distributed optimizer keeps fp32 weights on the device as well. Given to the constructor it asks for the
    # version of Transformer Engine, of which nothing is needed here.
    settings.use_precision_aware_optimizer = settings.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
    settings.store_param_remainders = False


def wrappers_of(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """megatron-core's wrappers around torch optimizers; one, as long as all parameters are trained alike."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def inner_optimizers(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    """The torch optimizers inside megatron-core's wrappers."""
    return [w.optimizer for w in wrappers_of(optimizer) if getattr(w, "optimizer", None) is not None]


def device_optimizers(inner: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """The optimizers that take the steps: with states in host memory, those of the host and of the device."""
    return list(inner.sub_optimizers) if isinstance(inner, HybridDeviceOptimizer) else [inner]


class _RMSPropStep:
    """RMSProp's update, as a class to put before Adam's: megatron-core's distributed optimizer builds only Adam.

    Its running mean of squares is ``exp_avg_sq``; it has no ``exp_avg``. The update is that of torch.optim.RMSprop, without
    momentum and not centred.
    """

    rmsprop_alpha: float
    # torch's Adam counts steps per parameter, those of Transformer Engine and Apex per group.
    counts_in_state: bool
    param_groups: list[dict[str, Any]]
    state: Any

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, **_: Any) -> None:
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                grad = p.grad if p.grad is not None else getattr(p, "decoupled_grad", None)
                if grad is None:
                    continue
                state = self.state[p]
                if "exp_avg_sq" not in state:
                    state["exp_avg_sq"] = torch.zeros_like(p)
                if self.counts_in_state:
                    state.setdefault("step", torch.zeros((), dtype=torch.float32))
                    state["step"] += 1
                if group["weight_decay"]:
                    grad = grad.add(p, alpha=group["weight_decay"])
                mean = state["exp_avg_sq"]
                mean.mul_(self.rmsprop_alpha).addcmul_(grad, grad, value=1 - self.rmsprop_alpha)
                p.addcdiv_(grad, mean.sqrt().add_(group["eps"]), value=-group["lr"])
            if not self.counts_in_state:
                group["step"] = group.get("step", 0) + 1


def _become_rmsprop(optimizer: torch.optim.Optimizer, alpha: float) -> None:
    attributes = {"rmsprop_alpha": alpha, "counts_in_state": counts_in_state(optimizer)}
    optimizer.__class__ = type("RMSProp", (_RMSPropStep, type(optimizer)), attributes)
    # torch runs the hooks of a step only for a class that it has wrapped.
    optimizer._patch_step_function()  # type: ignore[no-untyped-call]


def state_names(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Names of the states that are as large as the parameters."""
    (optimizer, *_) = device_optimizers(optimizer)
    return ("exp_avg_sq",) if hasattr(optimizer, "rmsprop_alpha") else ("exp_avg", "exp_avg_sq")


def make_states(optimizer: torch.optim.Optimizer) -> None:
    """Create the states as they are before the first step: loading needs tensors to load into."""
    for part in device_optimizers(optimizer):
        for group in part.param_groups:
            for parameter in group["params"]:
                state = part.state[parameter]
                for name in state_names(part):
                    if name not in state:
                        state[name] = torch.zeros_like(parameter)
                if counts_in_state(part) and "step" not in state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
    if isinstance(optimizer, HybridDeviceOptimizer):
        optimizer._sync_sub_optimizers_state_to_hdo()


def set_steps(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Give each parameter its own count of updates.

    After a load by megatron-core (0.16.1, 0.19.2) all parameters share one tensor, which the update of each of them
    increments: the bias correction runs ahead, and training drifts silently.
    """
    for part in device_optimizers(optimizer):
        for group in part.param_groups:
            if isinstance(optimizer, HybridDeviceOptimizer) and not counts_in_state(part):
                group["step"] = step
            for parameter in group["params"]:
                state = part.state.get(parameter, {})
                if "step" in state:
                    state["step"] = torch.tensor(float(step), dtype=torch.float32)


def counts_in_state(optimizer: torch.optim.Optimizer) -> bool:
    """Whether this Adam counts steps per parameter (torch) or per group (Transformer Engine, Apex)."""
    return isinstance(optimizer, torch.optim.Adam)


def warmup_iters(config: Config, train_iters: int) -> int:
    """Number of warm-up steps."""
    optimizer = config.optimizer
    if optimizer.lr_warmup_fraction is not None:
        return math.ceil(optimizer.lr_warmup_fraction * (optimizer.lr_decay_iters or train_iters))
    return optimizer.lr_warmup_iters


def follow_config(optimizer: MegatronOptimizer, config: Config) -> None:
    """Set the hyperparameters of this run in loaded parameter groups, which have those that the checkpoint was saved with."""
    optimizer_config = config.optimizer
    for inner in inner_optimizers(optimizer):
        for group in inner.param_groups:
            group["max_lr"], group["min_lr"] = optimizer_config.lr, optimizer_config.min_lr
            if "step" in group:
                # torch's Adam counts in floats, and a checkpoint has its count; Transformer Engine's kernel takes an integer.
                group["step"] = int(group["step"])
            group["betas"] = (optimizer_config.adam_beta1, optimizer_config.adam_beta2)
            group["eps"] = (
                optimizer_config.rmsprop_eps if optimizer_config.optimizer == "rmsprop" else optimizer_config.adam_eps
            )


def check_schedule(config: Config, train_iters: int) -> None:
    """Check that warm-up and decay fit the run.

    Args:
        config: configuration of the run.
        train_iters: steps of the whole run.

    Raises:
        ConfigError: the warm-up or a WSD decay is longer than the schedule.
    """
    optimizer = config.optimizer
    decay = optimizer.lr_decay_iters or train_iters
    warmup = warmup_iters(config, train_iters)
    if warmup > decay:
        raise ConfigError(
            f"a warm-up of {warmup} steps must not be longer than the schedule of lr_decay_iters={decay} steps; shorten it, or "
            "train longer"
        )
    if optimizer.lr_wsd_decay_iters is not None and optimizer.lr_wsd_decay_iters > decay:
        raise ConfigError(
            f"lr_wsd_decay_iters={optimizer.lr_wsd_decay_iters} must be at most lr_decay_iters={decay}; lower it"
        )


def idle_line(config: Config, train_iters: int) -> str | None:
    """What the log says of steps that train at the rate 0 because the decay ends before the run; None: there are none."""
    optimizer = config.optimizer
    decay = optimizer.lr_decay_iters or train_iters
    if optimizer.lr_decay_style == "constant" or optimizer.min_lr > 0 or decay >= train_iters:
        return None
    return (
        f"learning rate: 0 from step {decay + 1} on (lr_decay_iters={decay}, min_lr=0), so {train_iters - decay} of "
        f"{train_iters} steps change nothing; raise lr_decay_iters or min_lr"
    )


class Schedule(OptimizerParamScheduler):
    """megatron-core's schedule, whose warm-up begins with a step that trains: step k of w has k/w of the peak rate.

    megatron-core gives step k the rate of k - 1 steps done, and so the first step the rate 0. The same formula with one warm-up
    step less, from 1/w of the peak, gives k/w. Runs that began by its rule, before 0.2.0, keep it.

    Args:
        optimizer: megatron-core's optimizer.
        warmup: steps of the warm-up.
        init_lr: learning rate that the warm-up starts above.
        max_lr: peak learning rate.
        settings: megatron-core's other arguments.
    """

    def __init__(
        self, optimizer: MegatronOptimizer, *, warmup: int, init_lr: float, max_lr: float, **settings: Any
    ) -> None:
        self._warmup, self._init_lr = warmup, init_lr
        self._begins_at_zero = False
        first = init_lr + (max_lr - init_lr) / warmup if warmup else init_lr
        super().__init__(optimizer, init_lr=first, max_lr=max_lr, lr_warmup_steps=max(0, warmup - 1), **settings)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "begins_at_zero": self._begins_at_zero}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # A checkpoint of an earlier commit does not say.
        self._begins_at_zero = bool(state_dict.get("begins_at_zero", True))
        if self._begins_at_zero:
            self.lr_warmup_steps, self.init_lr = self._warmup, self._init_lr
        super().load_state_dict(state_dict)


def build_scheduler(config: Config, optimizer: MegatronOptimizer, train_iters: int) -> Schedule:
    """Build the learning-rate schedule, which counts in steps.

    Raises:
        ConfigError: the warm-up or a WSD decay is longer than the schedule.
    """
    check_schedule(config, train_iters)
    optimizer_config = config.optimizer
    decay = optimizer_config.lr_decay_iters or train_iters
    return Schedule(
        optimizer,
        warmup=warmup_iters(config, train_iters),
        init_lr=optimizer_config.lr_warmup_init,
        max_lr=optimizer_config.lr,
        min_lr=optimizer_config.min_lr,
        lr_decay_steps=decay,
        lr_decay_style=optimizer_config.lr_decay_style,
        start_wd=optimizer_config.weight_decay,
        end_wd=optimizer_config.weight_decay,
        wd_incr_steps=train_iters,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=optimizer_config.lr_wsd_decay_iters,
        lr_wsd_decay_style=optimizer_config.lr_wsd_decay_style,
    )
