"""Measure saving and resuming of a distributed optimizer: seconds, and host memory of each rank beyond what training has.

The model has random weights; its layers are cut so that it fits, and what a rank would have of the whole model is computed.

    python -m torch.distributed.run --nproc-per-node 2 benchmarks/benchmark_checkpoint.py --layers 1 --folder FOLDER
"""

from __future__ import annotations

import argparse
import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist

from megatron_longpo.config import from_dict
from megatron_longpo.model.gpt import build_model
from megatron_longpo.model.shape import ModelShape
from megatron_longpo.runtime import process_groups
from megatron_longpo.runtime.collectives import all_gather_objects
from megatron_longpo.training import checkpointer
from megatron_longpo.training.optimization import build_optimizer, inner_optimizers, wrap_for_training

_WHOLE_LAYERS = 32


def main() -> None:
    """Save and load once, and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1, help="layers of the model that is measured")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--optimizer", choices=("adam", "rmsprop"), default="adam")
    parser.add_argument("--async-save", action="store_true")
    parser.add_argument("--folder", type=Path, required=True, help="folder for the checkpoint, which is removed again")
    a = parser.parse_args()
    process_groups.start_processes(60)
    shape = ModelShape(
        family="mistral",
        num_layers=a.layers,
        hidden_size=4096,
        ffn_hidden_size=14336,
        num_attention_heads=32,
        num_query_groups=8,
        kv_channels=128,
        vocab_size=a.vocabulary,
        layernorm_epsilon=1e-5,
        add_qkv_bias=False,
        untie_embeddings_and_output_weights=True,
        rotary_base=1e6,
        max_position_embeddings=32768,
    )
    config = from_dict(
        {
            "parallel": {"use_distributed_optimizer": True, "tensor_model_parallel_size": a.tensor_parallel},
            "training": {"bf16": True, "global_batch_size": dist.get_world_size() // a.tensor_parallel},
            "optimizer": {"optimizer": a.optimizer},
        },
        "benchmark",
    )
    parallel = process_groups.set_up(tensor=a.tensor_parallel)
    chunks = build_model(shape, config, parallel)
    optimizer = build_optimizer(config, wrap_for_training(chunks, config))
    for inner in inner_optimizers(optimizer):
        checkpointer._make_states(inner)
        for group in inner.param_groups:
            for parameter in group["params"]:
                for value in inner.state[parameter].values():
                    value.detach().fill_(1.0)
    weights = sum(p.numel() for chunk in chunks for p in chunk.parameters())
    states = 1 + len(checkpointer.state_names(inner_optimizers(optimizer)[0]))
    data_parallel = dist.get_world_size(parallel.dp_cp_group)
    found: dict[str, Any] = {
        "ranks": dist.get_world_size(),
        "weights per rank": weights,
        "share of the states, GB": round(4 * states * weights / data_parallel / 1e9, 2),
    }
    whole = (weights - 2 * a.vocabulary * 4096) / a.layers * _WHOLE_LAYERS + 2 * a.vocabulary * 4096
    found["share of the whole model's states, GB"] = round(4 * states * whole / data_parallel / 1e9, 2)
    if dist.get_rank() == 0:
        shutil.rmtree(a.folder, ignore_errors=True)
        a.folder.mkdir(parents=True)
    dist.barrier()

    def content(is_loading: bool) -> dict[str, Any]:
        state = checkpointer.weights_state(chunks, parallel)
        state["optimizer"] = checkpointer.optimizer_content(optimizer, state["model0"], is_loading=is_loading)
        return state

    def save() -> None:
        checkpointer.start_save(
            content(False), a.folder, lambda: None, group=parallel.dp_cp_group, staged=a.async_save
        ).finish()

    def load() -> None:
        loaded = checkpointer._load(content(True), a.folder)
        checkpointer.load_optimizer(optimizer, loaded["optimizer"])

    for name, action in (("save", save), ("load", load)):
        found[name] = measure(action)
    if dist.get_rank() == 0:
        sizes = [path.stat().st_size / 1e9 for path in sorted(a.folder.glob("*.distcp"))]
        print(json.dumps(found | {"files, GB": [round(size, 2) for size in sizes]}))
        shutil.rmtree(a.folder)
    process_groups.stop_processes()


def measure(action: Callable[[], None]) -> dict[str, Any]:
    """Seconds, and for each rank the most private memory beyond what there was before, in GB."""
    process, most = psutil.Process(), [0]
    before, done = process.memory_full_info().uss, threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            most[0] = max(most[0], process.memory_full_info().uss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.monotonic()
    action()
    dist.barrier()
    seconds = time.monotonic() - start
    done.set()
    watcher.join()
    grown = all_gather_objects((max(most[0], before) - before) / 1e9)
    return {"seconds": round(seconds, 1), "host memory per rank, GB": [round(g, 2) for g in grown]}


if __name__ == "__main__":
    main()
