"""Measure what reading a document once saves: answers of several turns, with the document shared or read for each of them.

Both sides are the transformers engine with the same model, prompts and greedy decoding. On the shared side a document's keys and
values are computed once, and its turns are answered together. Can also measure documents per second of chunking and bookkeeping.

    python benchmarks/benchmark_generate.py --model MODEL --document-tokens 4096 --turns 4 --output generate
    python benchmarks/benchmark_generate.py --model MODEL --bookkeeping 100000 --workers 2 --output bookkeeping
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import random
import re
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

QUESTIONS = (
    "What is the main idea of the text?",
    "Which example does the author give, and what is it meant to show?",
    "What does the author advise against?",
    "How does the text end?",
    "Who is the text written for?",
    "What surprised the author?",
    "Which of the author's claims is the boldest?",
    "What happened first?",
)


def main() -> None:
    """Measure either the answers or the bookkeeping."""
    parser = argparse.ArgumentParser(
        prog="benchmark_generate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="chat model folder")
    parser.add_argument("--text", nargs="*", help="text files for the document (default: numbered sentences)")
    parser.add_argument("--document-tokens", type=int, default=4096)
    parser.add_argument("--turns", type=int, default=4, help=f"number of questions, at most {len(QUESTIONS)}")
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--repeats", type=int, default=3, help="repetitions of both sides, alternating; medians are reported"
    )
    parser.add_argument("--bookkeeping", type=int, metavar="N", help="measure cutting N synthetic documents instead")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--output", help="prefix of the result file OUTPUT.json")
    a = parser.parse_args()
    content = bookkeeping(a) if a.bookkeeping else reuse(a)
    if a.output:
        Path(f"{a.output}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def reuse(a: argparse.Namespace) -> dict[str, object]:
    """Measure shared documents against documents that are read from scratch."""
    import torch

    from megatron_longpo.engines.base import Prompt, Sampling
    from megatron_longpo.engines.transformers_engine import TransformersEngine
    from megatron_longpo.text.chat import user_message

    torch.set_num_threads(a.threads)
    engine = TransformersEngine(a.model, dtype=a.dtype, batch_size=a.turns)
    text = (
        "\n\n".join(Path(p).read_text(encoding="utf-8") for p in a.text)
        if a.text
        else " ".join(f"This is sentence {i} of a long text." for i in range(a.document_tokens))
    )
    ids = engine.tokenizer.encode(text, continues=False)[: a.document_tokens]
    document = engine.tokenizer.decode(ids)
    prompts = [Prompt((user_message(document, q),)) for q in QUESTIONS[: a.turns]]
    sampling = Sampling(a.answer_tokens)
    seconds: dict[str, list[float]] = {"shared": [], "from scratch": []}
    same = True
    # The first pass over that much memory is slower than later ones, and must not count for either side.
    engine.answer([prompts[:1]], Sampling(1))
    for _ in range(a.repeats):
        began = time.monotonic()
        (shared,) = engine.answer([prompts], sampling)
        seconds["shared"].append(time.monotonic() - began)
        began = time.monotonic()
        scratch = [engine.answer([[p]], sampling)[0][0] for p in prompts]
        seconds["from scratch"].append(time.monotonic() - began)
        same = same and [r.text for r in shared] == [r.text for r in scratch]
    medians = {k: float(np.median(v)) for k, v in seconds.items()}
    ratio = medians["from scratch"] / medians["shared"]
    print(
        f"{len(ids)} tokens, {a.turns} turns, answers of up to {a.answer_tokens}, {a.dtype}: shared {medians['shared']:.1f} s, "
        f"from scratch {medians['from scratch']:.1f} s, {ratio:.2f} times as fast; same greedy answers: {'yes' if same else 'NO'}"
    )
    return {
        "seconds": seconds,
        "ratio": ratio,
        "same": same,
        "tokens": len(ids),
        "answers": [dataclasses.asdict(r) for r in shared],
    }


def bookkeeping(a: argparse.Namespace) -> dict[str, object]:
    """Measure documents per second of the documents stage, and memory growth from its first tenth to its end."""
    from megatron_longpo.engines.settings import EngineConfig
    from megatron_longpo.generation import pairs, stages
    from megatron_longpo.generation.settings import DocumentsConfig, GenerationConfig, RunConfig

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rng = random.Random(0)
        words = [f"{''.join(rng.choices('abcdefghijklmnopqrstuvwxyz', k=rng.randint(2, 9)))}" for _ in range(5000)]
        with open(folder / "documents.jsonl", "w", encoding="utf-8") as stream:
            for i in range(a.bookkeeping):
                paragraphs = [" ".join(rng.choices(words, k=40)) + f" {i}." for _ in range(12)]
                stream.write(json.dumps({"text": "\n\n".join(paragraphs)}) + "\n")
        config = GenerationConfig(
            documents=DocumentsConfig(
                documents=(str(folder / "documents.jsonl"),),
                seq_length=4096,
                min_document_tokens=256,
                max_document_tokens=3000,
                overlong="cut",  # type: ignore[arg-type]
                min_chunk_tokens=150,
                max_chunk_tokens=400,
                workers=a.workers,  # type: ignore[arg-type]
            ),
            engine=EngineConfig(model=a.model),
            run=RunConfig(output=str(folder / "out.jsonl")),
        )
        part = stages.part_folder(folder / "out.jsonl", 0, 1)
        part.mkdir(parents=True)
        stage = stages.Stage(part, "documents", {})
        early = 0.0
        original = stage.append

        def append(lines: list[dict[str, object]]) -> None:  # type: ignore[type-arg]
            nonlocal early
            original(lines)
            if not early and stage.records >= a.bookkeeping // 10:
                early = resident_gb()

        stage.append = append  # type: ignore[method-assign,assignment]
        began = time.monotonic()
        with contextlib.redirect_stdout(io.StringIO()):
            pairs.cut_documents(config, stage, 0, 1)
        seconds = time.monotonic() - began
        late = resident_gb()
        began = time.monotonic()
        chunks = sum(len(line.get("chunks", ())) for line in stages.read_lines(stage.path))
        reading = time.monotonic() - began
    rate = a.bookkeeping / seconds
    print(
        f"{a.bookkeeping} documents, {a.workers} worker(s): {seconds:.1f} s, {rate:,.0f} documents/s, {chunks} chunks; resident "
        f"{early:.2f} GB after a tenth, {late:.2f} GB at the end; read again in {reading:.1f} s"
    )
    return {"documents": a.bookkeeping, "seconds": seconds, "early_gb": early, "late_gb": late, "chunks": chunks}


def resident_gb() -> float:
    """Resident set of this process in GB (Linux)."""
    found = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 / 1e9 if found else float("nan")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
