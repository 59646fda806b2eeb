"""A model generates its own short-to-long preference pairs from plain documents."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_longpo.failure import run_or_fail
from megatron_longpo.generation.pairs import PairSettings, TransformersEngine, make_pairs, read_documents


def main() -> None:
    """Parse, generate, report."""
    defaults = PairSettings()
    parser = argparse.ArgumentParser(prog="generate_preference_data.py", description=__doc__)
    parser.add_argument("--documents", required=True, nargs="+", help="text files, or folders of .txt and .md")
    parser.add_argument("--model", required=True, help="Hugging Face model folder")
    parser.add_argument("--output", required=True, help="preference JSONL")
    parser.add_argument("--context-tokens", type=int, default=defaults.context_tokens, help="documents are cut to this")
    parser.add_argument("--chunk-tokens", type=int, default=defaults.chunk_tokens, help="size of a chunk")
    parser.add_argument("--turns", type=int, default=defaults.turns, help="chunks a document")
    parser.add_argument("--answer-tokens", type=int, default=defaults.answer_tokens, help="most tokens of an answer")
    parser.add_argument("--max-documents", type=int, help="use the first so many documents")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    a = parser.parse_args()
    documents = list(read_documents(a.documents))[: a.max_documents]
    output = Path(a.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    counts = make_pairs(
        documents,
        TransformersEngine(a.model),
        output,
        PairSettings(
            context_tokens=a.context_tokens,
            chunk_tokens=a.chunk_tokens,
            turns=a.turns,
            answer_tokens=a.answer_tokens,
            seed=a.seed,
        ),
        log=lambda line: print(line, flush=True),
    )
    print(f"{output}: " + ", ".join(f"{count} {what}" for what, count in counts.items()))


if __name__ == "__main__":
    run_or_fail(main)
