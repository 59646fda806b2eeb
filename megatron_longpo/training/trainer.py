"""A training run: everything set up once, then one step after another.

The step reads like its description: take the batch, know its reference, forward and backward, update, report. How the
gradient gets its scale is derived in docs/loss.md.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_longpo.checkpoint.card import training_record
from megatron_longpo.checkpoint.folders import ASSETS, folder_of, latest_step, read_progress
from megatron_longpo.config import Config
from megatron_longpo.data.indexed import PreferenceData
from megatron_longpo.data.preference import Mode, Sample
from megatron_longpo.data.sampler import BatchSampler, assign_batch
from megatron_longpo.errors import LongPOError
from megatron_longpo.model.gpt import PolicyModel, build_model
from megatron_longpo.model.rotary import rotary_of
from megatron_longpo.model.shape import ModelShape
from megatron_longpo.runtime import platform, process_groups
from megatron_longpo.runtime.collectives import on_rank0
from megatron_longpo.runtime.files import write_atomically
from megatron_longpo.runtime.log import log
from megatron_longpo.runtime.process_groups import Parallel
from megatron_longpo.training import held_out, memory
from megatron_longpo.training.batch import MicroBatch, batch_loss, known_nll_grad, policy_batch, policy_layout
from megatron_longpo.training.checkpointer import Checkpointer, check_same_run, load_weights
from megatron_longpo.training.metrics import Reporter, gather_samples, reduce_samples, validation_line
from megatron_longpo.training.optimization import build_optimizer, build_scheduler, wrap_for_training
from megatron_longpo.training.plan import RunPlan, groups_of, make_plan
from megatron_longpo.training.reference import cache_for, fill, row_cost, scope_of, score, weights_fingerprint


class DataSet:
    """Samples with what the step needs of them.

    Args:
        prefix: of the binaries.
        verify: check their checksums, on the first rank.
        shape: of the model, for the costs.

    Raises:
        DataError: damaged, or not there.
    """

    def __init__(self, prefix: str, *, verify: bool, shape: ModelShape) -> None:
        on_rank0(lambda: PreferenceData(prefix, verify=verify) and None)
        self.samples = PreferenceData(prefix, verify=False)
        self.costs = [row_cost(int(n), shape) for n in self.samples.long_lengths()]


class Trainer:
    """One run.

    Args:
        plan: what ``make_plan`` found good.
        parallel: groups of this process.
    """

    def __init__(self, plan: RunPlan, parallel: Parallel) -> None:
        self.began = time.monotonic()
        self.plan, self.parallel = plan, parallel
        self.config = config = plan.config
        self.active = parallel.rank == 0
        self.output = Path(config.checkpoint.save) if config.checkpoint.save else None
        assert config.data.data_path is not None
        verify = config.data.verify_data
        self.data_set = DataSet(config.data.data_path, verify=verify, shape=plan.shape)
        self.data = self.data_set.samples
        valid = config.data.valid_data_path
        self.valid_set = None if valid is None else DataSet(valid, verify=verify, shape=plan.shape)
        self.sampler = BatchSampler(
            len(self.data),
            config.training.global_batch_size,
            shuffle=config.data.shuffle,
            seed=config.training.seed,
        )
        self.rotary = rotary_of(plan.policy_shape, plan.policy_shape.rotary_base)

        reference_weights, resumed = self._sync_start_state()
        self._log_model()
        self.config = config = self._with_recompute()
        self.chunks = build_model(plan.shape, config, parallel)
        references = self._make_reference(reference_weights)
        self.reference, self.valid_reference = references[0], references[-1]
        if resumed is None:
            load_weights(plan.load, self.chunks, parallel)
        if config.training.skip_train:
            self.model = list(self.chunks)
            return
        self.model = wrap_for_training(self.chunks, config)
        self.optimizer = build_optimizer(config, self.model)
        self.scheduler = build_scheduler(config, self.optimizer, plan.train_iters)
        self._configure_schedule()
        self.checkpointer = (
            Checkpointer(self.output, config, plan.policy_shape, plan.load / ASSETS, parallel, self.identity)
            if self.output
            else None
        )
        self.step = 0
        if resumed is not None:
            assert self.output is not None and self.checkpointer is not None
            folder = folder_of(self.output, resumed)
            self.step = self.checkpointer.resume(folder, self.chunks, self.optimizer, self.scheduler).step
            self._log(f"resumed from {folder} after step {self.step}")
        self.reporter = Reporter(
            self.output,
            train_iters=plan.train_iters,
            resumed_step=self.step,
            config=config.logging,
            run_config=config.as_dict(),
            active=self.active,
        )
        if self.output is not None and self.active:
            (self.output / "run.yaml").write_text(config.as_yaml(), encoding="utf-8")

    # ---------------------------------------------------------------------------------- set-up

    def _sync_start_state(self) -> tuple[str, int | None]:
        """What the first rank finds on disk, for all: name of the reference's weights, step to resume from.

        Raises:
            CheckpointError: the run in the output folder was made with other settings.
        """
        plan = self.plan

        def look() -> tuple[str, int | None]:
            needs_reference = scope_of(self.config.objective.objective) != "none"
            resumable = None if self.config.training.skip_train else self.output
            return (
                weights_fingerprint(plan.reference_load, plan.reference_shape) if needs_reference else "",
                latest_step(resumable) if resumable else None,
            )

        weights, resumed = on_rank0(look)
        c = self.config
        self.identity = {
            "reference_weights": weights,
            "data_sha256": self.data.manifest.bin_sha256,
            "turns": c.data.turns,
            "shuffle": c.data.shuffle,
            "seed": c.training.seed,
            "global_batch_size": c.training.global_batch_size,
            "bf16": c.training.bf16,
            "optimizer": c.optimizer.optimizer,
            "use_distributed_optimizer": c.parallel.use_distributed_optimizer,
            "rotary_base": plan.policy_shape.rotary_base,
            "rope_scaling": plan.policy_shape.rope_scaling,
            **{
                f: getattr(c.objective, f) for f in ("objective", "beta", "preference_weight", "nll_scope", "loss_type")
            },
        }
        if resumed is not None:
            assert self.output is not None
            folder = folder_of(self.output, resumed)
            on_rank0(lambda: check_same_run(read_progress(folder), self.identity, folder))
        return weights, resumed

    def _log(self, message: str) -> None:
        log(message, active=self.active)

    def _log_model(self) -> None:
        s, d = self.plan.shape, self.plan.manifest
        self._log(
            f"platform: {platform.CURRENT.name} with {platform.CURRENT.backend} ({platform.CURRENT.reason}); "
            f"layout: {self.parallel.describe()} over {self.parallel.world_size} process(es)"
        )
        if self.parallel.context_size > 1:
            self._log(f"context parallelism: cp_comm_type={self.plan.comm_type} ({self.plan.comm_reason})")
        self._log(
            f"model: {s.family}, {s.num_layers} layers, hidden {s.hidden_size}, vocabulary {s.vocab_size}, rotary base "
            f"{self.plan.policy_shape.rotary_base:g} (reference {self._reference_base():g})"
        )
        self._log(
            f"data: {d.samples} samples, {d.turns} turns, {d.tokens:,} tokens, longest row {d.longest}; "
            f"{self.plan.train_iters} steps of {self.config.training.global_batch_size} samples"
        )

    def _with_recompute(self) -> Config:
        """The configuration with ``recompute_granularity=auto`` decided: the same on all ranks, whose exchanges must
        agree."""
        config, parallel = self.config, self.parallel
        if config.training.skip_train and config.training.recompute_granularity == "auto":
            # Nothing is kept for a backward.
            return dataclasses.replace(
                config, training=dataclasses.replace(config.training, recompute_granularity="none")
            )
        if config.training.recompute_granularity != "auto":
            return config
        t = config.training
        # The costliest samples; chained rows stand for independent ones, which are laid out to be measured.
        costliest = np.argsort(self.data_set.costs)[::-1][: max(4, t.micro_batch_size)]
        layouts = [policy_layout([self.data[int(i)]], data=config.data, objective=config.objective) for i in costliest]
        longest = sorted(layouts, key=lambda x: x.length)[-t.micro_batch_size :]
        found = memory.choices(
            self.plan.shape,
            config,
            parallel,
            tokens=sum(x.length for x in longest),
            pairs=sum(x.attention_pairs for x in longest),
            microbatches=t.global_batch_size // (parallel.data_size * t.micro_batch_size),
            stage=parallel.pipeline_rank,
        )
        on_this_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        available = platform.CURRENT.available_memory_bytes() // (1 if platform.CURRENT.is_cuda else on_this_node)
        room = torch.tensor([memory.room(c, available) for c in found], dtype=torch.float64)
        # Stages differ, and processes of a node have not allocated alike when they look: the tightest counts.
        room = room.to(platform.CURRENT.device)
        dist.all_reduce(room, op=dist.ReduceOp.MIN)
        choice = memory.choose(found, room.tolist())
        need, have = choice.bytes_needed / 2**30, available / 2**30
        self._log(
            f"recompute: {choice} (estimate {need:.1f} GB a process of {have:.1f} GB available, longest micro batch "
            f"{sum(x.length for x in longest)} tokens, {choice.extra:.0%} more operations)"
        )
        if need > have:
            self._log(
                "recompute: even so the estimate does not fit; raise context_parallel_size or "
                "tensor_model_parallel_size, set use_distributed_optimizer, or preprocess with a smaller --seq-length"
            )
        return dataclasses.replace(config, training=choice.applied_to(t))

    def _reference_base(self) -> float:
        return self.config.reference.reference_rotary_base or self.plan.reference_shape.rotary_base

    def _make_reference(self, weights: str) -> list[Callable[[list[int]], np.ndarray | None]]:
        """For the data and, if any, the held-out ones a function from sample numbers to their [samples, 2] reference
        log-probs (None: the objective has none)."""
        config, plan = self.config, self.plan
        sets = [self.data] if self.valid_set is None else [self.data, self.valid_set.samples]
        if config.training.skip_train:
            sets = sets[-1:]
        scope = scope_of(config.objective.objective)
        if scope == "none":
            return [lambda _: None] * len(sets)
        rotary = rotary_of(plan.reference_shape, self._reference_base())

        def score_with(model: Sequence[PolicyModel]) -> Callable[[list[Sample]], np.ndarray]:
            return lambda samples: score(
                samples,
                scope=scope,
                model=model,
                rotary=rotary,
                shape=plan.shape,
                parallel=self.parallel,
                max_tokens=config.reference.reference_max_tokens,
                prefix_sharing=config.data.prefix_sharing,
            )

        if config.reference.reference == "cached":
            tables = [self._cached_reference(data, score_with(self.chunks), weights) for data in sets]
            return [table.__getitem__ for table in tables]
        if config.reference.reference_model == "resident":
            self._log("reference: online, a second model in memory")
            second = build_model(plan.reference_shape, config, self.parallel)
            load_weights(plan.reference_load, second, self.parallel)
            resident = score_with(second)

            def score_resident(data: PreferenceData, numbers: list[int]) -> np.ndarray:
                return resident([data[i] for i in numbers])

            return [partial(score_resident, data) for data in sets]
        self._log("reference: online, its weights wait in host memory")
        load_weights(plan.reference_load, self.chunks, self.parallel)
        frozen = [[p.detach().to("cpu", copy=True) for p in chunk.parameters()] for chunk in self.chunks]
        swapped = score_with(self.chunks)

        def score_swapped(data: PreferenceData, numbers: list[int]) -> np.ndarray:
            with swapped_weights(self.chunks, frozen):
                return swapped([data[i] for i in numbers])

        return [partial(score_swapped, data) for data in sets]

    def _cached_reference(
        self, data: PreferenceData, score_samples: Callable[[list[Sample]], np.ndarray], weights: str
    ) -> np.ndarray:
        plan = self.plan
        cache = cache_for(self.config, data, weights, self._reference_base(), plan.reference_shape)
        if not on_rank0(lambda: cache.read() is not None):
            self._log(f"reference: scoring {len(data)} samples once, into {cache.path}")
            load_weights(plan.reference_load, self.chunks, self.parallel)
            return fill(cache, data, score_samples, parallel=self.parallel, log=self._log)
        self._log(f"reference: log-probs of {len(data)} samples found in {cache.path}")
        holder = torch.zeros(len(data), 2, dtype=torch.float64)
        if self.active:
            table = cache.read()
            assert table is not None
            holder = torch.from_numpy(table)
        # Ranks on other nodes need not see the first one's disk.
        holder = holder.to(platform.CURRENT.device)
        dist.broadcast(holder, src=0)
        return holder.cpu().numpy()

    def _configure_schedule(self) -> None:
        """megatron-core's schedules take these from the model's configuration."""
        p = self.config.parallel
        megatron = self.chunks[0].config
        megatron.grad_scale_func = self.optimizer.scale_loss
        megatron.finalize_model_grads_func = finalize_model_grads
        several = len(self.model) > 1
        if p.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in self.model]
            megatron.no_sync_func = no_sync if several else no_sync[0]
            if several:
                megatron.grad_sync_func = [chunk.start_grad_sync for chunk in self.model]

    # ---------------------------------------------------------------------------------- the step

    def train(self) -> None:
        """Run to the last step, saving and evaluating on the way."""
        if self.step == 0 and self.valid_set is not None:
            self._report_validation()
        while self.step < self.plan.train_iters:
            record = self.train_step()
            self.step += 1
            self.reporter.step(record)
            if self._time_to_evaluate():
                self._report_validation()
            if self.checkpointer is not None:
                self.checkpointer.poll()
            stop = self._time_to_stop()
            if self._time_to_save() or stop:
                self._save()
            if stop:
                self._log(f"stopped after step {self.step} as asked; the same command goes on")
                break
            interval = self.config.training.manual_gc_interval
            if interval and self.step % interval == 0:
                gc.collect()
        self._save()
        if self.checkpointer is not None:
            self.checkpointer.finish()
        self.reporter.close()

    def train_step(self) -> dict[str, Any]:
        """One optimizer step. Returns what metrics.jsonl records of it."""
        clock = time.monotonic()
        numbers = self.sampler.batch(self.step)
        reference = self.reference(numbers)

        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        sample_metrics = self.forward_backward(numbers, reference)
        means = reduce_samples(sample_metrics, len(numbers), self.parallel, has_metrics=self.parallel.is_last_stage)
        self._check_finite("loss", means["loss"], numbers)
        _, grad_norm, _ = self.optimizer.step()
        self._check_finite("gradient norm", float(grad_norm or 0.0), numbers)
        lr = self.optimizer.param_groups[0]["lr"]
        self.scheduler.step(increment=1)

        platform.CURRENT.synchronize()
        seconds = time.monotonic() - clock
        tokens = int(means.pop("tokens"))
        return {
            "step": self.step + 1,
            **means,
            "grad_norm": float(grad_norm) if grad_norm is not None else 0.0,
            "lr": lr,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds,
            "peak_memory_gb": platform.CURRENT.peak_memory_bytes() / 2**30,
        }

    def forward_backward(
        self, numbers: list[int], reference: np.ndarray | None, *, held_out: DataSet | None = None
    ) -> dict[int, list[float]]:
        """Gradients of the mean loss over a global batch, in the buffers of DDP and reduced.

        Args:
            numbers: samples of the global batch, in order.
            reference: [global batch, 2] log-probs, or None.
            held_out: the samples are of these, and no gradient is taken.

        Returns:
            Place in the batch -> metrics, on the last pipeline stage; empty on the others.
        """
        t = self.config.training
        source = held_out or self.data_set
        places = assign_batch(
            [source.costs[i] for i in numbers],
            data_size=self.parallel.data_size,
            micro_batch_size=t.micro_batch_size,
        )[self.parallel.data_rank]
        prepared: list[tuple[list[int], list[Sample], MicroBatch]] = []
        for place in places:
            samples = [source.samples[numbers[i]] for i in place]
            prepared.append((place, samples, self._lay_out(samples)))
        sample_metrics: dict[int, list[float]] = {}

        def forward_step(iterator: Iterator[Any], chunk: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
            place, samples, batch = next(iterator)
            output = chunk(
                batch.tokens_1s,
                batch.positions_1s,
                batch.plan,
                self.rotary,
                batch.loss_places_N,
                batch.targets_N,
                None
                if held_out
                else known_nll_grad(
                    batch,
                    objective=self.config.objective,
                    parallel=self.parallel,
                    microbatches=len(prepared),
                ),
            )

            def loss_func(logps_N: Tensor) -> tuple[Tensor, dict[str, Any]]:
                loss, rows = batch_loss(
                    logps_N,
                    batch,
                    None if reference is None else reference[place],
                    objective=self.config.objective,
                    parallel=self.parallel,
                    chosen_tokens=[s.length(Mode.CHOSEN) for s in samples],
                )
                if held_out:
                    counts = batch.layout.response_tokens.reshape(-1, 2).tolist()
                    rows = [row + [float(n) for n in pair] for row, pair in zip(rows, counts, strict=True)]
                sample_metrics.update(zip(place, rows, strict=True))
                return loss, {}

            return output, loss_func

        several = len(self.model) > 1
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(prepared) for _ in self.model] if several else iter(prepared),
            model=self.model if several else self.model[0],
            num_microbatches=len(prepared),
            seq_length=1,  # ignored: lengths vary
            micro_batch_size=1,
            forward_only=held_out is not None,
        )
        return sample_metrics

    # ---------------------------------------------------------------------------------- held-out data

    def evaluate(
        self,
        kept: Mapping[int, Sequence[float]] | None = None,
        keep: Callable[[list[int], np.ndarray], None] | None = None,
    ) -> np.ndarray:
        """Metrics of the held-out samples, [samples, held_out.COLUMNS], the same on every rank and for every layout.

        Collective; the weights stay as they are.

        Args:
            kept: metrics from an interrupted run, keyed by sample number and identical on all ranks; these samples are skipped.
            keep: called with the numbers of a batch and their metrics, [numbers, held_out.COLUMNS], as they come.
        """
        valid_set = self.valid_set
        assert valid_set is not None
        t = self.config.training
        size = t.global_batch_size
        count = len(valid_set.samples) if t.eval_iters is None else min(len(valid_set.samples), t.eval_iters * size)
        result = np.zeros((count, len(held_out.COLUMNS)))
        for number, metrics in (kept or {}).items():
            if number < count:
                result[number] = metrics
        left = [n for n in range(count) if n not in (kept or {})]
        began = said = time.monotonic()
        tokens = 0.0
        for start in range(0, len(left), size):
            fresh = left[start : start + size]
            # The last batch is filled with its last sample, whose further metrics are left out.
            numbers = fresh + [fresh[-1]] * (size - len(fresh))
            reference = self.valid_reference(numbers)
            with torch.no_grad():
                found = self.forward_backward(numbers, reference, held_out=valid_set)
            table = gather_samples(
                found, size, len(held_out.COLUMNS), self.parallel, has_metrics=self.parallel.is_last_stage
            )
            of_batch = table[: len(fresh)].cpu().numpy()
            result[fresh] = of_batch
            if keep is not None:
                keep(fresh, of_batch)
            now, done = time.monotonic(), start + len(fresh)
            tokens += of_batch[:, held_out.COLUMNS.index("tokens")].sum()
            if now - said > 10:
                said, rate = now, done / (now - began)
                self._log(
                    f"validation: {count - len(left) + done}/{count} samples, {tokens / (now - began):,.0f} tokens/s, "
                    f"{(len(left) - done) / rate:.0f} s left"
                )
        return result

    def _report_validation(self) -> None:
        began = time.monotonic()
        found = held_out.summary(self.evaluate(), has_reference=self.config.objective.objective != "sft")
        self._check_finite("loss on held-out data", found["loss"], [])
        self.reporter.validation({"step": self.step, **found, "seconds": time.monotonic() - began})

    def report_alone(self) -> None:
        """Evaluate the held-out data, say what came of it, and write it to OUTPUT/validation.json where there is an output."""
        found = held_out.summary(self.evaluate(), has_reference=self.config.objective.objective != "sft")
        self._log(f"{self.plan.load}: {validation_line(found)}")
        found = {"checkpoint": str(self.plan.load), **found}
        if self.active and self.output is not None:
            self.output.mkdir(parents=True, exist_ok=True)
            write_atomically(self.output / "validation.json", (json.dumps(found, indent=2) + "\n").encode())

    def _time_to_evaluate(self) -> bool:
        if self.valid_set is None:
            return False
        interval = self.config.training.eval_interval
        return self.step == self.plan.train_iters or (interval is not None and self.step % interval == 0)

    def _lay_out(self, samples: list[Sample]) -> MicroBatch:
        c = self.config
        return policy_batch(
            samples, data=c.data, objective=c.objective, parallel=self.parallel, window=self.plan.shape.window_size
        )

    def _check_finite(self, what: str, value: float, numbers: list[int]) -> None:
        if not math.isfinite(value):
            raise LongPOError(
                f"step {self.step + 1}: the {what} is {value} (samples {numbers[:8]}); the last checkpoint is good: lower "
                "lr, lengthen the warm-up, or look at those samples"
            )

    # ---------------------------------------------------------------------------------- saving

    def _time_to_save(self) -> bool:
        interval = self.config.checkpoint.save_interval
        return interval is not None and self.step % interval == 0

    def _time_to_stop(self) -> bool:
        c = self.config.checkpoint
        if self.step >= self.plan.train_iters:
            return False
        if c.exit_interval is not None and self.step % c.exit_interval == 0:
            return True
        if c.exit_duration_in_mins is None:
            return False
        # Clocks differ between ranks; the first one's counts.
        over = torch.tensor([time.monotonic() - self.began > c.exit_duration_in_mins * 60], dtype=torch.int32)
        over = over.to(platform.CURRENT.device)
        dist.broadcast(over, src=0)
        return bool(over.item())

    def _save(self) -> None:
        if self.checkpointer is not None:
            self.checkpointer.save(
                self.step, self.plan.train_iters, self.chunks, self.optimizer, self.scheduler, self.record()
            )

    def record(self) -> dict[str, Any]:
        """What a checkpoint of now says of the run, for the exported model's card."""
        return training_record(
            step=self.step,
            train_iters=self.plan.train_iters,
            layout=self.parallel.describe(),
            manifest=self.plan.manifest.as_dict(),
            records=self.reporter.records,
        )


@contextmanager
def swapped_weights(chunks: Sequence[torch.nn.Module], weights: Sequence[Sequence[Tensor]]) -> Iterator[None]:
    """The chunks hold other weights meanwhile. Copied in place: DDP's and the optimizer's views must stay views."""
    own = [[p.detach().clone() for p in chunk.parameters()] for chunk in chunks]
    with torch.no_grad():
        for chunk, values in zip(chunks, weights, strict=True):
            for p, value in zip(chunk.parameters(), values, strict=True):
                p.copy_(value)
        try:
            yield
        finally:
            for chunk, values in zip(chunks, own, strict=True):
                for p, value in zip(chunk.parameters(), values, strict=True):
                    p.copy_(value)


def run(config: Config) -> None:
    """Train as a configuration says.

    Raises:
        LongPOError: whatever the user can mend, before any long work where it can be known before.
    """
    plan = make_plan(config, int(os.environ.get("WORLD_SIZE", "1")))
    process_groups.start_processes(config.parallel.distributed_timeout_minutes)
    parallel = groups_of(plan)
    trainer = Trainer(plan, parallel)
    if config.training.skip_train:
        trainer.report_alone()
    else:
        trainer.train()
    process_groups.stop_processes()
