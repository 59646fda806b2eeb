"""Random samples, and rows of both input schemas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_longpo.data.indexed import Manifest, SampleWriter
from megatron_longpo.data.preference import (
    CHOSEN_RESPONSE,
    CONTEXT,
    PROMPT,
    REJECTED_RESPONSE,
    SHORT_CHOSEN_RESPONSE,
    SHORT_PROMPT,
    SHORT_REJECTED_RESPONSE,
    Mode,
    Piece,
    Sample,
)
from tests.support.models import VOCABULARY
from tests.support.tokenizers import TEXT


def random_sample(rng: np.random.Generator, turns: int, *, context: int, vocab_size: int = VOCABULARY) -> Sample:
    """A sample of random tokens, structured as one made from text; the two answers of a turn sometimes begin alike."""

    def tokens(n: int) -> np.ndarray:
        return rng.integers(3, vocab_size, n).astype(np.int64)

    document = tokens(context)
    pieces = [Piece(document, CONTEXT)]
    for turn in range(turns):
        prompt = tokens(int(rng.integers(3, 9)))
        pieces.append(Piece(prompt, PROMPT))
        if turn:
            pieces.append(Piece(tokens(int(rng.integers(3, 9))), Mode.OWN_PROMPT))
        start = int(rng.integers(0, context // 2))
        chunk = document[start : start + context // 2]
        opening = tokens(int(rng.integers(0, 3)))
        answers = [np.concatenate([opening, tokens(int(rng.integers(2, 24))), [2]]) for _ in range(2)]
        pieces.append(Piece(answers[0], CHOSEN_RESPONSE))
        pieces.append(Piece(answers[1], REJECTED_RESPONSE))
        pieces.append(Piece(np.concatenate([chunk, prompt]), SHORT_PROMPT))
        pieces.append(Piece(answers[0], SHORT_CHOSEN_RESPONSE))
        pieces.append(Piece(answers[1], SHORT_REJECTED_RESPONSE))
    return Sample(tuple(pieces))


def write_data(prefix: Path, samples: Sequence[Sample], vocab_size: int = VOCABULARY) -> Path:
    """Write samples as indexed binaries."""
    manifest = Manifest(
        vocab_size=vocab_size,
        dtype="uint16",
        tokenizer=None,
        tokenizer_hash=None,
        template_hash=None,
        independent_turns=True,
    )
    writer = SampleWriter(prefix, manifest, "test")
    for sample in samples:
        writer.add(sample)
    writer.finish()
    return prefix


def make_data(
    prefix: Path, samples: int, seed: int = 0, longest: int = 150, weights: Sequence[float] | None = None
) -> Path:
    """Write random samples of one to three turns and unequal lengths."""
    rng = np.random.default_rng(seed)
    made = [random_sample(rng, 1 + i % 3, context=int(rng.integers(40, longest))) for i in range(samples)]
    return write_data(prefix, [replace(s, weight=w) for s, w in zip(made, weights or [1.0] * samples, strict=True)])


def tokenised_row() -> dict[str, object]:
    """A row of the tokenised schema, one turn, with padding in some of its columns."""
    return {
        "chosen_input_ids": [1, 2, 3, 20, 21, 0],
        "chosen_attention_mask": [1, 1, 1, 1, 1, 0],
        "chosen_labels": [-100, -100, -100, 20, 21, -100],
        "rejected_input_ids": [1, 2, 3, 20, 31],
        "rejected_labels": [-100, -100, -100, 20, 31],
        "ref_chosen_input_ids": [[2, 3, 20, 21]],
        "ref_chosen_labels": [[-100, -100, 20, 21]],
        "ref_rejected_input_ids": [[2, 3, 20, 31, 0]],
        "ref_rejected_attention_mask": [[1, 1, 1, 1, 0]],
        "ref_rejected_labels": [[-100, -100, 20, 31, -100]],
    }


def text_row(number: int = 0, turns: int = 1, **change: Any) -> dict[str, Any]:
    """A row of the text schema; its chunk is the beginning of the document."""
    turn = {
        "instruction": f"What is said {number}?",
        "short_context": TEXT[:60],
        "chosen": f"Yes {number}.",
        "rejected": "No.",
    }
    return {"id": str(number), "context": f"{number}. {TEXT}", "turns": [dict(turn) for _ in range(turns)], **change}


def write_lines(path: Path, lines: Sequence[str | bytes]) -> Path:
    """Write lines; bytes are written as they are, valid UTF-8 or not."""
    path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines))
    return path
