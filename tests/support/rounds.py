"""A small evolution: a tiny chat model, documents, and a YAML of rounds."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import yaml

from megatron_longpo.evolution.settings import merged
from tests.support.models import make_chat_model
from tests.support.tokenizers import WORDS, make_fast_tokenizer

DOCUMENTS = 8


def make_inputs(folder: Path) -> None:
    """A chat model of random weights, and documents."""
    make_fast_tokenizer(folder / "model")
    make_chat_model(folder / "model")
    rng = random.Random(0)
    (folder / "texts").mkdir()
    for number in range(DOCUMENTS):
        paragraphs = (" ".join(rng.choices(WORDS, k=rng.randint(20, 60))) + "." for _ in range(12))
        (folder / "texts" / f"{number:02d}.txt").write_text("\n\n".join(paragraphs))


def write_rounds(folder: Path, **changes: Any) -> Path:
    """Write FOLDER/rounds.yaml; the inputs need not exist for reading it.

    Args:
        folder: where model and texts are, and where the rounds go.
        changes: top-level keys, merged into the default ones (lists replace).
    """
    texts = str(folder / "texts")
    values = {
        "evolve": {"model": str(folder / "model"), "output": str(folder / "rounds"), "held_out_fraction": 0.25},
        "defaults": {
            "generate": {
                "documents": {
                    "documents": [texts],
                    "seq_length": 1200,
                    "min_chunk_tokens": 100,
                    "max_chunk_tokens": 300,
                    "min_document_tokens": 200,
                    "chunks_per_document": 1,
                    "overlong": "cut",
                },
                "questions": {"questions_per_chunk": 1, "question_pattern": "(.+)", "question_tokens": 12},
                "answers": {"answer_tokens": 16},
                "engine": {"dtype": "float32", "documents_at_once": 2},
                "filters": {
                    "keep_truncated": True,
                    "min_question_words": 0,
                    "max_quoted_words": 1.0,
                    "max_compression": 100.0,
                },
            },
            "train": {"training": {"train_iters": 2, "global_batch_size": 2}, "optimizer": {"lr": 1e-5}},
            "evaluate": {
                # The other suites refuse a model of random weights that does not answer.
                "evaluate": {"tasks": ["preference"]},
                "engine": {"dtype": "float32"},
            },
        },
        "rounds": [{"name": "first"}, {"name": "second"}],
    }
    path = folder / "rounds.yaml"
    path.write_text(yaml.safe_dump(merged(values, changes)))
    return path
