"""Measure token log-probs without logits against a plain matmul and cross entropy: time, and memory beyond inputs and results.

    python benchmarks/benchmark_logprobs.py --tokens 1024 --vocab-size 152064 --hidden-size 1536      # both sides, ratio
    python benchmarks/benchmark_logprobs.py --tokens 16384 --vocab-size 152064 --hidden-size 1536 --sides ours

``ours`` knows the gradient of all tokens but the last 128 in advance, as in a LongPO row with the NLL over the sequence;
``ours-untold`` knows none, as in DPO. ``plain`` keeps all logits.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from common import describe_machine, peak_gb, reset_peak


def main() -> None:
    """Run each side in a process of its own and print the table."""
    parser = argparse.ArgumentParser(
        prog="benchmark_logprobs.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocab-size", type=int, default=152064)
    parser.add_argument("--hidden-size", type=int, default=1536)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sides", default="ours,ours-untold,plain")
    parser.add_argument("--output", help="file that the table is also written to")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.side:
        print("RESULT " + json.dumps(measure(a)))
        return
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in vars(a).items() if k not in ("sides", "side", "output")]
    results: dict[str, dict[str, float]] = {}
    for side in a.sides.split(","):
        environment = {**os.environ, "OMP_NUM_THREADS": str(a.threads), "THP_MEM_ALLOC_ENABLE": "1"}
        command = [sys.executable, __file__, *flags, f"--side={side}"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not lines:
            sys.exit(f"error: {side} failed: {done.stderr[-2000:]}")
        results[side] = json.loads(lines[0].removeprefix("RESULT "))
    lines = [
        f"{describe_machine()}; {a.threads} threads, {a.dtype}; {a.tokens} tokens x {a.vocab_size} vocabulary, hidden "
        f"{a.hidden_size}",
        "",
        "| | forward and backward s | ratio to plain | memory beyond inputs and results MB |",
        "|---|---|---|---|",
    ]
    for side, r in results.items():
        ratio = f"{r['seconds'] / results['plain']['seconds']:.2f}" if "plain" in results else ""
        lines.append(f"| {side} | {r['seconds']:.2f} | {ratio} | {r['extra_mb']:.0f} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if a.output:
        Path(a.output).write_text(text, encoding="utf-8")


def measure(a: argparse.Namespace) -> dict[str, float]:
    """Measure seconds and extra memory of one side."""
    import torch
    import torch.nn.functional as F

    from megatron_longpo.model.logprobs import KnownGradients, token_logprobs

    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, a.dtype)
    hidden = torch.randn(a.tokens, a.hidden_size).to(dtype).requires_grad_()
    weight = (0.02 * torch.randn(a.vocab_size, a.hidden_size)).to(dtype).requires_grad_()
    target = torch.randint(0, a.vocab_size, (a.tokens,))
    upstream = torch.full((a.tokens,), -1.0 / a.tokens)
    known_grad = upstream.clone()
    known_grad[-128:] = torch.nan
    known = KnownGradients.of(known_grad)
    # As in training, ours accumulates into an fp32 buffer that already exists.
    main_grad = torch.zeros(weight.shape if a.side != "plain" else 0)
    result = torch.zeros_like(hidden)

    def step() -> None:
        hidden.grad = result
        result.zero_()
        if a.side == "plain":
            logits = hidden @ weight.t()
            F.cross_entropy(logits.float(), target).backward()
            weight.grad = None
        else:
            weight.main_grad = main_grad  # type: ignore[attr-defined]
            told = known if a.side == "ours" else None
            logps = token_logprobs(hidden, weight, target, vocab_size=a.vocab_size, known=told)
            logps.backward(upstream)
            weight.grad = None

    times = []
    step()
    before = reset_peak()
    for _ in range(a.repeats):
        began = time.monotonic()
        step()
        times.append(time.monotonic() - began)
    return {"seconds": sorted(times)[len(times) // 2], "extra_mb": (peak_gb() - before) * 1024}


if __name__ == "__main__":
    main()
