"""One training step, ours and the authors', on one machine in one run: time, peak memory, loss; and where our time goes.

The authors' step is written from the description of the released code, on plain Hugging Face: chosen and rejected long rows as
one padded batch of two, gradient checkpointing, full float logits, a resident reference on the short rows, RMSProp. Both sides
get the same weights, rows, threads and precision; each runs in a process of its own, so that peaks of memory are its own.

    python tools/benchmark_step.py --hf MODEL --lengths 2048,4096 --dtype float32 --output bench
"""

from __future__ import annotations

import argparse
import json
import os
import platform as machine
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def main() -> None:
    """Run both sides for each length, then the table and the plot."""
    parser = argparse.ArgumentParser(prog="benchmark_step.py", description=__doc__)
    parser.add_argument("--hf", required=True, help="Hugging Face model folder")
    parser.add_argument("--lengths", default="2048,4096", help="tokens of the long rows")
    parser.add_argument("--answer", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--short", type=int, default=512, help="tokens of the short prompt")
    parser.add_argument("--turns", type=int, default=1, help="turns; 2 x turns branches with --independent")
    parser.add_argument("--independent", action="store_true", help="turns=independent (ours alone)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--steps", type=int, default=2, help="timed steps, after one that is not")
    parser.add_argument("--sides", default="ours,authors")
    parser.add_argument("--recompute", action="store_true", help="full recompute on our side as well")
    parser.add_argument("--output", default="benchmark", help="OUTPUT.json, OUTPUT.md and OUTPUT.png")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.side:
        print("RESULT " + json.dumps({"ours": ours, "authors": authors}[a.side](a, int(a.lengths))))
        return
    results = []
    for length in (int(n) for n in a.lengths.split(",")):
        row: dict[str, Any] = {"length": length}
        for side in a.sides.split(","):
            row[side] = _in_a_process(a, side, length)
            print(f"{length} {side}: {row[side]}", flush=True)
        results.append(row)
    report(a, results)


def _in_a_process(a: argparse.Namespace, side: str, length: int) -> dict[str, Any]:
    flags = [f"--{k}={getattr(a, k)}" for k in ("hf", "answer", "short", "turns", "dtype", "threads", "steps")]
    flags += ["--independent"] * a.independent + ["--recompute"] * a.recompute
    environment = {**os.environ, "OMP_NUM_THREADS": str(a.threads)}
    command = [sys.executable, __file__, *flags, f"--lengths={length}", f"--side={side}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        sys.exit(f"error: the {side} side failed at length {length}: {done.stderr[-2000:]}")
    return dict(json.loads(lines[0].removeprefix("RESULT ")))


# --------------------------------------------------------------------------------------------------
# The rows
# --------------------------------------------------------------------------------------------------


def make_sample(a: argparse.Namespace, length: int, vocab_size: int) -> Any:
    """One sample of random tokens whose long rows have ``length`` tokens."""
    from megatron_longpo.data import preference as p

    rng = np.random.default_rng(length)

    def tokens(n: int) -> np.ndarray:
        return rng.integers(3, vocab_size, n).astype(np.int64)

    prompt = 16
    document = tokens(length - a.turns * (prompt + a.answer) if not a.independent else length - prompt - a.answer)
    pieces = [p.Piece(document, p.CONTEXT)]
    for turn in range(a.turns):
        question = tokens(prompt)
        pieces.append(p.Piece(question, p.PROMPT))
        if turn:
            pieces.append(p.Piece(question, p.Mode.OWN_PROMPT))
        answers = [tokens(a.answer), tokens(a.answer)]
        pieces += [p.Piece(answers[0], p.CHOSEN_RESPONSE), p.Piece(answers[1], p.REJECTED_RESPONSE)]
        start = int(rng.integers(0, max(1, len(document) - a.short)))
        pieces.append(p.Piece(np.concatenate([document[start : start + a.short], question]), p.SHORT_PROMPT))
        pieces += [p.Piece(answers[0], p.SHORT_CHOSEN_RESPONSE), p.Piece(answers[1], p.SHORT_REJECTED_RESPONSE)]
    return p.Sample(tuple(pieces))


def peak_gb() -> float:
    """Largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# --------------------------------------------------------------------------------------------------
# Ours
# --------------------------------------------------------------------------------------------------


def ours(a: argparse.Namespace, length: int) -> dict[str, Any]:
    """Our trainer's own step; the reference's cost is that of scoring the sample once."""
    import torch

    from megatron_longpo import parallel as parallel_module
    from megatron_longpo.checkpoint.convert import import_hf
    from megatron_longpo.config import from_dict
    from megatron_longpo.data.indexed import Manifest, SampleWriter
    from megatron_longpo.trainer import Trainer, groups_of, make_plan

    torch.set_num_threads(a.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = import_hf(a.hf, folder / "ckpt").shape
        sample = make_sample(a, length, shape.vocab_size)
        manifest = Manifest(shape.vocab_size, "int32", None, None, None, independent_turns=True)
        writer = SampleWriter(folder / "data", manifest, "benchmark")
        writer.add(sample)
        writer.finish()
        config = from_dict(
            {
                "data": {"data_path": str(folder / "data"), "turns": "independent" if a.independent else "chained"},
                "training": {
                    "global_batch_size": 1,
                    "train_iters": 100,
                    "bf16": a.dtype == "bfloat16",
                    "recompute_granularity": "full" if a.recompute else None,
                },
                "optimizer": {"optimizer": "rmsprop", "lr": 1e-9, "lr_decay_style": "constant"},
                "checkpoint": {"load": str(folder / "ckpt")},
            },
            "benchmark",
        )
        parallel_module.start_processes(30)
        plan = make_plan(config, 1)
        trainer = Trainer(plan, groups_of(plan))
        first = trainer.train_step()
        scoring = _timed(lambda: _score_again(trainer))
        records = [trainer.train_step() for _ in range(a.steps)]
        breakdown = _breakdown(trainer)
        step = float(np.median([r["step_seconds"] for r in records]))
        return {
            "seconds": step + scoring,
            "step_seconds": step,
            "reference_seconds": scoring,
            "peak_gb": peak_gb(),
            "loss": first["loss"],
            "breakdown": breakdown,
        }


def _timed(action: Callable[[], Any]) -> float:
    began = time.monotonic()
    action()
    return time.monotonic() - began


def _score_again(trainer: Any) -> None:
    from megatron_longpo.model.gpt import inverse_frequencies
    from megatron_longpo.reference import score

    score(
        [trainer.data[0]],
        scope="short",
        model=trainer.chunks,
        inverse_frequencies=inverse_frequencies(trainer.plan.shape, trainer.plan.shape.rotary_base),
        shape=trainer.plan.shape,
        parallel=trainer.parallel,
        max_tokens=16384,
    )


_PARTS = {
    "attention": ("_BlockAttention", "_GatheredAttention"),
    "log-probs": ("_TokenLogprobs",),
    "linear layers": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::matmul"),
    "norms": ("_RMSNormFunction",),
    "communication": ("c10d::", "gloo:", "nccl:"),
    "optimizer": ("Optimizer.step", "megatron_longpo::optimizer"),
}


def _breakdown(trainer: Any) -> dict[str, float]:
    """Share of a profiled step's time by part; each moment counts for the outermost named part that it is in."""
    from torch.profiler import ProfilerActivity, profile, record_function

    original = trainer.optimizer.step

    def step() -> Any:
        with record_function("megatron_longpo::optimizer"):
            return original()

    trainer.optimizer.step = step
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        seconds = trainer.train_step()["step_seconds"]
    trainer.optimizer.step = original
    totals = dict.fromkeys(_PARTS, 0.0)
    named = 0.0

    def walk(event: Any) -> None:
        nonlocal named
        for part, names in _PARTS.items():
            if any(event.name.startswith(n) for n in names):
                totals[part] += event.cpu_time_total / 1e6
                named += event.cpu_time_total / 1e6
                return
        for child in event.cpu_children:
            walk(child)

    for event in prof.events():
        if event.cpu_parent is None:
            walk(event)
    totals["element-wise and the rest"] = max(0.0, seconds - named)
    return {part: value / seconds for part, value in totals.items()}


# --------------------------------------------------------------------------------------------------
# The authors'
# --------------------------------------------------------------------------------------------------


def authors(a: argparse.Namespace, length: int) -> dict[str, Any]:
    """The released code's step, from its description, on plain Hugging Face."""
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM

    from megatron_longpo.data.preference import Mode, long_rows, short_rows

    torch.set_num_threads(a.threads)
    dtype = getattr(torch, a.dtype)

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(a.hf, dtype=dtype, attn_implementation="sdpa")

    policy, reference = load(), load().eval().requires_grad_(False)
    policy.train()
    policy.gradient_checkpointing_enable()
    policy.config.use_cache = False
    sample = make_sample(a, length, policy.config.vocab_size)
    optimizer = torch.optim.RMSprop(policy.parameters(), lr=1e-9)

    def batch(rows: list[Any]) -> tuple[Any, Any, Any]:
        """Padded ids, attention mask and answer mask."""
        width = max(len(r.tokens_L) for r in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        answers = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, row in enumerate(rows):
            n = len(row.tokens_L)
            ids[i, :n], mask[i, :n] = torch.from_numpy(row.tokens_L), 1
            answers[i, :n] = torch.from_numpy(row.response_L >= 0)
        return ids, mask, answers

    def token_logps(model: Any, ids: Any, mask: Any) -> Any:
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        return F.log_softmax(logits, dim=-1).gather(2, ids[:, 1:, None])[..., 0]

    long = batch(long_rows(sample, slot=0, turns="chained", nll_scope="sequence", sides=(Mode.CHOSEN, Mode.REJECTED)))
    shorts = short_rows(sample, slot=0)
    short = [batch(shorts[i : i + 2]) for i in range(0, len(shorts), 2)]

    def step() -> float:
        ids, mask, answers = long
        logps = token_logps(policy, ids, mask)
        sums = (logps * answers[:, 1:]).sum(1)
        nll = -(logps[0] * mask[0, 1:]).sum() / mask[0, 1:].sum()
        with torch.no_grad():
            ref = sum((token_logps(reference, i, m) * s[:, 1:]).sum(1) for i, m, s in short)
        margin = 0.1 * ((sums[0] - ref[0]) - (sums[1] - ref[1]))
        loss = 0.01 * -F.logsigmoid(margin) + nll
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    loss = step()
    seconds = float(np.median([_timed(step) for _ in range(a.steps)]))
    return {"seconds": seconds, "peak_gb": peak_gb(), "loss": loss}


# --------------------------------------------------------------------------------------------------
# Report
# --------------------------------------------------------------------------------------------------


def report(a: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """OUTPUT.json, a table in OUTPUT.md and a plot in OUTPUT.png."""
    cpu = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), ""
    )
    lines = [
        f"{machine.system()} {machine.machine()}, {cpu}, {a.threads} threads, {a.dtype}, answers of {a.answer} tokens, "
        f"{a.turns} turn(s){', independent' if a.independent else ''}",
        "",
        "| tokens | ours s | of it reference s | authors s | ratio | ours GB | authors GB | ratio | loss ours | loss authors |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results:
        o, t = row.get("ours"), row.get("authors")
        cells = [str(row["length"])]
        cells += [f"{o['seconds']:.1f}", f"{o['reference_seconds']:.1f}"] if o else ["", ""]
        cells += [f"{t['seconds']:.1f}" if t else "", f"{o['seconds'] / t['seconds']:.2f}" if o and t else ""]
        cells += [f"{o['peak_gb']:.1f}" if o else "", f"{t['peak_gb']:.1f}" if t else ""]
        cells += [f"{o['peak_gb'] / t['peak_gb']:.2f}" if o and t else ""]
        cells += [f"{o['loss']:.5f}" if o else "", f"{t['loss']:.5f}" if t else ""]
        lines.append("| " + " | ".join(cells) + " |")
    parts = [row["ours"]["breakdown"] for row in results if "ours" in row]
    if parts:
        lines += [
            "",
            "Our step by part:",
            "",
            "| tokens | " + " | ".join(parts[0]) + " |",
            "|---" * (len(parts[0]) + 1) + "|",
        ]
        for row in results:
            shares = " | ".join(f"{v:.0%}" for v in row["ours"]["breakdown"].values())
            lines.append(f"| {row['length']} | {shares} |")
    text = "\n".join(lines) + "\n"
    print(text)
    Path(f"{a.output}.md").write_text(text, encoding="utf-8")
    Path(f"{a.output}.json").write_text(json.dumps({"arguments": vars(a), "results": results}, indent=2) + "\n")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for axis, key, title in zip(axes, ("seconds", "peak_gb"), ("seconds a step", "peak memory, GB"), strict=True):
        for side in ("ours", "authors"):
            points = [(r["length"], r[side][key]) for r in results if side in r]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=side)
        axis.set(xlabel="tokens of a row", title=title, ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(f"{a.output}.png", dpi=80)


if __name__ == "__main__":
    main()
