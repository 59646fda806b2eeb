"""Damage to the files of a checkpoint, drawn at random."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from megatron_longpo.runtime.files import HOLDER_FILE


def _file(folder: Path, rng: random.Random, *, least: int = 1) -> Path:
    """A file of a checkpoint; often one of those with the weights and states, which are most of it."""
    files = [
        p for p in sorted(folder.rglob("*")) if p.is_file() and p.stat().st_size >= least and p.name != HOLDER_FILE
    ]
    weights = [p for p in files if p.suffix == ".distcp"]
    return rng.choice(weights if weights and rng.random() < 0.5 else files)


def flip_bit_of(path: Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    at, bit = rng.randrange(len(content)), rng.randrange(8)
    content[at] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {at}"


def flip_bit(folder: Path, rng: random.Random) -> str:
    path = _file(folder, rng)
    return f"{flip_bit_of(path, rng)} of {path.relative_to(folder)} flipped"


def truncate(folder: Path, rng: random.Random) -> str:
    path = _file(folder, rng)
    size = rng.randrange(path.stat().st_size)
    path.write_bytes(path.read_bytes()[:size])
    return f"{path.relative_to(folder)} cut to {size} bytes"


def remove(folder: Path, rng: random.Random) -> str:
    path = _file(folder, rng)
    path.unlink()
    return f"{path.relative_to(folder)} removed"


def swap(folder: Path, rng: random.Random) -> str:
    """Two files change their names, or a file is that of another checkpoint of the run."""
    first = _file(folder, rng)
    others = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.read_bytes() != first.read_bytes()]
    older = [p for p in sorted(folder.parent.glob("iter_*")) if p.is_dir() and p.name < folder.name]
    same = older[-1] / first.relative_to(folder) if older else first
    if rng.random() < 0.5 and same.is_file() and same.read_bytes() != first.read_bytes():
        first.write_bytes(same.read_bytes())
        return f"{first.relative_to(folder)} is that of {same.relative_to(folder.parent).parts[0]}"
    other = rng.choice(others)
    contents = first.read_bytes(), other.read_bytes()
    first.write_bytes(contents[1])
    other.write_bytes(contents[0])
    return f"{first.relative_to(folder)} and {other.relative_to(folder)} swapped"


DAMAGES: dict[str, Callable[[Path, random.Random], str]] = {
    "bit flip": flip_bit,
    "truncation": truncate,
    "missing file": remove,
    "swapped files": swap,
}
