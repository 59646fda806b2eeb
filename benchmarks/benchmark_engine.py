"""Measure the transformers engine against plain transformers: reading a prompt, and writing tokens after it.

    python benchmarks/benchmark_engine.py --model ./model --text ./essays --lengths 1024,4096,8192 --new-tokens 64

Both sides alternate in one run, on the same tokens, with greedy decoding. The plain side is ``generate`` on the model as
transformers loads it. On a CPU the two differ in attention and cache (``megatron_longpo/engines/cached_attention.py``).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_longpo.errors import DataError
from megatron_longpo.runtime import platform
from megatron_longpo.runtime.failure import run_or_fail
from megatron_longpo.text.documents import find_files, read_documents


def main() -> None:
    """Measure, print, and write JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--text", nargs="+", required=True, help="text files or folders")
    parser.add_argument("--lengths", default="1024,4096", help="prompt lengths in tokens, separated by commas")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--repeats", type=int, default=3, help="repetitions; the median is reported")
    parser.add_argument("--threads", type=int, help="threads of torch; default: its own choice")
    parser.add_argument("--output", help="JSON file")
    a = parser.parse_args()
    if a.threads:
        torch.set_num_threads(a.threads)

    from transformers import AutoModelForCausalLM

    from megatron_longpo.engines.base import Prompt, Sampling
    from megatron_longpo.engines.transformers_engine import TransformersEngine

    kind: Any = "auto" if a.dtype == "auto" else getattr(torch, a.dtype)
    plain = AutoModelForCausalLM.from_pretrained(
        a.model, dtype=kind, local_files_only=True, trust_remote_code=False
    ).eval()
    plain.to(platform.CURRENT.device)
    engine = TransformersEngine(a.model, dtype=a.dtype)
    end = plain.generation_config.eos_token_id
    ends = engine.tokenizer.answer_ends() | frozenset([end] if isinstance(end, int) else end or ())
    text = "\n".join(d.text for d in read_documents(find_files(tuple(a.text), "other"), "text"))
    tokens = engine.tokenizer.encode(text[: 8 * max(map(int, a.lengths.split(",")))], continues=False)

    results = []
    for length in map(int, a.lengths.split(",")):
        prompt = Prompt(({"role": "user", "content": engine.tokenizer.decode(tokens[: length - 40])},))
        row = engine.tokenizer.prompt(list(prompt.messages), prompt.prefix)
        ids = torch.tensor([row], device=plain.device)

        def ours(new: int, prompt: Prompt = prompt) -> tuple[int, str]:
            ((reply,),) = engine.answer([[prompt]], Sampling(new))
            # The token that ends an answer is computed as well.
            return reply.new_tokens + reply.finished, reply.text

        def theirs(new: int, ids: torch.Tensor = ids) -> tuple[int, str]:
            with torch.inference_mode():
                out = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
            written = out[0, ids.shape[1] :].tolist()
            kept = [t for t in written if t not in ends]
            return len(written), engine.tokenizer.decode(kept).strip()

        ours(2)
        theirs(2)
        result = measure({"ours": ours, "plain": theirs}, a.new_tokens, a.repeats)
        results.append({"length": len(row), **result})
        print(
            f"{len(row)} tokens: read in {result['read']['ours']:.2f} s against {result['read']['plain']:.2f}, ratio "
            f"{result['read']['ratio']:.2f}; then {1000 * result['token']['ours']:.0f} ms per token against "
            f"{1000 * result['token']['plain']:.0f}, ratio {result['token']['ratio']:.2f}; "
            + ("the same answer" if result["same"] else "different answers, as can happen in bf16"),
            flush=True,
        )
    if a.output:
        Path(a.output).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def measure(sides: dict[str, Callable[[int], tuple[int, str]]], new_tokens: int, repeats: int) -> dict[str, Any]:
    """Measure the seconds to read a prompt and write its first token, the seconds per later token, and the ratios ours to plain.

    Args:
        sides: by name, a function that writes at most a given number of tokens and returns their number and the text.
        new_tokens: tokens to write after the first one.
        repeats: repetitions; medians are taken.

    Raises:
        DataError: the answer of a side ends with its first token.
    """
    seconds: dict[tuple[str, int], list[float]] = {(name, n): [] for name in sides for n in (1, 1 + new_tokens)}
    written: dict[str, tuple[int, str]] = {}
    for _ in range(repeats):
        for (name, count), found in seconds.items():
            began = time.monotonic()
            written[name] = sides[name](count)
            found.append(time.monotonic() - began)
    fewest = min(count for count, _ in written.values())
    if fewest < 2:
        raise DataError(f"an answer has {fewest} tokens, too few to time; give another --text")
    median = {key: statistics.median(found) for key, found in seconds.items()}
    read = {name: median[name, 1] for name in sides}
    token = {name: (median[name, 1 + new_tokens] - median[name, 1]) / (written[name][0] - 1) for name in sides}
    return {
        "read": {**read, "ratio": read["ours"] / read["plain"]},
        "token": {**token, "ratio": token["ours"] / token["plain"]},
        "same": len({text for _, text in written.values()}) == 1,
    }


if __name__ == "__main__":
    run_or_fail(main)
