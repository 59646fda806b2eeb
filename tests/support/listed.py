"""A checkpoint's files with checksums, of which only the names mean anything."""

from __future__ import annotations

from pathlib import Path

from megatron_longpo.checkpoint.checksums import hash_own_files, write_checksums

WEIGHTS = ("__0_0.distcp", "__1_0.distcp")
NAMES = tuple(sorted((*WEIGHTS, ".metadata", "common.pt", "metadata.json", "model.json")))


def make_listed(folder: Path) -> Path:
    """Write files of 1000 bytes each, as two ranks' checkpoint has them, and their checksums; the folder."""
    folder.mkdir(parents=True)
    for number, name in enumerate(NAMES):
        (folder / name).write_bytes(bytes([number]) * 1000)
    for writer in range(len(WEIGHTS)):
        hash_own_files(folder, writer)
    write_checksums(folder)
    return folder
