"""Run the cases of one world size and save their numbers.

torchrun ... -m tests.support.parity.worker FOLDER FAMILIES [CASE ...]
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from megatron_longpo.config import Config, from_dict
from megatron_longpo.doctor.canonical import canonical, gather_gradient_shards
from megatron_longpo.model.layers import fuse_weight_gradients
from megatron_longpo.runtime import process_groups
from megatron_longpo.runtime.failure import run_or_fail
from megatron_longpo.runtime.process_groups import destroy_groups
from megatron_longpo.training.metrics import reduce_samples
from megatron_longpo.training.optimization import gather_weights
from megatron_longpo.training.plan import make_plan
from megatron_longpo.training.session import open_session
from megatron_longpo.training.trainer import start_training
from tests.support.parity.cases import CASES, Case

STEPS = 3
# Prefixes that cases name.
DATA = ("data", "few")
# Held-out data are evaluated on this family, under every layout.
EVALUATED = "qwen2"


def base_settings(folder: Path, family: str) -> dict[str, dict[str, Any]]:
    """What all cases have in common: beta and weight are large enough for every term to show in the gradients."""
    return {
        "data": {"data_path": "data"},
        "objective": {"beta": 0.2, "preference_weight": 0.5},
        "model": {"rotary_base": 40000.0, "make_vocab_size_divisible_by": 8},
        "training": {"global_batch_size": 4, "train_iters": STEPS, "seed": 7},
        # A large epsilon: otherwise Adam would amplify the rounding of gradients near zero to whole steps.
        "optimizer": {"lr": 1e-3, "lr_decay_style": "constant", "clip_grad": 1.0, "adam_eps": 1e-4},
        "checkpoint": {"load": str(folder / f"{family}.ckpt")},
    }


def settings_of(case: Case, folder: Path, family: str) -> Config:
    settings = base_settings(folder, family)
    for section, values in case.settings.items():
        settings[section] = {**settings.get(section, {}), **values}
    named = settings["data"]["data_path"]
    settings["data"]["data_path"] = (
        str(folder / named)
        if isinstance(named, str)
        else [str(folder / word) if word in DATA else word for word in named]
    )
    # Caches are shared by fingerprint; with a folder per case each layout has to compute the reference itself.
    settings["reference"] = {
        "reference_cache": str(folder / "references" / family / case.name),
        **settings.get("reference", {}),
    }
    if family == EVALUATED:
        settings["data"]["valid_data_path"] = str(folder / "held_out")
    return from_dict(settings, case.name)


def run_case(config: Config) -> dict[str, Any]:
    plan = make_plan(config, int(os.environ["WORLD_SIZE"]))
    session = open_session(plan)
    parallel = session.parallel
    trainer = start_training(session, began=time.monotonic())
    if config.parallel.gradient_accumulation_fusion:
        # Else on CUDA only. With fp32 weights, or sums of 16 bits, nothing is changed.
        for chunk in trainer.chunks:
            fuse_weight_gradients(chunk)
    numbers = trainer.sampler.batch(0)
    reference = session.reference.logps(session.data.train, numbers)
    for chunk in trainer.model:
        chunk.zero_grad_buffer()
    batches = session.runner.lay_out(session.data.train, numbers, reference)
    found = session.runner.forward_backward(trainer.model, batches, count=len(numbers))
    metrics = reduce_samples(found, len(numbers), parallel)
    gather_gradient_shards(trainer.model)
    gradients = canonical(session.chunks, plan.shape, parallel, lambda p: p.main_grad)
    # Before any step, on seven of the eight samples: the second batch is not full.
    held_out = session.held_out.evaluate() if config.data.valid_data_path and not config.training.bf16 else None
    steps = []
    for _ in range(STEPS):
        record = trainer.train_step()
        trainer.step += 1
        steps.append(record)
    gather_weights(trainer.model)
    weights = canonical(session.chunks, plan.shape, parallel, lambda p: p.detach())
    return {
        "metrics": metrics,
        "gradients": gradients,
        "steps": steps,
        "weights": weights,
        "reference": reference,
        "held_out": held_out,
    }


def main() -> None:
    folder, families, names = Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:]
    process_groups.start_processes(5)
    world = int(os.environ["WORLD_SIZE"])
    for family in families:
        results = {}
        for case in CASES:
            if case.processes != world or family not in case.families or (names and case.name not in names):
                continue
            results[case.name] = run_case(settings_of(case, folder, family))
            destroy_groups()
            if int(os.environ["RANK"]) == 0:
                print(f"done {family} {case.name}", flush=True)
        if int(os.environ["RANK"]) == 0:
            torch.save(results, folder / f"results-{family}-{world}.pt")
    process_groups.stop_processes()


if __name__ == "__main__":
    run_or_fail(main)
