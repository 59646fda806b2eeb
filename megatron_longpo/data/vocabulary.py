"""Identifies the vocabulary of a tokenizer by one hash, whatever its file format."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path


def vocabulary_hash(vocabulary: dict[str, int]) -> str:
    """Hash of a vocabulary: pieces and their ids."""
    return hashlib.sha256(json.dumps(sorted(vocabulary.items()), ensure_ascii=True).encode()).hexdigest()


def sentencepiece_vocabulary(path: Path) -> dict[str, int]:
    """Pieces of a SentencePiece model and their ids."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return {processor.id_to_piece(i): i for i in range(processor.vocab_size())}


def folder_vocabulary_hash(folder: Path) -> str | None:
    """Hash of the tokenizer in a folder (tokenizer.json, else tokenizer.model), or None if it has neither."""
    fast = folder / "tokenizer.json"
    if fast.is_file():
        from tokenizers import Tokenizer

        return vocabulary_hash(Tokenizer.from_file(str(fast)).get_vocab(with_added_tokens=True))
    model = folder / "tokenizer.model"
    if model.is_file():
        return vocabulary_hash(sentencepiece_vocabulary(model))
    return None
