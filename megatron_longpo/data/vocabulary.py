"""Identifies the vocabulary of a tokenizer by one hash, whatever its file format."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from megatron_longpo.errors import DataError, one_line


def vocabulary_hash(vocabulary: dict[str, int]) -> str:
    """Hash of a vocabulary: pieces and their ids."""
    return hashlib.sha256(json.dumps(sorted(vocabulary.items()), ensure_ascii=True).encode()).hexdigest()


def sentencepiece_vocabulary(path: Path) -> dict[str, int]:
    """Pieces of a SentencePiece model and their ids."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return {processor.id_to_piece(i): i for i in range(processor.vocab_size())}


def folder_vocabulary(folder: Path) -> dict[str, int] | None:
    """Pieces and ids of the tokenizer in a folder (tokenizer.json, else tokenizer.model), or None if it has neither.

    Raises:
        DataError: it cannot be read.
    """
    for name, vocabulary_of in (("tokenizer.json", _fast_vocabulary), ("tokenizer.model", sentencepiece_vocabulary)):
        path = folder / name
        if path.is_file():
            try:
                return vocabulary_of(path)
            except Exception as error:  # tokenizers raises plain ones
                raise DataError(f"{path}: is not a tokenizer ({one_line(error)}); download the model again") from None
    return None


def folder_vocabulary_hash(folder: Path) -> str | None:
    """Hash of the tokenizer in a folder, or None if it has none.

    Raises:
        DataError: it cannot be read.
    """
    vocabulary = folder_vocabulary(folder)
    return None if vocabulary is None else vocabulary_hash(vocabulary)


def _fast_vocabulary(path: Path) -> dict[str, int]:
    from tokenizers import Tokenizer

    return dict(Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True))
