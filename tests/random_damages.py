"""Random damages of checkpoints: ``python -m tests.random_damages --folder F --damages 50 --seed S``.

A tiny run is trained that leaves three checkpoints. Each damage then happens to a copy of it: to the newest checkpoint, or to the
two newest. The run resumes, and its weights and optimizer states must be those of the checkpoint that it names, as they were
before; the damage must be said. Damage to what only an export reads does not keep a run from resuming. Half of the copies are
read as if all files were large, so that they are hashed in threads beside the load.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megatron_longpo.checkpoint import checksums
from megatron_longpo.checkpoint.folders import folder_of
from megatron_longpo.config import Config, from_dict
from megatron_longpo.conversion.import_hf import import_hf
from megatron_longpo.runtime import process_groups
from megatron_longpo.training.checkpointer import Checkpointer
from megatron_longpo.training.optimization import inner_optimizers
from megatron_longpo.training.plan import make_plan
from megatron_longpo.training.replicas import digest_of
from megatron_longpo.training.session import open_session
from megatron_longpo.training.trainer import Trainer, start_training
from tests.support.damages import DAMAGES
from tests.support.data import make_data
from tests.support.launch import PYTHON, run
from tests.support.logs import said
from tests.support.models import make_model

_STEPS = 3


def config_of(folder: Path, output: Path) -> Config:
    """A run without a reference that saves every step."""
    return from_dict(
        {
            "data": {"data_path": str(folder / "data")},
            "objective": {"objective": "sft"},
            "optimizer": {"lr": 1e-3, "adam_eps": 1e-4},
            "training": {"global_batch_size": 2, "train_iters": _STEPS},
            "checkpoint": {"load": str(folder / "ckpt"), "save": str(output), "save_interval": 1},
            "logging": {"tensorboard": False, "plot_interval": 1000},
        },
        "random damages",
    )


def digest(trainer: Trainer) -> str:
    """Of weights and optimizer states."""
    states = [
        value
        for inner in inner_optimizers(trainer.optimizer)
        for state in inner.state.values()
        for _, value in sorted(state.items())
        if isinstance(value, torch.Tensor)
    ]
    return digest_of([*(p for chunk in trainer.chunks for p in chunk.parameters()), *states])


def resume(trainer: Trainer, plan: Any) -> tuple[int, str]:
    """Resume a run as a launch does; the step, and what was logged."""
    with said() as stream:
        checkpointer = Checkpointer(plan, trainer.parallel, reference_weights=trainer.session.reference.weights)
        step = checkpointer.resume(trainer.state)
    return step, stream.getvalue()


def damage_and_resume(trainer: Trainer, folder: Path, good: dict[int, str], number: int, seed: int) -> dict[str, Any]:
    """One damage; what came of it.

    Args:
        trainer: what is resumed into.
        folder: folder of the whole run, ``run``, and of the copies.
        good: digests of its checkpoints, by step.
        number: number of the damage.
        seed: seed of all.
    """
    rng = random.Random(f"{seed}/{number}")
    kind = list(DAMAGES)[number % len(DAMAGES)]
    output = folder / f"damaged_{number}"
    shutil.copytree(folder / "run", output)
    # The files that resuming reads, of either the newest or the two newest.
    damaged = [_STEPS, _STEPS - 1][: rng.choice([1, 1, 1, 2])]
    what = [DAMAGES[kind](folder_of(output, step), rng) for step in damaged]
    in_threads = rng.random() < 0.5
    config = dataclasses.replace(
        trainer.plan.config, checkpoint=dataclasses.replace(trainer.plan.config.checkpoint, save=str(output))
    )
    with mock.patch.object(checksums, "_SMALL_BYTES", 0) if in_threads else contextlib.nullcontext():
        step, log = resume(trainer, dataclasses.replace(trainer.plan, config=config))
    lines = [line for line in log.splitlines() if not line.startswith("resumed from")]
    found = {
        "kind": kind,
        "what": what,
        "in_threads": in_threads,
        "resumed": step,
        "is_right": digest(trainer) == good[step] and step >= min(damaged) - 1,
        # Each that was in the way is named.
        "is_said": all(str(folder_of(output, each)) in "\n".join(lines) for each in damaged if each >= step),
    }
    shutil.rmtree(output)
    return found


def damages(folder: Path, *, count: int, seed: int) -> list[dict[str, Any]]:
    """Damage a run so many times in this process, which has no process group yet."""
    make_model("llama", folder / "hf", num_hidden_layers=2)
    import_hf(folder / "hf", folder / "ckpt")
    make_data(folder / "data", 6, longest=60)
    process_groups.start_processes(5)
    plan = make_plan(config_of(folder, folder / "run"), 1)
    trainer = start_training(open_session(plan), began=time.monotonic())
    trainer.train()
    checkpointer = Checkpointer(plan, trainer.parallel, reference_weights=trainer.session.reference.weights)
    good = {}
    for step in range(1, _STEPS + 1):
        checkpointer.load_step(step, trainer.state)
        good[step] = digest(trainer)
    assert len(set(good.values())) == _STEPS
    return [damage_and_resume(trainer, folder, good, number, seed) for number in range(count)]


def by_commands(folder: Path, *, count: int, seed: int) -> list[dict[str, Any]]:
    """A few through the command line: the newest checkpoint's weights are damaged, and the command ends well."""
    found = []
    for number in range(count):
        rng = random.Random(f"{seed}/command/{number}")
        output = folder / f"command_{number}"
        shutil.copytree(folder / "run", output)
        kind = list(DAMAGES)[number % len(DAMAGES)]
        what = DAMAGES[kind](folder_of(output, _STEPS), rng)
        config = folder / f"command_{number}.yaml"
        config.write_text(config_of(folder, output).as_yaml(), encoding="utf-8")
        done = run([PYTHON, "-m", "megatron_longpo.train", "--config", str(config)])
        text = done.stdout
        found.append(
            {
                "kind": kind,
                "what": [what],
                "is_right": "resumed from" in text and "Traceback" not in done.stderr,
                "is_said": any(
                    str(folder_of(output, _STEPS)) in line and not line.startswith("resumed from")
                    for line in text.splitlines()
                ),
            }
        )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--damages", type=int, default=50)
    parser.add_argument("--commands", type=int, default=4, help="further ones through the command line")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True)
    began = time.monotonic()
    found = damages(options.folder, count=options.damages, seed=options.seed)
    process_groups.stop_processes()
    found += by_commands(options.folder, count=options.commands, seed=options.seed)
    (options.folder / "report.json").write_text(json.dumps({"seed": options.seed, "damages": found}, indent=1) + "\n")
    wrong = [each for each in found if not (each["is_right"] and each["is_said"])]
    kinds = collections.Counter(each["kind"] for each in found)
    older = sum(each.get("resumed", _STEPS) < _STEPS for each in found)
    print(f"seed {options.seed}: {len(found)} damages ({', '.join(f'{n} {k}' for k, n in kinds.items())})")
    print(f"{len(found) - len(wrong)} found and said, {older} of them resumed from an older checkpoint")
    print(f"{time.monotonic() - began:.0f} s")
    for each in wrong:
        print(f"WRONG: {each}")
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
