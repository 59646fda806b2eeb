"""Measure one training step, ours and the authors', in one run: time, peak memory and loss; and where our time goes.

The authors' step is written on plain Hugging Face from the description of the released code: chosen and rejected long rows as
one padded batch of two, gradient checkpointing, full float logits, a resident reference on the short rows, RMSProp. Both sides
get the same weights, rows, threads and precision, and run in processes of their own, so that their memory peaks are separate.
Our side can also run in other layouts, where each process has its share of the threads, and with more branches.

    python benchmarks/benchmark_step.py --hf MODEL --lengths 2048,4096 --dtype float32 --output bench
    python benchmarks/benchmark_step.py --hf MODEL --lengths 4096 --layouts 1,cp2,tp2,pp2 --sides ours --output layouts
    python benchmarks/benchmark_step.py --hf MODEL --lengths 4096 --branches 2,8 --sides ours --output branches
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common import CONVERT, describe_machine, peak_gb, reset_peak
from megatron_longpo.runtime.tables import markdown_table

_LAYOUT = re.compile(r"(tp|pp|cp|dp)(\d+)")


def main() -> None:
    """Run every combination, then write the tables and the plot."""
    parser = argparse.ArgumentParser(
        prog="benchmark_step.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hf", required=True, help="Hugging Face model folder")
    parser.add_argument("--lengths", default="2048,4096", help="tokens of the long rows")
    parser.add_argument(
        "--branches", default="2", help="answers to one document: 2, or more by independent turns (ours)"
    )
    parser.add_argument(
        "--layouts", default="1", help="layouts of our side: 1, or degrees such as cp2, tp2, pp2, tp2-cp2"
    )
    parser.add_argument(
        "--answer", type=int, default=128, help="tokens of a chosen answer; a rejected one has three quarters"
    )
    parser.add_argument("--short", type=int, default=512, help="tokens of the short prompt")
    parser.add_argument("--samples", type=int, default=1, help="samples per step (ours)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of all processes together")
    parser.add_argument(
        "--steps",
        type=int,
        default=1,
        help="timed steps after a warm-up step, whose median is reported; 0: time the first step",
    )
    parser.add_argument("--sides", default="ours,authors")
    parser.add_argument("--cp-comm-type", default="auto")
    parser.add_argument("--recompute-granularity", default="auto")
    parser.add_argument(
        "--huge-pages", action="store_true", help="use huge pages on the authors' side too (THP_MEM_ALLOC_ENABLE=1)"
    )
    parser.add_argument(
        "--output", default="benchmark", help="prefix of the result files OUTPUT.json, OUTPUT.md and OUTPUT.png"
    )
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.side:
        side = {"ours": ours, "authors": authors}[a.side]
        result = side(a, int(a.lengths), int(a.branches))
        if os.environ.get("RANK", "0") == "0":
            print("RESULT " + json.dumps(result))
        return
    results = []
    with tempfile.TemporaryDirectory() as folder:
        a.checkpoint = folder + "/ckpt"
        if "ours" in a.sides:
            # In a separate process, so that its memory does not count.
            subprocess.run([sys.executable, str(CONVERT), "import", "--hf", a.hf, "--output", a.checkpoint], check=True)
        for length in map(int, a.lengths.split(",")):
            for branches in map(int, a.branches.split(",")):
                for number, layout in enumerate(a.layouts.split(",")):
                    row: dict[str, Any] = {"length": length, "branches": branches, "layout": layout}
                    for side in a.sides.split(","):
                        # The authors' step has only one layout and two answers.
                        if side == "ours" or (number == 0 and branches == 2):
                            row[side] = _in_processes(a, side, length, branches, layout)
                            print(f"{length} tokens, {branches} branches, {layout}, {side}: {row[side]}", flush=True)
                    results.append(row)
                    Path(f"{a.output}.json").write_text(
                        json.dumps({"arguments": vars(a), "results": results}, indent=2) + "\n"
                    )
    report(a, results)


def degrees(layout: str) -> dict[str, int]:
    """``cp2-tp2`` -> {"cp": 2, "tp": 2}."""
    found = {} if layout == "1" else {k: int(v) for k, v in _LAYOUT.findall(layout)}
    if layout != "1" and "-".join(f"{k}{v}" for k, v in found.items()) != layout:
        sys.exit(f"error: layout={layout} is not 1 nor degrees such as cp2, tp2-cp2; use tp, pp, cp and dp")
    return found


def _in_processes(a: argparse.Namespace, side: str, length: int, branches: int, layout: str) -> dict[str, Any]:
    processes = int(np.prod(list(degrees(layout).values()))) if side == "ours" else 1
    kept = ("hf", "answer", "short", "samples", "dtype", "steps", "cp_comm_type", "recompute_granularity", "checkpoint")
    flags = [f"--{k.replace('_', '-')}={getattr(a, k)}" for k in kept]
    flags += [f"--threads={max(1, a.threads // processes)}", f"--layouts={layout}"]
    flags += [f"--lengths={length}", f"--branches={branches}", f"--side={side}"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, a.threads // processes))}
    if a.huge_pages:
        # Our side always asks torch for them.
        environment["THP_MEM_ALLOC_ENABLE"] = "1"
    command = [sys.executable]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(port)]
    done = subprocess.run([*command, __file__, *flags], capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        sys.exit(f"error: the {side} side failed at length {length}, layout {layout}: {done.stderr[-3000:]}")
    return dict(json.loads(lines[0].removeprefix("RESULT ")))


# --------------------------------------------------------------------------------------------------
# The rows
# --------------------------------------------------------------------------------------------------


def make_sample(a: argparse.Namespace, length: int, vocab_size: int, branches: int, seed: int = 0) -> Any:
    """Make a sample of random tokens whose long rows have ``length`` tokens."""
    from megatron_longpo.data import preference as p

    rng = np.random.default_rng([length, seed])

    def tokens(n: int) -> np.ndarray:
        return rng.integers(3, vocab_size, n).astype(np.int64)

    prompt = 16
    document = tokens(length - prompt - a.answer)
    pieces = [p.Piece(document, p.CONTEXT)]
    for turn in range(branches // 2):
        question = tokens(prompt)
        pieces.append(p.Piece(question, p.PROMPT))
        if turn:
            pieces.append(p.Piece(question, p.Mode.OWN_PROMPT))
        # Of unequal length, as answers are.
        answers = [tokens(a.answer), tokens(a.answer * 3 // 4)]
        pieces += [p.Piece(answers[0], p.CHOSEN_RESPONSE), p.Piece(answers[1], p.REJECTED_RESPONSE)]
        start = int(rng.integers(0, max(1, len(document) - a.short)))
        pieces.append(p.Piece(np.concatenate([document[start : start + a.short], question]), p.SHORT_PROMPT))
        pieces += [p.Piece(answers[0], p.SHORT_CHOSEN_RESPONSE), p.Piece(answers[1], p.SHORT_REJECTED_RESPONSE)]
    return p.Sample(tuple(pieces))


# --------------------------------------------------------------------------------------------------
# Ours
# --------------------------------------------------------------------------------------------------


def ours(a: argparse.Namespace, length: int, branches: int) -> dict[str, Any]:
    """Measure our trainer's own step. The cost of the reference is that of scoring the samples once."""
    import torch
    import torch.distributed as dist

    from megatron_longpo.config import from_dict
    from megatron_longpo.data.indexed import Manifest, SampleWriter
    from megatron_longpo.model.shape import ModelShape
    from megatron_longpo.runtime import process_groups
    from megatron_longpo.training.plan import make_plan
    from megatron_longpo.training.session import open_session
    from megatron_longpo.training.trainer import start_training

    torch.set_num_threads(a.threads)
    shape = ModelShape.read(Path(a.checkpoint))
    degree = degrees(a.layouts)
    process_groups.start_processes(60)
    prefix = Path(a.checkpoint).parent / f"data-{length}-{branches}-{a.layouts}"
    if dist.get_rank() == 0:
        writer = SampleWriter(
            prefix, Manifest(shape.vocab_size, "int32", None, None, None, independent_turns=True), "benchmark"
        )
        for seed in range(a.samples):
            writer.add(make_sample(a, length, shape.vocab_size, branches, seed))
        writer.finish()
    dist.barrier()
    config = from_dict(
        {
            "data": {"data_path": str(prefix), "turns": "independent" if branches > 2 else "chained"},
            "parallel": {
                "tensor_model_parallel_size": degree.get("tp", 1),
                "sequence_parallel": degree.get("tp", 1) > 1,
                "pipeline_model_parallel_size": degree.get("pp", 1),
                "context_parallel_size": degree.get("cp", 1),
                "cp_comm_type": a.cp_comm_type,
                "distributed_timeout_minutes": 60,
            },
            "training": {
                "global_batch_size": a.samples,
                "train_iters": 100,
                "bf16": a.dtype == "bfloat16",
                "recompute_granularity": a.recompute_granularity,
            },
            "optimizer": {"optimizer": "rmsprop", "lr": 1e-9, "lr_decay_style": "constant"},
            "checkpoint": {"load": a.checkpoint},
        },
        "benchmark",
    )
    ceilings = _ceilings(length, shape, a.dtype)
    session = open_session(make_plan(config, dist.get_world_size()))
    trainer = start_training(session, began=time.monotonic())
    set_up = peak_gb()
    # The first step touches all memory for the first time, so it is profiled and later ones are timed. The profiler's own
    # memory does not count.
    first, parts = _profiled_step(trainer)
    if a.steps:
        before = reset_peak()
        seconds = _median([trainer.train_step()["step_seconds"] for _ in range(a.steps)])
        activations = peak_gb() - before
    else:
        seconds, activations = first["step_seconds"], math.nan
    scoring = _median([_score_again(session) for _ in range(max(1, a.steps))])
    # The slowest rank's step and the largest rank's memory count; the parts of the step are those of rank 0.
    most = torch.tensor([seconds, scoring, max(set_up, peak_gb()), activations], dtype=torch.float64)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    seconds, scoring, peak, activations = most.tolist()
    return {
        "seconds": seconds + scoring,
        "step_seconds": seconds,
        "reference_seconds": scoring,
        "peak_gb": peak,
        "activation_gb": activations,
        "loss": first["loss"],
        "recompute": trainer.config.training.recompute_granularity,
        "parts": parts,
        "operations": _operations(session),
        "ceilings": ceilings,
    }


def _median(values: list[float]) -> float:
    return float(np.median(values))


def _score_again(session: Any) -> float:
    """Measure the seconds of scoring all samples with the reference."""
    from megatron_longpo.model.rotary import rotary_of
    from megatron_longpo.training.reference_scoring import Scorer

    shape, data = session.plan.shape, session.data.train
    scorer = Scorer(
        model=session.chunks,
        rotary=rotary_of(shape, shape.rotary_base),
        shape=shape,
        rows="short",
        parallel=session.parallel,
        max_tokens=16384,
    )
    samples = data.samples(range(len(data)))
    began = time.monotonic()
    scorer.score(samples)
    return time.monotonic() - began


def _operations(session: Any) -> dict[str, float]:
    """Count the floating-point operations of a step by part, over all ranks and without recomputation."""
    from megatron_longpo.training.batch import policy_layout

    shape, config, data = session.plan.shape, session.config, session.data.train
    found = {"linear layers": 0.0, "attention": 0.0, "log-probs": 0.0}
    for i in range(len(data)):
        layout = policy_layout([data[i]], data=config.data, objective=config.objective)
        places = len(set(layout.nll_places.tolist()) | set(layout.response_places_E.tolist()))
        found["linear layers"] += 6.0 * layout.length * shape.layer_weights * shape.num_layers
        # Two matmuls in the forward, five in the backward (the scores are recomputed), 2 operations per multiply-add.
        found["attention"] += 14.0 * layout.attention_pairs * shape.query_width * shape.num_layers
        found["log-probs"] += 6.0 * places * shape.vocab_size * shape.hidden_size
    return found


def _ceilings(length: int, shape: Any, dtype_name: str) -> dict[str, float]:
    """Measure what this machine reaches, in GFLOP/s and with these threads, in the operations that a step consists of.

    These are a large matmul, a layer's own matmuls (narrower, forward and backward, nothing recomputed), and torch's own causal
    attention (one row, the model's heads), forward and backward.
    """
    import torch

    dtype = getattr(torch, dtype_name)

    def best(action: Callable[[], Any], operations: float) -> float:
        action()
        times = []
        for _ in range(3):
            began = time.monotonic()
            action()
            times.append(time.monotonic() - began)
        return operations / min(times) / 1e9

    x, y = (torch.randn(4096, 4096).to(dtype) for _ in range(2))
    product = best(lambda: x @ y, 2.0 * 4096**3)
    n = min(length, 8192)
    width, heads = shape.hidden_size, shape.query_width
    qkv = heads + 2 * shape.kv_width
    sizes = [(qkv, width), (width, heads), (2 * shape.ffn_hidden_size, width), (width, shape.ffn_hidden_size)]
    layer = [tuple(torch.randn(*size).to(dtype) for size in ((n, i), (n, o), (o, i))) for o, i in sizes]

    def products() -> None:
        for inputs, outputs, weight in layer:
            inputs @ weight.T
            outputs @ weight
            outputs.T @ inputs

    own = best(products, 6.0 * n * sum(o * i for o, i in sizes))
    layer.clear()
    q = torch.randn(1, shape.num_attention_heads, n, shape.kv_channels).to(dtype).requires_grad_()
    k, v = (torch.randn_like(q).requires_grad_() for _ in range(2))
    direction = torch.randn_like(q)

    def attend() -> None:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.autograd.grad(out, (q, k, v), direction)

    return {
        "matrix product": product,
        "own products": own,
        "attention": best(attend, 7.0 * n * n * q.shape[1] * q.shape[3]),
    }


# Profiler events that make up each part. Time counts for the outermost event that it falls into.
_PARTS = {
    "attention": ("_BlockAttention", "_GatheredAttention", "_UlyssesAttention"),
    "log-probs": ("_TokenLogprobs",),
    "linear layers": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::matmul"),
    "optimizer": ("longpo/optimizer",),
}


def _profiled_step(trainer: Any) -> tuple[dict[str, Any], dict[str, float]]:
    """Run one step under the profiler; return its record and the seconds of its parts."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as prof, _watched_communication() as waited:
        record = trainer.train_step()
    parts = dict.fromkeys(_PARTS, 0.0)

    def walk(event: Any) -> None:
        for part, names in _PARTS.items():
            if any(event.name.startswith(n) for n in names):
                parts[part] += event.cpu_time_total / 1e6
                return
        for child in event.cpu_children:
            walk(child)

    for event in prof.events():
        if event.cpu_parent is None:
            walk(event)
    # Waiting for context-parallel exchanges happens inside the attention.
    parts["attention"] -= waited.get("all_gather_into_tensor", 0.0) + waited.get("all_to_all_single", 0.0)
    parts["attention"] -= waited.get("reduce_scatter_tensor", 0.0) if trainer.parallel.context_size > 1 else 0.0
    parts["communication and idle"] = sum(waited.values())
    parts["element-wise and the rest"] = max(0.0, record["step_seconds"] - sum(parts.values()))
    return record, parts


@contextlib.contextmanager
def _watched_communication() -> Iterator[dict[str, float]]:
    """Seconds spent waiting in each collective, and for pipeline neighbours."""
    import torch.distributed as dist

    waited: dict[str, float] = {}

    class Waiting:
        def __init__(self, work: Any, name: str) -> None:
            self.work, self.name = work, name

        def wait(self, *args: Any) -> Any:
            began = time.monotonic()
            try:
                return self.work.wait(*args)
            finally:
                waited[self.name] = waited.get(self.name, 0.0) + time.monotonic() - began

        def __getattr__(self, name: str) -> Any:
            return getattr(self.work, name)

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.monotonic()
            work = function(*args, **kwargs)
            waited[name] = waited.get(name, 0.0) + time.monotonic() - began
            return None if work is None else Waiting(work, name)

        return call

    collectives = "all_reduce all_gather_into_tensor _all_gather_base reduce_scatter_tensor _reduce_scatter_base"
    names = f"{collectives} all_to_all_single broadcast irecv isend barrier".split()
    originals = {name: getattr(dist, name) for name in names if hasattr(dist, name)}
    for name, function in originals.items():
        setattr(dist, name, watched(name, function))
    try:
        yield waited
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)


# --------------------------------------------------------------------------------------------------
# The authors'
# --------------------------------------------------------------------------------------------------


def authors(a: argparse.Namespace, length: int, branches: int) -> dict[str, Any]:
    """Measure the released code's step, written from its description on plain Hugging Face.

    As there, float logits of both rows are made, log-probs are minus the cross entropy of a shifted copy of them, and the
    NLL is a second cross entropy over a shifted copy of the chosen row's. (Theirs is flash-attn's fused cross entropy, which
    runs on CUDA only; this is torch's.)
    """
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM

    from megatron_longpo.data.preference import Mode, long_rows, short_rows

    torch.set_num_threads(a.threads)
    dtype = getattr(torch, a.dtype)

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            a.hf, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
        )

    policy, reference = load(), load().eval().requires_grad_(False)
    policy.train()
    policy.gradient_checkpointing_enable()
    policy.config.use_cache = False
    sample = make_sample(a, length, policy.config.vocab_size, branches)
    optimizer = torch.optim.RMSprop(policy.parameters(), lr=1e-9)

    def batch(rows: list[Any]) -> tuple[Any, Any, Any]:
        """Pad rows; return ids, attention mask and answer mask."""
        width = max(len(r.tokens_L) for r in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        answers = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, row in enumerate(rows):
            n = len(row.tokens_L)
            ids[i, :n], mask[i, :n] = torch.from_numpy(row.tokens_L), 1
            answers[i, :n] = torch.from_numpy(row.response_L >= 0)
        return ids, mask, answers

    def token_losses(logits: Any, ids: Any) -> Any:
        shifted = logits[:, :-1].contiguous()
        return F.cross_entropy(shifted.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)

    def logits_of(model: Any, ids: Any, mask: Any) -> Any:
        return model(input_ids=ids, attention_mask=mask).logits.float()

    long = batch(long_rows(sample, slot=0, turns="chained", nll_scope="sequence", sides=(Mode.CHOSEN, Mode.REJECTED)))
    shorts = short_rows(sample, slot=0)
    short = [batch(shorts[i : i + 2]) for i in range(0, len(shorts), 2)]

    def step() -> float:
        ids, mask, answers = long
        logits = logits_of(policy, ids, mask)
        sums = -(token_losses(logits, ids) * answers[:, 1:]).sum(1)
        nll = (token_losses(logits[:1], ids[:1]) * mask[:1, 1:]).sum() / mask[0, 1:].sum()
        del logits
        with torch.no_grad():
            ref = sum(-(token_losses(logits_of(reference, i, m), i) * s[:, 1:]).sum(1) for i, m, s in short)
        margin = 0.1 * ((sums[0] - ref[0]) - (sums[1] - ref[1]))
        loss = 0.01 * -F.logsigmoid(margin) + nll
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    times, losses = [], []
    for _ in range(1 + a.steps):
        began = time.monotonic()
        losses.append(step())
        times.append(time.monotonic() - began)
    return {"seconds": _median(times[1:] or times), "peak_gb": peak_gb(), "loss": losses[0]}


# --------------------------------------------------------------------------------------------------
# Report
# --------------------------------------------------------------------------------------------------


def report(a: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """Write OUTPUT.json, the tables in OUTPUT.md and the plot in OUTPUT.png."""
    lines = [f"{describe_machine()}; {a.threads} threads in all, {a.dtype}, answers of {a.answer} tokens.", ""]
    head = "tokens branches layout | ours s | of it reference | authors s | ratio | ours GB | authors GB | ratio"
    head += " | activations GB | recompute | loss ours | loss authors"
    lines += markdown_table(head.split(" | "), [_row(r) for r in results])
    mine = [r for r in results if "ours" in r]
    if mine:
        parts = list(mine[0]["ours"]["parts"])
        lines += ["", "Our step (without the reference) by part, seconds of the first rank:", ""]
        lines += markdown_table(
            ["tokens branches layout", *parts],
            [[_name(r), *(f"{r['ours']['parts'][p]:.1f}" for p in parts)] for r in mine],
        )
        lines += ["", "Work and rate, over all ranks (nothing that is computed again counts as work):", ""]
        head = "tokens branches layout | TFLOP | growth of TFLOP | growth of seconds | GFLOP/s"
        head += " | linear layers | own products | 4096 product | attention | ceiling | log-probs"
        lines += markdown_table(head.split(" | "), [_rates(r, mine[0]) for r in mine])
    text = "\n".join(lines) + "\n"
    print(text)
    Path(f"{a.output}.md").write_text(text, encoding="utf-8")
    _plot(a, results)


def _name(row: dict[str, Any]) -> str:
    return f"{row['length']} K={row['branches']} {row['layout']}"


def _row(row: dict[str, Any]) -> list[str]:
    o, t = row.get("ours"), row.get("authors")
    return [
        _name(row),
        f"{o['seconds']:.1f}" if o else "",
        f"{o['reference_seconds']:.1f}" if o else "",
        f"{t['seconds']:.1f}" if t else "",
        f"{o['seconds'] / t['seconds']:.2f}" if o and t else "",
        f"{o['peak_gb']:.1f}" if o else "",
        f"{t['peak_gb']:.1f}" if t else "",
        f"{o['peak_gb'] / t['peak_gb']:.2f}" if o and t else "",
        f"{o['activation_gb']:.2f}" if o else "",
        o["recompute"] if o else "",
        f"{o['loss']:.5f}" if o else "",
        f"{t['loss']:.5f}" if t else "",
    ]


def _rates(row: dict[str, Any], first: dict[str, Any]) -> list[str]:
    o, f = row["ours"], first["ours"]
    work, seconds = sum(o["operations"].values()), o["step_seconds"]
    processes = int(np.prod(list(degrees(row["layout"]).values())))

    def rate(part: str) -> str:
        # The parts are those of one rank, and so is its share of the work.
        return f"{o['operations'][part] / processes / o['parts'][part] / 1e9:.0f}" if o["parts"][part] else ""

    return [
        _name(row),
        f"{work / 1e12:.2f}",
        f"{work / sum(f['operations'].values()):.2f}",
        f"{seconds / f['step_seconds']:.2f}",
        f"{work / seconds / 1e9:.0f}",
        rate("linear layers"),
        f"{o['ceilings']['own products']:.0f}",
        f"{o['ceilings']['matrix product']:.0f}",
        rate("attention"),
        f"{o['ceilings']['attention']:.0f}",
        rate("log-probs"),
    ]


def _plot(a: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    labels = [_name(r) for r in results]
    for axis, key, title in zip(
        axes, ("seconds", "peak_gb"), ("seconds per step", "peak memory per process, GB"), strict=True
    ):
        for offset, side in ((-0.2, "ours"), (0.2, "authors")):
            heights = [r[side][key] if side in r else 0.0 for r in results]
            if any(heights):
                axis.bar(np.arange(len(results)) + offset, heights, 0.4, label=side)
        axis.set_xticks(range(len(results)), labels, rotation=30)
        axis.set_title(title)
        axis.set_xlabel("tokens, layout")
        axis.legend()
    figure.suptitle(f"{a.dtype}, {a.threads} threads")
    figure.savefig(f"{a.output}.png", dpi=120)


if __name__ == "__main__":
    main()
