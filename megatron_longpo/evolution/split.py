"""Which pairs are held out, drawn by document: the samples of one document are on one side."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_longpo.errors import DataError, one_line
from megatron_longpo.runtime.files import check_checksum, checksum_path, open_regular, sha256_of, write_checksum
from megatron_longpo.runtime.json_lines import OWN_LINES
from megatron_longpo.runtime.log import log
from megatron_longpo.runtime.reading import parse_json, read_lines

# What generation appends to a document's name: the beginning of its part's id.
_PART = re.compile(r"-[0-9a-f]{12}\Z")


def split_pairs(pairs: Path, train: Path, held_out: Path | None, *, fraction: float, seed: int) -> None:
    """Divide a preference JSONL; the order of the lines stays.

    Args:
        pairs: the file.
        train: where the samples to train on go.
        held_out: where the others go; None if there are to be none.
        fraction: fraction of the documents that are held out; at least one is, and at least one is not.
        seed: seed of the draw.

    Raises:
        DataError: there are no samples, or those of a single document with ``held_out``.
    """
    check_checksum(pairs, sha256_of(pairs))
    documents: dict[str, int] = {}
    for line in _lines(pairs):
        name = _document(pairs, line)
        documents[name] = documents.get(name, 0) + 1
    if not documents:
        raise DataError(
            f"{pairs}: holds no sample; see {pairs}.report/report.html for why, and change generate's settings"
        )
    if held_out is not None and len(documents) < 2:
        raise DataError(
            f"{pairs}: all samples are of one document, so none can be held out; add documents, or set "
            "evolve.held_out_fraction to 0"
        )
    drawn = sorted(documents, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    count = 0 if held_out is None else min(len(drawn) - 1, max(1, round(fraction * len(drawn))))
    aside = set(drawn[:count])
    _write(pairs, train, keep=lambda name: name not in aside)
    if held_out is not None:
        _write(pairs, held_out, keep=lambda name: name in aside)
    samples = sum(documents[name] for name in aside)
    log(f"{sum(documents.values()) - samples} samples to train on, {samples} of {count} documents held out")


def _lines(pairs: Path) -> Iterator[bytes]:
    with open_regular(pairs) as stream:
        for number, line in enumerate(read_lines(stream, OWN_LINES), 1):
            if line.too_long:
                raise DataError(f"{pairs}: line {number}: {line.too_long}; generate the pairs again")
            yield line.raw


def _document(pairs: Path, line: bytes) -> str:
    try:
        name = parse_json(line)["id"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{pairs}: a line has no id ({one_line(error)}); generate the pairs again") from None
    return _PART.sub("", str(name))


def _write(source: Path, target: Path, keep: Callable[[str], bool]) -> None:
    temporary = target.with_name(f"{target.name}.tmp")
    with open(temporary, "wb") as output:
        for line in _lines(source):
            if keep(_document(source, line)):
                output.write(line)
        output.flush()
        os.fsync(output.fileno())
    # First, so that the file never stands beside the checksum of another one.
    checksum_path(target).unlink(missing_ok=True)
    os.replace(temporary, target)
    write_checksum(target, sha256_of(target))
