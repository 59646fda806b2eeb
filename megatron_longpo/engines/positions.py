"""Positions that a model declares, against what it will be given."""

from __future__ import annotations

from pathlib import Path

from megatron_longpo.runtime.reading import read_json


def declared_positions(model: str) -> int | None:
    """``max_position_embeddings`` of a model folder, or None where there is none, as for a server's model."""
    try:
        return int(read_json(Path(model) / "config.json")["max_position_embeddings"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
