"""Measure what sharing a haystack saves: the questions of a needle map, with texts read once or for every question.

    python benchmarks/benchmark_evaluate.py --model ./model --haystack ./essays --length 4096 --depths 11 --trials 2

Both sides alternate in one run, with the same prompts and greedy decoding, and their answers are compared. The other side reads
each prompt from its beginning, one at a time. ``--haystack-kind single`` measures the classic map, in which each question has
its own text and prompts share only what precedes the needle.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any, get_args

from megatron_longpo.evaluation.materials import read_materials
from megatron_longpo.evaluation.runner import prompt_of
from megatron_longpo.evaluation.samples import EvalSample
from megatron_longpo.evaluation.scoring import SCORERS
from megatron_longpo.evaluation.suites.base import count_prompt
from megatron_longpo.evaluation.suites.needle import MAX_TOKENS, Haystack, NeedleMap
from megatron_longpo.runtime.failure import run_or_fail


def main() -> None:
    """Measure, print, and write JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--haystack", nargs="+", required=True, help="text files or folders")
    parser.add_argument("--length", type=int, default=4096, help="tokens per prompt")
    parser.add_argument("--depths", type=int, default=11)
    parser.add_argument("--trials", type=int, default=2, help="number of haystacks")
    parser.add_argument("--haystack-kind", choices=get_args(Haystack), default="shared")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batch-size", type=int, default=11, help="questions on one text that are decoded together")
    parser.add_argument("--output", help="JSON file")
    a = parser.parse_args()

    from megatron_longpo.engines.base import Sampling
    from megatron_longpo.engines.transformers_engine import TransformersEngine

    materials = read_materials(a.haystack, None)
    engines = {
        "shared": TransformersEngine(a.model, dtype=a.dtype, batch_size=a.batch_size, keep_prefix=True),
        "one by one": TransformersEngine(a.model, dtype=a.dtype, batch_size=1),
    }
    count = partial(count_prompt, engines["shared"])
    needles = NeedleMap(materials, count, seed=1234, depths=a.depths, kind=a.haystack_kind)
    seconds = dict.fromkeys(engines, 0.0)
    texts: dict[str, list[str]] = {name: [] for name in engines}
    samples: list[EvalSample] = []
    for trial in range(a.trials):
        groups = sorted(needles.trial(a.length, trial), key=lambda g: g[0].message)
        samples += [s for group in groups for s in group]
        for name, engine in engines.items():
            alone = [[s] for group in groups for s in group]
            calls = [[g] for g in alone] if name == "one by one" else [groups]
            began = time.monotonic()
            replies = [
                reply
                for call in calls
                for group in engine.answer([[prompt_of(s) for s in g] for g in call], Sampling(MAX_TOKENS))
                for reply in group
            ]
            seconds[name] += time.monotonic() - began
            texts[name] += [r.text for r in replies]
            print(f"haystack {trial + 1} of {a.trials}, {name}: {seconds[name]:.1f} s so far", flush=True)
    same = sum(x == y for x, y in zip(*texts.values(), strict=True))
    scores = {
        name: sum(SCORERS[s.scorer](t, s.references) for s, t in zip(samples, found, strict=True)) / len(samples)
        for name, found in texts.items()
    }
    result: dict[str, Any] = {
        "length": a.length,
        "questions": len(samples),
        "haystacks": a.haystack_kind,
        "seconds": seconds,
        "ratio": seconds["one by one"] / seconds["shared"],
        "same_answers": same,
        "found": scores,
    }
    print(
        f"{len(samples)} questions at {a.length} tokens: {seconds['shared']:.1f} s shared, {seconds['one by one']:.1f} s one by "
        f"one: {result['ratio']:.2f} times as fast; {same} identical answers; found {scores['shared']:.2f} and "
        f"{scores['one by one']:.2f}"
    )
    if a.output:
        Path(a.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_or_fail(main)
