"""Indexed binaries: PREFIX.bin and PREFIX.idx as megatron-core's IndexedDataset reads them, and the manifest PREFIX.json.
If any sample has another weight than 1, PREFIX.weights.npy holds the weights, [samples] in fp64.

A document of the index is a sample, a sequence of it a piece, and the sequence's mode the role of the piece. The writer can be
killed at any moment and resumes after its last commit. The reader refuses files that do not fit their manifest, and names them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import shutil
import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

from megatron_longpo.data.preference import KNOWN_MODES, Mode, Sample
from megatron_longpo.errors import DataError, one_line
from megatron_longpo.runtime.files import HOLDER_FILE, link_atomically, open_regular, sha256_of, write_atomically
from megatron_longpo.runtime.reading import read_json
from megatron_longpo.schema import convert_fields

SCHEMA_VERSION = 1
# Header of an index: magic number, version, dtype code, number of sequences, number of documents plus one.
_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_INDEX_VERSION = 1
# After the header: length (int32), offset (int64) and mode (int8) of each sequence, end (int64) of each document.
_BYTES_PER_SEQUENCE = 4 + 8 + 1
_BYTES_PER_DOCUMENT = 8
# What a manifest can say: ids are at most 32-bit.
_MOST_IDS = 2**31
_DTYPES = ("uint16", "int32")
_BIN_DIGITS = 19
_BLOCK_BYTES = 2**22
# Lengths up to 2**9 share the first bin of the histogram.
_HISTOGRAM_FIRST = 9
# Names of fields in files, where they differ: in code "rejected" is the dispreferred answer only.
_IN_FILES = {"skip_reasons": "rejected"}
_IN_PYTHON = {in_file: name for name, in_file in _IN_FILES.items()}
# Fields that version 0.1 did not write; a manifest may lack them.
_ADDED_LATER = frozenset(
    (
        *(
            "chat_template",
            "chat_template_kwargs",
            "template_date",
            "system_prompt",
            "special_tokens",
            "answer_end_ids",
        ),
        *("rows", "samples_without_short", "weights_sha256"),
    )
)


@dataclass
class Manifest:
    """Content of PREFIX.json.

    Attributes:
        vocab_size: upper bound of the ids, exclusive.
        dtype: dtype of the stored ids.
        tokenizer, tokenizer_hash, template_hash: None if the input was already tokenised.
        samples, turns, tokens: counts; tokens as stored, shared ones once.
        longest, longest_short: longest long row and longest short row in tokens.
        length_histogram: upper bound of a power-of-two bin -> number of samples whose long row is in it.
        independent_turns: whether rows of independent turns can be made.
        skip_reasons: reason -> number of input lines or turns that were skipped; ``rejected`` in the file.
        source: input files with their sizes and hashes.
        settings: settings that the input was processed with.
        bin_bytes, bin_sha256, idx_sha256: size and checksums of the binaries.
        weights_sha256: checksum of PREFIX.weights.npy; empty if all weights are 1 and there is no such file.
        schema_version: version of this format.
        chat_template: source of the chat template that the rows were rendered with; None if the input was already tokenised, or
            in files of version 0.1.
        answer_end_ids: ids of the special tokens that the template puts directly after an answer, by which a model trained on
            the data ends its answers.
        chat_template_kwargs: arguments that every rendering passed to the template.
        template_date: the date that the template was told (YYYY-MM-DD); None if it asks for none.
        system_prompt: system message of the rows without one of their own, or None.
        special_tokens: text -> id of the tokenizer's special tokens.
        rows: rows of the input; each is a sample or was skipped as a whole. None in files of version 0.1.
        samples_without_short: samples without short rows, which objectives whose reference scores short rows cannot use.
    """

    vocab_size: int
    dtype: str
    tokenizer: str | None
    tokenizer_hash: str | None
    template_hash: str | None
    samples: int = 0
    turns: int = 0
    tokens: int = 0
    longest: int = 0
    longest_short: int = 0
    length_histogram: dict[str, int] = field(default_factory=dict)
    independent_turns: bool = False
    skip_reasons: dict[str, int] = field(default_factory=dict)
    source: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    bin_bytes: int = 0
    bin_sha256: str = ""
    idx_sha256: str = ""
    weights_sha256: str = ""
    schema_version: int = SCHEMA_VERSION
    chat_template: str | None = None
    answer_end_ids: list[int] = field(default_factory=list)
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    template_date: str | None = None
    system_prompt: str | None = None
    special_tokens: dict[str, int] = field(default_factory=dict)
    rows: int | None = None
    samples_without_short: int = 0

    def as_dict(self) -> dict[str, Any]:
        """All fields by the names that they have in files."""
        return {_IN_FILES.get(name, name): value for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, content: dict[str, Any], *, where: str, fix: str) -> Manifest:
        """What ``as_dict`` gave.

        Args:
            content: all fields by the names that they have in files.
            where: beginning of an error message.
            fix: end of an error message.

        Raises:
            DataError: an unknown key, or a value of the wrong type.
        """
        values = {_IN_PYTHON.get(name, name): value for name, value in content.items()}
        return cls(**convert_fields(cls, values, where, DataError, fix))

    @classmethod
    def combined(cls, manifests: Sequence[Manifest], weights: Sequence[float | None]) -> Manifest:
        """What can be said of several data sets together. Checksums are one, over those of all of them and their weights.

        Args:
            manifests: the manifests; of one it is the result.
            weights: weights of the data sets, or None.
        """
        if len(manifests) == 1:
            return manifests[0]
        parts = [[w, m.bin_sha256, m.idx_sha256, m.weights_sha256] for w, m in zip(weights, manifests, strict=True)]
        histogram, skipped = Counter[str](), Counter[str]()
        for manifest in manifests:
            histogram.update(manifest.length_histogram)
            skipped.update(manifest.skip_reasons)
        rows = [m.rows for m in manifests if m.rows is not None]
        # Template, tokenizer and what else must travel: of the first that was made from text.
        base = next((m for m in manifests if m.template_hash is not None), manifests[0])
        return dataclasses.replace(
            base,
            vocab_size=max(m.vocab_size for m in manifests),
            samples=sum(m.samples for m in manifests),
            turns=sum(m.turns for m in manifests),
            tokens=sum(m.tokens for m in manifests),
            longest=max(m.longest for m in manifests),
            longest_short=max(m.longest_short for m in manifests),
            length_histogram=dict(histogram),
            skip_reasons=dict(skipped),
            independent_turns=all(m.independent_turns for m in manifests),
            source=[file for m in manifests for file in m.source],
            bin_bytes=sum(m.bin_bytes for m in manifests),
            bin_sha256=_checksum(parts),
            idx_sha256="",
            weights_sha256="",
            rows=sum(rows) if len(rows) == len(manifests) else None,
            samples_without_short=sum(m.samples_without_short for m in manifests),
        )

    def as_json(self) -> bytes:
        """Content of the file: all fields and their checksum."""
        content = self.as_dict()
        return json.dumps({**content, "manifest_sha256": _checksum(content)}, indent=2).encode() + b"\n"

    def count(self, sample: Sample) -> None:
        """Add one sample to the counts."""
        long = sample.long_length
        self.samples += 1
        self.samples_without_short += not any(p.mode.short for p in sample.pieces)
        self.turns += sample.turns
        self.tokens += sum(len(p.tokens) for p in sample.pieces)
        self.longest = max(self.longest, long)
        for turn in sample.turn_pieces():
            for side in (Mode.SHORT_CHOSEN, Mode.SHORT_REJECTED):
                self.longest_short = max(self.longest_short, sum(len(p.tokens) for p in turn if p.mode & side))
        bin_ = str(2 ** max(_HISTOGRAM_FIRST, (long - 1).bit_length()))
        self.length_histogram[bin_] = self.length_histogram.get(bin_, 0) + 1


def token_dtype(vocab_size: int) -> str:
    """Name of the smallest dtype that holds every token id, by megatron-core's rule."""
    return np.dtype(DType.optimal_dtype(vocab_size)).name


def _checksum(content: dict[str, Any] | list[Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _progress_checksum(progress: dict[str, Any]) -> str:
    return _checksum({key: value for key, value in progress.items() if key != "progress_sha256"})


def path_of(prefix: str | Path, suffix: str) -> Path:
    """PREFIX.SUFFIX. ``Path.with_suffix`` would cut a prefix at its last dot."""
    return Path(f"{prefix}.{suffix}")


class SampleWriter:
    """Appends samples. After a kill, a new writer with the same fingerprint resumes from the last commit.

    Everything is in ``PREFIX.partial/`` until ``finish``.

    Args:
        prefix: path prefix of the outputs.
        manifest: manifest with source and settings; counts are added to it. When resuming, the partial output's replaces it.
        fingerprint: hash of everything that determines the output.
        restart: discard existing output, partial or finished.

    Raises:
        DataError: the output exists already, or a partial one has another fingerprint or is damaged.
    """

    def __init__(self, prefix: str | Path, manifest: Manifest, fingerprint: str, *, restart: bool = False) -> None:
        self.prefix = Path(prefix)
        self.manifest = manifest
        self.fingerprint = fingerprint
        self.folder = path_of(prefix, "partial")
        self.position: dict[str, int] = {}
        self.resumed = False
        if restart:
            _clear(self.folder)
            for suffix in ("json", "bin", "idx", "weights.npy", "rejects.jsonl"):
                path_of(prefix, suffix).unlink(missing_ok=True)
        is_begun = (self.folder / "progress.json").exists()
        if not is_begun:
            # Nothing was committed, or these are the remains of a finished output. They are removed, not truncated: a finished
            # output shares its files.
            _clear(self.folder)
        if path_of(prefix, "json").exists() and not is_begun:
            raise DataError(
                f"{path_of(prefix, 'json')}: exists already; choose another --output-prefix, or --restart to replace it"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        # CRC-32 of what was written to each file, which goes on where a killed writer stopped.
        self._checksums: dict[str, int] = {}
        self._read_progress()
        names = ("bin", "lengths", "modes", "documents", "weights", "rejects")
        self._files = {name: self._open(name) for name in names}
        self._pieces = self._size("lengths") // 4
        if self.manifest.samples != self._size("documents") // _BYTES_PER_DOCUMENT:
            raise DataError(
                f"{self.folder}: holds {self._size('documents') // _BYTES_PER_DOCUMENT} samples, but its progress.json says "
                f"{self.manifest.samples}; start again with --restart"
            )
        # Digest of each sample -> its number; made when it is first asked for.
        self._numbers: dict[bytes, int] | None = None
        # A partial output of an earlier commit has no weights yet.
        self._write_weights([1.0] * (self.manifest.samples - self._size("weights") // 8))

    def _size(self, name: str) -> int:
        return self._files[name].tell()

    def _open(self, name: str) -> BinaryIO:
        path = self.folder / name
        size = self._sizes.get(name, 0)
        if path.exists() and path.stat().st_size < size:
            raise DataError(
                f"{path}: has {path.stat().st_size} bytes, but {size} were committed; start again with --restart"
            )
        stream = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115
        checksum, left = 0, size
        while left and (block := stream.read(min(left, _BLOCK_BYTES))):
            checksum, left = zlib.crc32(block, checksum), left - len(block)
        # Version 0.1 recorded none.
        if checksum != self._checksums.setdefault(name, checksum):
            stream.close()
            raise DataError(f"{path}: does not have its checksum, so it is damaged; start again with --restart")
        # What was written after the last commit will be written again.
        stream.truncate(size)
        stream.seek(size)
        return stream

    def _write(self, name: str, raw: bytes) -> None:
        self._files[name].write(raw)
        self._checksums[name] = zlib.crc32(raw, self._checksums[name])

    def _read_progress(self) -> None:
        self._sizes: dict[str, int] = {}
        path = self.folder / "progress.json"
        if not path.exists():
            return
        try:
            progress = read_json(path)
            self._sizes = {str(k): int(v) for k, v in progress["sizes"].items()}
            self._checksums = {str(k): int(v) for k, v in progress.get("crc32", {}).items()}
            self.position = {str(k): int(v) for k, v in progress["position"].items()}
            manifest = Manifest.from_dict(progress["manifest"], where=f"{path}: ", fix="start again with --restart")
            fingerprint = progress["fingerprint"]
            if progress.get("progress_sha256") not in (None, _progress_checksum(progress)):
                raise ValueError("its checksum differs")
            problem = _problem(manifest) or ("a size is negative" if min(self._sizes.values(), default=0) < 0 else None)
            if problem is not None:
                raise ValueError(problem)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise DataError(f"{path}: cannot be read ({error}); start again with --restart") from None
        if fingerprint != self.fingerprint:
            raise DataError(
                f"{self.folder}: was started with another input or other settings; use those, or start again with --restart"
            )
        self.manifest = manifest
        self.resumed = True

    def add(self, sample: Sample) -> None:
        """Append one sample."""
        dtype = np.dtype(self.manifest.dtype)
        for piece in sample.pieces:
            self._write("bin", piece.tokens.astype(dtype).tobytes())
        self._write("lengths", np.array([len(p.tokens) for p in sample.pieces], np.int32).tobytes())
        self._write("modes", np.array([int(p.mode) for p in sample.pieces], np.int8).tobytes())
        self._pieces += len(sample.pieces)
        self._write("documents", struct.pack("<q", self._pieces))
        self._write_weights([sample.weight])
        self.manifest.count(sample)

    def _write_weights(self, weights: Sequence[float]) -> None:
        self._write("weights", np.array(weights, "<f8").tobytes())

    def duplicate_of(self, sample: Sample) -> int | None:
        """Number of an earlier sample with the same pieces, or None."""
        if self._numbers is None:
            self._numbers = {}
            for number, earlier in enumerate(self._written()):
                self._numbers.setdefault(_digest(earlier), number)
        number = self._numbers.setdefault(_digest(sample), self.manifest.samples)
        return number if number < self.manifest.samples else None

    def _written(self) -> Iterator[Sample]:
        """The samples that were written so far."""
        for stream in self._files.values():
            stream.flush()
        dtype = np.dtype(self.manifest.dtype)
        lengths = np.fromfile(self.folder / "lengths", np.int32)
        modes = np.fromfile(self.folder / "modes", np.int8)
        start = 0
        with open(self.folder / "bin", "rb") as stream:
            for end in np.fromfile(self.folder / "documents", np.int64).tolist():
                tokens = [np.frombuffer(stream.read(int(n) * dtype.itemsize), dtype) for n in lengths[start:end]]
                yield Sample.from_arrays(tokens, modes[start:end].tolist())
                start = end

    def skip(self, reason: str, record: dict[str, Any]) -> None:
        """Count an input line, or a turn of one, as skipped, and write down why."""
        self.manifest.skip_reasons[reason] = self.manifest.skip_reasons.get(reason, 0) + 1
        line = json.dumps({"reason": reason, **record}, ensure_ascii=False)
        self._write("rejects", line.encode("utf-8", errors="backslashreplace") + b"\n")

    def commit(self, position: dict[str, int]) -> None:
        """Make everything written so far survive a kill.

        Args:
            position: place in the input from which to resume.
        """
        self.position = position
        for stream in self._files.values():
            stream.flush()
            os.fsync(stream.fileno())
        progress = {
            "fingerprint": self.fingerprint,
            "position": position,
            "sizes": {name: stream.tell() for name, stream in self._files.items()},
            "crc32": self._checksums,
            "manifest": self.manifest.as_dict(),
        }
        progress["progress_sha256"] = _checksum(progress)
        write_atomically(self.folder / "progress.json", json.dumps(progress).encode())

    def finish(self) -> Manifest:
        """Write the index and the manifest; all files appear under their final names, the manifest last.

        Returns:
            The manifest, with its checksums.

        Raises:
            DataError: there is no sample.
        """
        self.commit(self.position)
        for stream in self._files.values():
            stream.close()
        if not self.manifest.samples:
            rejects = path_of(self.prefix, "rejects.jsonl")
            shutil.copyfile(self.folder / "rejects", rejects)
            shutil.rmtree(self.folder)
            raise DataError(
                f"no sample is left of the input (skipped: {_counts(self.manifest.skip_reasons)}); see {rejects}"
            )
        self._write_index(self.folder / "idx")
        self.manifest.bin_bytes = (self.folder / "bin").stat().st_size
        self.manifest.bin_sha256 = sha256_of(self.folder / "bin")
        self.manifest.idx_sha256 = sha256_of(self.folder / "idx")
        weights = np.fromfile(self.folder / "weights", "<f8")
        files = [("bin", "bin"), ("idx", "idx"), ("rejects", "rejects.jsonl")]
        if (weights != 1).any():
            np.save(self.folder / "weights.npy", weights)
            self.manifest.weights_sha256 = sha256_of(self.folder / "weights.npy")
            files.append(("weights.npy", "weights.npy"))
        # Hard links, so that an interrupted finish can start over from the partial folder.
        for name, suffix in files:
            link_atomically(self.folder / name, path_of(self.prefix, suffix))
        write_atomically(path_of(self.prefix, "json"), self.manifest.as_json())
        shutil.rmtree(self.folder)
        return self.manifest

    def close(self) -> None:
        """Close the files. The partial output stays for another writer."""
        for stream in self._files.values():
            stream.close()

    def _write_index(self, path: Path) -> None:
        dtype = np.dtype(self.manifest.dtype)
        lengths = np.fromfile(self.folder / "lengths", np.int32)
        modes = np.fromfile(self.folder / "modes", np.int8)
        ends = np.fromfile(self.folder / "documents", np.int64)
        pointers = np.zeros(len(lengths), np.int64)
        np.cumsum(lengths[:-1].astype(np.int64) * dtype.itemsize, out=pointers[1:])
        with open(path, "wb") as stream:
            code = DType.code_from_dtype(dtype.type)
            stream.write(_HEADER.pack(_MAGIC, _INDEX_VERSION, code, len(lengths), len(ends) + 1))
            for array in (lengths, pointers, np.concatenate([[0], ends]).astype(np.int64), modes):
                stream.write(array.tobytes())
            stream.flush()
            os.fsync(stream.fileno())


def _clear(folder: Path) -> None:
    """Remove what a folder holds, but not the folder: it may be locked."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name != HOLDER_FILE:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _digest(sample: Sample) -> bytes:
    """Digest of a sample's pieces; equal samples have equal ones."""
    digest = hashlib.blake2b(digest_size=16)
    for piece in sample.pieces:
        digest.update(struct.pack("<qb", len(piece.tokens), int(piece.mode)))
        digest.update(piece.tokens.astype(np.int64).tobytes())
    return digest.digest()


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{k} {v}" for k, v in sorted(counts.items())) or "nothing"


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


def read_manifest(prefix: str | Path) -> Manifest:
    """Read PREFIX.json.

    Raises:
        DataError: the file is missing, damaged or of another schema version, or a key is missing or of the wrong type.
    """
    path = path_of(prefix, "json")
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise DataError(
            f"{path}: there is no such file; --data-path takes the prefix that tools/preprocess_preference_data.py wrote"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); preprocess the data again") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: is not a manifest; preprocess the data again")
    if content.get("schema_version") != SCHEMA_VERSION:
        raise DataError(
            f"{path}: schema_version={content.get('schema_version')!r}, this version reads {SCHEMA_VERSION}; preprocess "
            "the data again"
        )
    checksum = content.pop("manifest_sha256", None)
    if checksum != _checksum(content):
        raise DataError(
            f"{path}: does not have the checksum that it names, so it was changed or damaged; preprocess the data again"
        )
    known = {_IN_FILES.get(f.name, f.name): f for f in dataclasses.fields(Manifest)}
    unknown, missing = sorted(set(content) - set(known)), sorted(set(known) - set(content) - _ADDED_LATER)
    if unknown or missing:
        raise DataError(
            f"{path}: unknown keys {unknown}, missing keys {missing}, so it was changed; preprocess the data again"
        )
    manifest = Manifest.from_dict(content, where=f"{path}: ", fix="preprocess the data again")
    if problem := _problem(manifest):
        raise DataError(f"{path}: {problem}; preprocess the data again")
    return manifest


def _problem(manifest: Manifest) -> str | None:
    """What no manifest can say, or None."""
    for name in (
        "samples",
        "turns",
        "tokens",
        "longest",
        "longest_short",
        "bin_bytes",
        "rows",
        "samples_without_short",
    ):
        if (getattr(manifest, name) or 0) < 0:
            return f"{name}={getattr(manifest, name)} is negative"
    if not 0 < manifest.vocab_size <= _MOST_IDS:
        return f"vocab_size={manifest.vocab_size} is not between 1 and {_MOST_IDS}"
    if manifest.dtype not in _DTYPES:
        return f"dtype={manifest.dtype} is not one of {', '.join(_DTYPES)}"
    if any(count < 0 for count in (*manifest.length_histogram.values(), *manifest.skip_reasons.values())):
        return "length_histogram or rejected has a negative count"
    if not all(key.isascii() and key.isdigit() and len(key) <= _BIN_DIGITS for key in manifest.length_histogram):
        return "length_histogram has a bin that is not a number of tokens"
    return None


@dataclass(frozen=True)
class _Index:
    """The arrays of an index.

    Attributes:
        lengths: tokens of each piece.
        pointers: place of each piece in the .bin file, in bytes.
        ends: number of the piece after each sample's last; the first entry is 0.
        modes: mode of each piece.
    """

    lengths: np.ndarray
    pointers: np.ndarray
    ends: np.ndarray
    modes: np.ndarray

    @classmethod
    def read(cls, content: bytes, pieces: int, ends: int) -> _Index:
        place = _HEADER.size
        arrays = []
        for dtype, count in ((np.int32, pieces), (np.int64, pieces), (np.int64, ends), (np.int8, pieces)):
            arrays.append(np.frombuffer(content, dtype, count, place))
            place += arrays[-1].nbytes
        return cls(*arrays)

    def problem(self, itemsize: int) -> str | None:
        """What cannot be in an index of samples, or None. A forged or damaged one could otherwise train on nothing."""
        starts = np.zeros(len(self.lengths), np.int64)
        np.cumsum(self.lengths[:-1].astype(np.int64) * itemsize, out=starts[1:])
        if not np.array_equal(self.pointers, starts):
            return "its pieces do not follow one another in the .bin file"
        if self.ends[0] != 0 or self.ends[-1] != len(self.lengths) or (np.diff(self.ends) <= 0).any():
            return "its samples are not one piece after the other"
        known = np.zeros(256, np.bool_)
        known[[int(mode) for mode in KNOWN_MODES]] = True
        if not known[self.modes.view(np.uint8)].all():
            return f"piece {int(np.argmin(known[self.modes.view(np.uint8)]))} has an unknown mode"
        for side in (Mode.CHOSEN, Mode.REJECTED):
            is_answer = (self.modes & int(side) != 0) & (self.modes & int(Mode.RESPONSE) != 0) & (self.lengths > 0)
            has_answer = np.add.reduceat(is_answer, self.ends[:-1]) > 0
            if not has_answer.all():
                return f"sample {int(np.argmin(has_answer))} has no {side.name.lower()} answer"  # type: ignore[union-attr]
        return None


class PreferenceData:
    """The samples of indexed binaries.

    Args:
        prefix: path prefix of the files.
        verify: check the checksum of PREFIX.bin, which reads the whole file. The checksum of PREFIX.idx is always checked.

    Attributes:
        weights: weight of each sample, [samples] in fp64.

    Raises:
        DataError: a file is missing, truncated, corrupted, or does not fit the manifest.
    """

    def __init__(self, prefix: str | Path, *, verify: bool = True) -> None:
        self.prefix = str(prefix)
        self.manifest = read_manifest(prefix)
        bin_, idx = path_of(prefix, "bin"), path_of(prefix, "idx")
        for path in (bin_, idx):
            if not path.exists():
                raise DataError(f"{path}: there is no such file; preprocess the data again")
            try:
                open_regular(path).close()
            except OSError as error:
                raise DataError(f"{path}: cannot be read ({error}); preprocess the data again") from None
        size = bin_.stat().st_size
        if size != self.manifest.bin_bytes:
            raise DataError(
                f"{bin_}: has {size} bytes, but its manifest says {self.manifest.bin_bytes}; copy it again or preprocess again"
            )
        if sha256_of(idx) != self.manifest.idx_sha256:
            raise DataError(f"{idx}: does not have the checksum of its manifest; copy it again or preprocess again")
        if verify and sha256_of(bin_) != self.manifest.bin_sha256:
            raise DataError(f"{bin_}: does not have the checksum of its manifest; copy it again or preprocess again")
        self._check_index(idx, size)
        self.weights = self._read_weights()
        self._dataset = IndexedDataset(self.prefix, multimodal=True)
        self._ends = self._dataset.document_indices

    def _read_weights(self) -> np.ndarray:
        samples = self.manifest.samples
        if not self.manifest.weights_sha256:
            return np.ones(samples)
        path = path_of(self.prefix, "weights.npy")
        try:
            with open_regular(path) as stream:
                content = stream.read()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error}); copy it again or preprocess again") from None
        if hashlib.sha256(content).hexdigest() != self.manifest.weights_sha256:
            raise DataError(f"{path}: does not have the checksum of its manifest; copy it again or preprocess again")
        try:
            weights = np.load(io.BytesIO(content), allow_pickle=False)
        except Exception as error:  # numpy raises a dozen kinds for a file that is not one of its own
            raise DataError(f"{path}: cannot be read ({one_line(error)}); preprocess the data again") from None
        if not isinstance(weights, np.ndarray) or weights.dtype != np.float64 or weights.shape != (samples,):
            raise DataError(f"{path}: does not hold {samples} weights in fp64; preprocess the data again")
        if not (np.isfinite(weights) & (weights >= 0)).all():
            raise DataError(f"{path}: holds a weight that is negative or not finite; preprocess the data again")
        if not weights.any():
            raise DataError(f"{path}: all weights are 0, so there is nothing to learn; give some rows another weight")
        return weights

    def _check_index(self, path: Path, bin_bytes: int) -> None:
        """Check the structure of the index. Its checksum fits already; this catches indices that other programs wrote."""
        content = path.read_bytes()
        if len(content) < _HEADER.size or not content.startswith(_MAGIC):
            raise DataError(f"{path}: does not begin like an index; preprocess the data again")
        _, version, code, pieces, documents = _HEADER.unpack_from(content)
        try:
            itemsize = DType.size(code)
        except (KeyError, ValueError):
            raise DataError(f"{path}: dtype code {code} is unknown; preprocess the data again") from None
        size = _HEADER.size + pieces * _BYTES_PER_SEQUENCE + documents * _BYTES_PER_DOCUMENT
        if version != _INDEX_VERSION or len(content) != size or documents < 2:
            raise DataError(f"{path}: is truncated or has no modes; preprocess the data again")
        lengths = np.frombuffer(content, np.int32, pieces, _HEADER.size)
        if int(lengths.astype(np.int64).sum()) * itemsize != bin_bytes or (len(lengths) and np.min(lengths) < 0):
            raise DataError(f"{path}: its lengths do not add up to the .bin file; preprocess the data again")
        if documents - 1 != self.manifest.samples:
            raise DataError(
                f"{path}: has {documents - 1} samples, but its manifest says {self.manifest.samples}; preprocess the data again"
            )
        if np.dtype(DType.dtype_from_code(code)).name != self.manifest.dtype:
            raise DataError(
                f"{path}: its dtype is not {self.manifest.dtype}, as its manifest says; preprocess the data again"
            )
        arrays = _Index.read(content, pieces, documents)
        if problem := arrays.problem(itemsize):
            raise DataError(f"{path}: {problem}; preprocess the data again")

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Sample:
        first, last = int(self._ends[index]), int(self._ends[index + 1])
        tokens, modes = self._dataset[first:last]
        # An id outside the vocabulary would only be noticed by the embedding, on the device, without a name.
        for ids in tokens:
            if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.manifest.vocab_size:
                raise DataError(
                    f"{path_of(self.prefix, 'bin')}: sample {index} holds an id outside 0..{self.manifest.vocab_size - 1}; "
                    "preprocess the data again"
                )
        return dataclasses.replace(Sample.from_arrays(tokens, modes), weight=float(self.weights[index]))

    def piece_lengths(self) -> np.ndarray:
        """Number of tokens of each piece, of all samples."""
        lengths: np.ndarray = self._dataset.sequence_lengths.astype(np.int64)
        return lengths

    def piece_modes(self) -> np.ndarray:
        """Mode of each piece, of all samples."""
        modes: np.ndarray = self._dataset.index.sequence_modes
        return modes

    def long_lengths(self) -> np.ndarray:
        """Number of tokens in the longer chained row of each sample, read from the index only."""
        lengths, modes = self.piece_lengths(), self.piece_modes()
        document = np.repeat(np.arange(len(self)), np.diff(self._ends))
        sides = [
            np.bincount(document, weights=lengths * ((modes & int(side)) != 0), minlength=len(self))
            for side in (Mode.CHOSEN, Mode.REJECTED)
        ]
        return np.maximum(*sides).astype(np.int64)
