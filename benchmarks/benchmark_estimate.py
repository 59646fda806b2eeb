"""The memory estimate beside simulated peaks, over layouts, lengths and models: a table in Markdown.

    python benchmarks/benchmark_estimate.py --found pairs
    python benchmarks/benchmark_estimate.py --layers 8 --only mistral-7b

No GPU is needed. A pair of a whole model takes about half a minute of one core, one of eight layers five seconds, more with
pipelines and allgather. Peaks are kept in ``--found``, by hashes of what was asked and of the code but for the estimate's, so
a run that was broken off goes on. The estimate is made anew each time.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import code_hash
from megatron_longpo.runtime.files import write_atomically
from megatron_longpo.simulation.fallback import estimate
from megatron_longpo.simulation.request import Card, Request
from megatron_longpo.simulation.start import simulate

_GIB = 2**30
_COMMON = {
    "layernorm_epsilon": 1e-5,
    "add_qkv_bias": False,
    "untie_embeddings_and_output_weights": True,
    "rotary_base": 1e6,
    "max_position_embeddings": 524288,
    "dtype": "bfloat16",
}


def _shape(family: str, sizes: str, **more: Any) -> dict[str, Any]:
    """A shape from its sizes: layers, hidden, MLP, heads, key-value heads, head size, vocabulary."""
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
    names = (*names, "kv_channels", "vocab_size")
    return {**_COMMON, "family": family, **dict(zip(names, map(int, sizes.split()), strict=True)), **more}


MODELS = {
    "mistral-7b": _shape("mistral", "32 4096 14336 32 8 128 32000"),
    "qwen2.5-7b": _shape("qwen2", "28 3584 18944 28 4 128 152064", add_qkv_bias=True),
    "qwen3-4b": _shape(
        "qwen3", "36 2560 9728 32 8 128 151936", qk_layernorm=True, untie_embeddings_and_output_weights=False
    ),
    "llama-3.1-70b": _shape("llama", "80 8192 28672 64 8 128 128256"),
    "smollm2-135m": _shape("llama", "30 576 1536 9 3 64 49152", untie_embeddings_and_output_weights=False),
}


@dataclass(frozen=True, eq=False)
class Pair:
    """A layout, a length and a model.

    Attributes:
        model: name in ``MODELS``.
        world_size: GPUs.
        tokens: tokens of the longest row.
        layout: tensor, pipeline and context parallel sizes; with sequence parallelism where there are several tensor ranks.
        recompute: ``none``, ``up`` (the MLPs' first products), or a number of whole layers of each stage.
        rank: the rank.
        parallel: other options of the section.
        optimizer: optimizer.
        offloaded: layers of each stage whose activations wait in host memory.
        layers: depth that the model is cut to; None: its own.
    """

    model: str
    world_size: int
    tokens: int
    layout: tuple[int, int, int]
    recompute: str = "up"
    rank: int = 0
    parallel: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "rmsprop"
    offloaded: int = 0
    layers: int | None = None

    def request(self, layers: int | None) -> Request:
        tensor, pipeline, context = self.layout
        training: dict[str, Any] = {"bf16": True, "global_batch_size": 8, "recompute_granularity": self.recompute}
        if self.recompute != "none":
            training |= {"recompute_granularity": "selective", "recompute_modules": ["mlp_up"]}
        if self.recompute.isdigit():
            training |= {"recompute_granularity": "full", "recompute_method": "block"}
            training |= {"recompute_num_layers": int(self.recompute)}
        if self.offloaded:
            training["cpu_offloading_num_layers"] = self.offloaded
        config = {
            "parallel": {
                "tensor_model_parallel_size": tensor,
                "pipeline_model_parallel_size": pipeline,
                "context_parallel_size": context,
                "sequence_parallel": tensor > 1,
                "use_distributed_optimizer": True,
                **self.parallel,
            },
            "training": training,
            "optimizer": {"optimizer": self.optimizer},
        }
        layers = layers or self.layers
        shape = {**MODELS[self.model], **({} if layers is None else {"num_layers": layers})}
        return Request(config, self.world_size, self.rank, shape, tokens=self.tokens)


_ALLGATHER = {"cp_comm_type": "allgather"}
PAIRS = (
    Pair("mistral-7b", 8, 131072, (1, 1, 8)),
    Pair("mistral-7b", 8, 131072, (1, 1, 8), "4"),
    Pair("mistral-7b", 8, 131072, (1, 1, 8), "8"),
    Pair("mistral-7b", 8, 131072, (1, 1, 8), parallel=_ALLGATHER),
    Pair("mistral-7b", 8, 131072, (2, 1, 4)),
    Pair("mistral-7b", 8, 131072, (4, 1, 2)),
    Pair("mistral-7b", 8, 131072, (8, 1, 1)),
    Pair("mistral-7b", 8, 32768, (2, 1, 4)),
    Pair("mistral-7b", 8, 32768, (2, 1, 4), "none"),
    Pair("mistral-7b", 8, 32768, (1, 1, 8), "none"),
    Pair("mistral-7b", 8, 65536, (2, 1, 4), parallel={"sequence_parallel": False}),
    Pair("mistral-7b", 8, 16384, (8, 1, 1), "none"),
    Pair("mistral-7b", 16, 262144, (4, 1, 4)),
    Pair("mistral-7b", 16, 524288, (4, 1, 4)),
    Pair("mistral-7b", 8, 65536, (2, 2, 2)),
    Pair("mistral-7b", 8, 65536, (2, 2, 2), rank=7),
    Pair("mistral-7b", 8, 32768, (2, 2, 2), parallel={"num_layers_per_virtual_pipeline_stage": 2}),
    Pair("mistral-7b", 1, 8192, (1, 1, 1), parallel={"use_distributed_optimizer": False}, optimizer="adam"),
    Pair("qwen2.5-7b", 8, 131072, (4, 1, 2)),
    Pair("qwen2.5-7b", 8, 131072, (2, 1, 4), parallel=_ALLGATHER),
    Pair("qwen2.5-7b", 8, 131072, (1, 1, 8), parallel=_ALLGATHER),
    Pair("qwen2.5-7b", 8, 32768, (4, 1, 2), "none"),
    Pair("qwen3-4b", 8, 131072, (2, 1, 4)),
    Pair("qwen3-4b", 8, 65536, (1, 1, 8), "none"),
    Pair("smollm2-135m", 8, 16384, (1, 1, 1), "none"),
    Pair("smollm2-135m", 3, 65536, (1, 1, 3)),
    Pair("llama-3.1-70b", 64, 131072, (8, 1, 8)),
    Pair("llama-3.1-70b", 64, 131072, (8, 2, 4)),
)
# Activations in host memory: `--offloaded`.
OFFLOADED = (
    Pair("mistral-7b", 8, 131072, (1, 1, 8), layers=8),
    Pair("mistral-7b", 8, 131072, (1, 1, 8), offloaded=5, layers=8),
    Pair("mistral-7b", 8, 131072, (1, 1, 8), offloaded=7, layers=8),
    Pair("mistral-7b", 8, 131072, (1, 1, 8), "none", offloaded=6, layers=8),
    Pair("mistral-7b", 8, 65536, (2, 2, 2), offloaded=3, layers=8),
    Pair("mistral-7b", 8, 65536, (2, 2, 2), rank=7, offloaded=3, layers=8),
)


# Pairs of one simulating process: it takes some seconds to start, and its results are written when it ends.
_AT_ONCE = 3
# What has no part in a simulated step: here it is decided beforehand what is recomputed.
_NOT_SIMULATED = ("planner", "training/activations.py", "training/memory.py")


def path_of(request: Request, folder: Path) -> Path:
    """File of a request's simulation."""
    asked = hashlib.sha256(f"{code_hash(*_NOT_SIMULATED)} {request.as_json()}".encode())
    return folder / f"{asked.hexdigest()[:16]}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="depth of every model; default: its own")
    parser.add_argument("--only", help="a model")
    parser.add_argument("--offloaded", action="store_true", help="the pairs with activations in host memory")
    parser.add_argument("--found", type=Path, help="folder that keeps what was simulated")
    a = parser.parse_args()
    if a.found is not None and a.found.is_file():
        sys.exit(f"error: --found {a.found} is a file, which earlier versions wrote; name a folder")
    pairs = [pair for pair in (OFFLOADED if a.offloaded else PAIRS) if a.only in (None, pair.model)]
    requests = {pair: pair.request(a.layers) for pair in pairs}
    with contextlib.ExitStack() as stack:
        folder = a.found or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        left = [request for request in requests.values() if not path_of(request, folder).exists()]
        for start in range(0, len(left), _AT_ONCE):
            some = left[start : start + _AT_ONCE]
            for request, report in zip(some, simulate(some, quiet=True), strict=True):
                found = {"request": request.as_json(), "layout": report.layout, "recompute": report.recompute}
                found |= {"peak": report.peak_bytes, "place": report.peak["place"], "seconds": report.seconds}
                write_atomically(path_of(request, folder), (json.dumps(found) + "\n").encode())
        print("| model | layout | rank | tokens | recomputed | simulated GiB | estimate GiB | |")
        print("|---|---|---|---|---|---|---|---|")
        for pair, request in requests.items():
            row = json.loads(path_of(request, folder).read_text(encoding="utf-8"))
            said = estimate(request, Card()).tensor_bytes
            print(
                f"| {pair.model} | {row['layout']} | {pair.rank} | {pair.tokens:,} | {row['recompute']} | "
                f"{row['peak'] / _GIB:.2f} | {said / _GIB:.2f} | {100 * (said / row['peak'] - 1):+.1f}% |"
            )


if __name__ == "__main__":
    main()
