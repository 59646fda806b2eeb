"""The frozen reference in its four forms: cached, resident, swapped, or none.

``cached`` computes the log-probs once and keeps them beside the data. The online forms compute them in every step: ``resident``
with a second model, ``swapped`` with weights that wait in host memory and change places with the policy's.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_longpo.checkpoint.checksums import Verification
from megatron_longpo.data.indexed import PreferenceData
from megatron_longpo.errors import DataError, one_line
from megatron_longpo.model.gpt import PolicyModel, build_model
from megatron_longpo.model.rotary import rotary_of
from megatron_longpo.model.shape import ModelShape
from megatron_longpo.runtime import platform
from megatron_longpo.runtime.collectives import on_rank0
from megatron_longpo.runtime.files import FolderLock, holder_of, sha256_of, write_atomically
from megatron_longpo.runtime.log import log
from megatron_longpo.runtime.process_groups import Parallel
from megatron_longpo.runtime.progress import Progress
from megatron_longpo.runtime.reading import read_bytes, read_json
from megatron_longpo.training.checkpointer import load_weights
from megatron_longpo.training.data_set import DataSet
from megatron_longpo.training.plan import RunPlan
from megatron_longpo.training.reference_scoring import Scorer, ScoringWork

SCHEMA_VERSION = 1

# Samples per data x context rank between two writes of a partial cache.
_SAMPLES_PER_RANK = 8
# Sums of thousands of log-probs near zero may end a little above it.
_ROUNDING = 0.1
_DIGEST_BYTES = 32
_MOST_HEADER_BYTES = 2**16
_POLL_SECONDS = 2.0


class Reference(Protocol):
    """Log-probs of the frozen reference.

    Attributes:
        weights: name of the reference's weights, the same for the same weights; empty without a reference.
    """

    weights: str

    @property
    def work(self) -> ScoringWork:
        """What this rank had to do in the last ``logps``; nothing where log-probs are only looked up."""

    def prepare(self, data_sets: Sequence[DataSet], /) -> None:
        """Do what has to be done before the first step; collective. May take hours, and leaves any weights in the policy.

        Args:
            data_sets: data sets whose log-probs will be asked for.
        """

    def logps(self, data: DataSet, numbers: Sequence[int], /) -> np.ndarray | None:
        """[numbers, 2] log-probs of the chosen and the rejected responses in fp64, or None without a reference; collective.

        Args:
            data: one of the data sets that were prepared.
            numbers: samples of it, the same on every rank.
        """


def make_reference(plan: RunPlan, chunks: Sequence[PolicyModel], parallel: Parallel) -> Reference:
    """The reference that the configuration asks for; ``prepare`` has to be called before it is used.

    Args:
        plan: plan of the run.
        chunks: the policy's model chunks, which take the reference's weights while it is scored with them.
        parallel: degrees and groups.
    """
    if plan.objective.reference_rows is None:
        return NoReference()
    config = plan.config.reference
    weights = on_rank0(lambda: weights_fingerprint(plan.reference_load, plan.reference_shape))
    if config.reference == "cached":
        return CachedReference(plan, chunks, parallel, weights=weights)
    if config.reference_model == "resident":
        return ResidentReference(plan, parallel, weights=weights)
    return SwappedReference(plan, chunks, parallel, weights=weights)


class NoReference:
    """For objectives without a preference term, and losses that need no reference."""

    weights = ""
    work = ScoringWork()

    def prepare(self, _data_sets: Sequence[DataSet], /) -> None:
        pass

    def logps(self, _data: DataSet, _numbers: Sequence[int], /) -> None:
        return None


class CachedReference:
    """Log-probs of whole data sets, computed once with the policy's model before training begins and kept on disk."""

    work = ScoringWork()

    def __init__(self, plan: RunPlan, chunks: Sequence[PolicyModel], parallel: Parallel, *, weights: str) -> None:
        self.weights = weights
        self._plan, self._chunks, self._parallel = plan, chunks, parallel
        self._scorer = _make_scorer(plan, chunks, parallel)
        # Of each data set, as it is prepared.
        self._tables: dict[DataSet, np.ndarray] = {}
        # Of weights that are not loaded, because their log-probs were found.
        self._verification: Verification | None = None

    def prepare(self, data_sets: Sequence[DataSet]) -> None:
        for data in data_sets:
            # A cache per prefix: it serves the prefix in every mixture.
            self._tables[data] = np.concatenate([self._table_of(part) for part in data.parts])

    def _table_of(self, data: PreferenceData) -> np.ndarray:
        cache = cache_for(self._plan, data, self.weights)
        # In short waits, since ranks that wait in a collective for another run's hours would time out.
        while (state := on_rank0(cache.look)) == "busy":
            time.sleep(_POLL_SECONDS)
        return self._found_in(cache) if state == "found" else self._score(cache, data)

    def _found_in(self, cache: ReferenceCache) -> np.ndarray:
        table = on_rank0(cache.read)
        assert table is not None, "no other process writes it meanwhile"
        log(f"reference: log-probs of {len(table)} samples found in {cache.path}", active=self._parallel.rank == 0)
        if self._verification is None:
            self._verification = Verification(self._plan.reference_load)
        return table

    def _score(self, cache: ReferenceCache, data: PreferenceData) -> np.ndarray:
        log(f"reference: scoring {len(data)} samples once, into {cache.path}", active=self._parallel.rank == 0)
        load_weights(self._plan.reference_load, self._chunks, self._parallel)
        table = fill(cache, data, self._scorer)
        cache.release()
        return table

    def logps(self, data: DataSet, numbers: Sequence[int]) -> np.ndarray:
        if self._verification is not None:
            # Log-probs of these weights are of no use to a run that starts from them damaged.
            self._verification.wait()
        return self._tables[data][list(numbers)]


class ResidentReference:
    """A second model in memory."""

    def __init__(self, plan: RunPlan, parallel: Parallel, *, weights: str) -> None:
        self.weights = weights
        self._plan, self._parallel = plan, parallel
        self._chunks = build_model(plan.reference_shape, plan.config, parallel)
        self._scorer = _make_scorer(plan, self._chunks, parallel)

    def prepare(self, _data_sets: Sequence[DataSet], /) -> None:
        log("reference: online, a second model in memory", active=self._parallel.rank == 0)
        load_weights(self._plan.reference_load, self._chunks, self._parallel)

    def logps(self, data: DataSet, numbers: Sequence[int]) -> np.ndarray:
        return self._scorer.score(data.samples(numbers))

    @property
    def work(self) -> ScoringWork:
        return self._scorer.work


class SwappedReference:
    """Weights in host memory that change places with the policy's while the reference is scored."""

    def __init__(self, plan: RunPlan, chunks: Sequence[PolicyModel], parallel: Parallel, *, weights: str) -> None:
        self.weights = weights
        self._plan, self._chunks, self._parallel = plan, chunks, parallel
        self._scorer = _make_scorer(plan, chunks, parallel)
        self._frozen: list[list[Tensor]] = []

    def prepare(self, _data_sets: Sequence[DataSet], /) -> None:
        log("reference: online, its weights wait in host memory", active=self._parallel.rank == 0)
        load_weights(self._plan.reference_load, self._chunks, self._parallel)
        self._frozen = [[platform.CURRENT.host_copy(p) for p in chunk.parameters()] for chunk in self._chunks]

    def logps(self, data: DataSet, numbers: Sequence[int]) -> np.ndarray:
        with swapped_weights(self._chunks, self._frozen):
            return self._scorer.score(data.samples(numbers))

    @property
    def work(self) -> ScoringWork:
        return self._scorer.work


def _make_scorer(plan: RunPlan, chunks: Sequence[PolicyModel], parallel: Parallel) -> Scorer:
    assert plan.objective.reference_rows is not None
    return Scorer(
        model=chunks,
        rotary=rotary_of(plan.reference_shape, plan.reference_rotary_base),
        shape=plan.shape,
        rows=plan.objective.reference_rows,
        parallel=parallel,
        max_tokens=plan.config.reference.reference_max_tokens,
        prefix_sharing=plan.config.data.prefix_sharing,
    )


@contextmanager
def swapped_weights(chunks: Sequence[torch.nn.Module], weights: Sequence[Sequence[Tensor]]) -> Iterator[None]:
    """Inside this context the chunks hold other weights. They are copied in place, since the parameters must stay views of
    the buffers of DDP and of the optimizer. Meanwhile their own wait in host memory.

    On CUDA no copy is waited for: they run one after the other, as whatever uses the weights does.
    """
    own = [[platform.CURRENT.host_copy(p) for p in chunk.parameters()] for chunk in chunks]
    with torch.no_grad():
        _put(chunks, weights)
        try:
            yield
        finally:
            _put(chunks, own)


def _put(chunks: Sequence[torch.nn.Module], weights: Sequence[Sequence[Tensor]]) -> None:
    for chunk, values in zip(chunks, weights, strict=True):
        for p, value in zip(chunk.parameters(), values, strict=True):
            p.copy_(value, non_blocking=True)


# --------------------------------------------------------------------------------------------------
# Cache
# --------------------------------------------------------------------------------------------------


def weights_fingerprint(checkpoint: Path, shape: ModelShape) -> str:
    """Name of a checkpoint's weights: the hash taken when they were imported, or else a hash of the checkpoint's files."""
    if shape.weights_hash is not None:
        return shape.weights_hash
    digest = hashlib.sha256()
    for path in sorted(checkpoint.glob("*.distcp")):
        digest.update(path.name.encode() + sha256_of(path).encode())
    return digest.hexdigest()


class ReferenceCache:
    """Cached log-probs of a whole data set.

    ``FOLDER/HASH.json`` holds what they are log-probs of and the table's checksum, and ``FOLDER/HASH.npy`` the table,
    [samples, 2] in fp64. While it is computed, ``HASH.partial`` holds the values found so far and NaN elsewhere, then their
    checksum, so that an interrupted computation resumes. Releases before 0.2.0 wrote no checksums; their files stay readable.

    The process that computes a table holds a lock on the folder: runs that start together compute it once.

    Args:
        folder: folder of the cache.
        identity: everything that the log-probs depend on; HASH is made of it.
        num_samples: number of samples of the data set.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], num_samples: int) -> None:
        self.folder, self.num_samples = folder, num_samples
        self._lock: FolderLock | None = None
        self._waits = False
        self.identity = {"schema_version": SCHEMA_VERSION, **identity}
        text = json.dumps(self.identity, sort_keys=True)
        self.name = hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}.npy"

    @property
    def _most_bytes(self) -> int:
        """Most bytes of a file of a table: its values, and a header or a checksum."""
        return self.num_samples * 2 * 8 + _MOST_HEADER_BYTES

    def read(self) -> np.ndarray | None:
        """Read the whole table; None if there is none.

        Raises:
            DataError: the file is damaged.
        """
        if not self.path.exists():
            return None
        try:
            content = read_bytes(self.path, self._most_bytes)
            table = np.load(io.BytesIO(content), allow_pickle=False)
        except Exception as error:  # numpy raises a dozen kinds for a file that is not one of its own
            raise DataError(f"{self.path}: cannot be read ({one_line(error)}); remove it to compute it again") from None
        if not isinstance(table, np.ndarray) or table.shape != (self.num_samples, 2) or table.dtype != np.float64:
            held = f"{table.shape} of {table.dtype}" if isinstance(table, np.ndarray) else "no table"
            raise DataError(
                f"{self.path}: holds {held}, expected ({self.num_samples}, 2) of float64; remove it to compute it again"
            )
        expected = self._table_sha256()
        if expected is not None and hashlib.sha256(content).hexdigest() != expected:
            raise DataError(
                f"{self.path}: its checksum is not the one in {self.name}.json, so it is damaged; remove it to compute it again"
            )
        bad = first_implausible(table)
        if bad is not None:
            raise DataError(
                f"{self.path}: the log-probs of sample {bad} are {table[bad].tolist()}, but must be finite and not positive; "
                "remove it to compute it again"
            )
        return table

    def _table_sha256(self) -> str | None:
        """Checksum of the table; None: it was written before there were any."""
        path = self.folder / f"{self.name}.json"
        try:
            found = read_json(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path}: cannot be read ({one_line(error)}); remove it and {self.path.name} to compute them again"
            ) from None
        checksum = found.get("table_sha256") if isinstance(found, dict) else None
        return checksum if isinstance(checksum, str) else None

    def look(self) -> Literal["found", "free", "busy"]:
        """Whether the table is there; if not, whether this process may compute it: then it holds the folder until ``release``."""
        if self.path.exists():
            return "found"
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = FolderLock(self.folder, record=True)
        except DataError:
            if not self._waits:
                self._waits = True
                log(f"reference: waiting for {self.path}, which {holder_of(self.folder)} computes")
            return "busy"
        if self.path.exists():
            self.release()
            return "found"
        return "free"

    def release(self) -> None:
        """Give the folder up."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def partial(self) -> np.ndarray:
        """Values that an interrupted computation found; NaN elsewhere. Damaged values are left out."""
        path = self.folder / f"{self.name}.partial"
        table = np.full((self.num_samples, 2), np.nan)
        if not path.exists():
            return table
        try:
            content = read_bytes(path, self._most_bytes)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path}: cannot be read ({one_line(error)}); remove it to score all samples again"
            ) from None
        if len(content) == table.nbytes + _DIGEST_BYTES:
            content, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
            if hashlib.sha256(content).digest() != digest:
                log(f"{path}: is damaged (its checksum differs); all samples are scored again")
                return table
        # A file without a checksum, of an earlier release, or one that was cut.
        done = np.frombuffer(content[: len(content) // 16 * 16][: table.nbytes], np.float64)
        table.reshape(-1)[: len(done)] = done
        implausible = ~np.isnan(table) & ~((table <= _ROUNDING) & np.isfinite(table))
        if implausible.any():
            rows = implausible.any(axis=1)
            log(
                f"{path}: {int(rows.sum())} sample(s) have log-probs that are positive or infinite; they are scored again"
            )
            table[rows] = np.nan
        return table

    def write_partial(self, table: np.ndarray) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        content = np.ascontiguousarray(table).tobytes()
        write_atomically(self.folder / f"{self.name}.partial", content + hashlib.sha256(content).digest())

    def finish(self, table: np.ndarray) -> None:
        """Write the whole table, and what it holds."""
        self.folder.mkdir(parents=True, exist_ok=True)
        stream = io.BytesIO()
        np.save(stream, table, allow_pickle=False)
        content = stream.getvalue()
        description = {**self.identity, "table_sha256": hashlib.sha256(content).hexdigest()}
        write_atomically(self.folder / f"{self.name}.json", json.dumps(description, indent=2).encode() + b"\n")
        write_atomically(self.path, content)
        (self.folder / f"{self.name}.partial").unlink(missing_ok=True)


def first_implausible(table: np.ndarray) -> int | None:
    """First row of a table of log-probs, [samples, 2], with a value that is not finite or is positive; None: there is none."""
    bad = ~(np.isfinite(table) & (table <= _ROUNDING)).all(axis=1)
    return int(np.flatnonzero(bad)[0]) if bad.any() else None


def cache_for(plan: RunPlan, data: PreferenceData, weights: str) -> ReferenceCache:
    """The cache of a data set's log-probs under the reference of this plan.

    Args:
        plan: plan of the run.
        data: the data set.
        weights: name of the reference's weights.
    """
    config, shape = plan.config, plan.reference_shape
    identity: dict[str, Any] = {
        "weights": weights,
        "data": data.manifest.bin_sha256,
        "index": data.manifest.idx_sha256,
        "scope": plan.objective.reference_rows,
        "rotary_base": plan.reference_rotary_base,
        "dtype": "bfloat16" if config.training.bf16 else "float32",
    }
    # The same weights with another RoPE scaling or attention window are another reference. These two are named only if they
    # are set, so that caches made before they existed stay valid.
    if shape.rope_scaling:
        identity["rope_scaling"] = shape.rope_scaling
    if shape.window_size:
        identity["window_size"] = shape.window_size
    folder = Path(config.reference.reference_cache or f"{data.prefix}.reference")
    return ReferenceCache(folder, identity, len(data))


def fill(cache: ReferenceCache, data: PreferenceData, scorer: Scorer) -> np.ndarray:
    """Compute what a cache lacks, block by block; collective.

    Returns:
        The whole table, on every rank.

    Raises:
        DataError: a log-prob is not finite, or positive.
    """
    is_rank0 = scorer.parallel.rank == 0
    # Rank 0 decides what is left to do: other nodes may not see its disk.
    table = _broadcast_table(cache.partial() if is_rank0 else None, len(data))
    todo = np.flatnonzero(np.isnan(table).any(axis=1))
    found = len(data) - len(todo)
    if found:
        log(f"reference: {found} of {len(data)} samples were scored before", active=is_rank0)
    block = _SAMPLES_PER_RANK * scorer.parallel.dp_cp_size
    with Progress("reference", len(data), done=found, unit="samples", active=is_rank0) as progress:
        for start in range(0, len(todo), block):
            numbers = todo[start : start + block]
            table[numbers] = scorer.score([data[int(n)] for n in numbers])
            bad = first_implausible(table[numbers])
            if bad is not None:
                raise DataError(
                    f"the reference's log-probs of sample {int(numbers[bad])} are {table[numbers[bad]].tolist()}, but must be "
                    "finite and not positive; check the weights of the reference checkpoint"
                )
            if is_rank0:
                cache.write_partial(table)
            progress.add(len(numbers))
    if is_rank0:
        cache.finish(table)
    dist.barrier()
    return table


def _broadcast_table(table: np.ndarray | None, num_samples: int) -> np.ndarray:
    """Give all ranks the [num_samples, 2] table of rank 0."""
    holder = torch.from_numpy(np.zeros((num_samples, 2)) if table is None else table).to(platform.CURRENT.device)
    dist.broadcast(holder, src=0)
    return holder.cpu().numpy()
