"""Log-probs of the frozen reference: computed once and cached beside the data, or online in every step.

LongPO's reference scores each answer on its short chunk alone (paper, Eq. 9), so its rows are short and whole: they are
assigned to the data x context ranks by cost and packed. DPO's reference scores the long rows, cut like the policy's.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_longpo.config import Config
from megatron_longpo.data.indexed import PreferenceData
from megatron_longpo.data.preference import Sample, long_rows, short_rows
from megatron_longpo.data.sequence import Row
from megatron_longpo.errors import DataError
from megatron_longpo.model.rotary import Rotary
from megatron_longpo.model.shape import ModelShape
from megatron_longpo.runtime import platform
from megatron_longpo.runtime.balance import assign, round_up
from megatron_longpo.runtime.files import sha256_of, write_atomically
from megatron_longpo.runtime.process_groups import Parallel
from megatron_longpo.training.batch import MicroBatch, response_sums

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Task:
    """Rows that are laid out together, of one sample: a short turn's two rows, or a sample's long rows."""

    sample: int
    rows: tuple[Row, ...]
    tokens: int
    cost: float


def scope_of(objective: str) -> str:
    """Which rows the reference of an objective scores: ``short``, ``long`` or ``none``."""
    return {"longpo": "short", "dpo": "long", "sft": "none"}[objective]


def row_cost(tokens: int, shape: ModelShape) -> float:
    """Relative cost of a causal row: linear layers and attention, in multiply-adds of the forward.

    A token passes through qkv, output, gate, up and down projections; a query-key pair through two products.
    """
    width = shape.num_attention_heads * shape.kv_channels
    linear = shape.hidden_size * (
        2 * width + 2 * shape.num_query_groups * shape.kv_channels + 3 * shape.ffn_hidden_size
    )
    return tokens * linear + tokens * tokens / 2 * 2 * width


def tasks_of(samples: Sequence[Sample], scope: str, shape: ModelShape) -> list[Task]:
    """What there is to score; ``Task.sample`` and the rows' slots number the given samples."""
    tasks = []
    for number, sample in enumerate(samples):
        if scope == "long":
            groups = [long_rows(sample, slot=number, turns="chained", nll_scope="response")]
        else:
            rows = short_rows(sample, slot=number)
            groups = [rows[i : i + 2] for i in range(0, len(rows), 2)]
        for group in groups:
            # The longest row stands for the group: its rows share all but their answers.
            longest = max(len(row.tokens_L) for row in group)
            tasks.append(Task(number, tuple(group), sum(len(r.tokens_L) for r in group), row_cost(longest, shape)))
    return tasks


def pack(tokens: Sequence[int], limit: int) -> list[list[int]]:
    """Pack numbered items into sequences of at most ``limit`` tokens, first fit by decreasing size; a larger item is a
    sequence of its own."""
    packs: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(tokens)), key=lambda i: (-tokens[i], i)):
        for number, left in enumerate(room):
            if tokens[item] <= left:
                packs[number].append(item)
                room[number] -= tokens[item]
                break
        else:
            packs.append([item])
            room.append(limit - tokens[item])
    return packs


def score(
    samples: Sequence[Sample],
    *,
    scope: str,
    model: Sequence[torch.nn.Module],
    rotary: Rotary,
    shape: ModelShape,
    parallel: Parallel,
    max_tokens: int,
    prefix_sharing: bool = True,
) -> np.ndarray:
    """Log-probs of the chosen and rejected responses, summed over the turns of each sample; collective.

    Args:
        samples: the same on every rank.
        scope: ``short`` or ``long``.
        model: this pipeline rank's chunks, holding the reference's weights.
        rotary: the reference's rotary embedding.
        shape: of the model, for the costs.
        parallel: groups.
        max_tokens: of a packed sequence of short rows.
        prefix_sharing: whether rows share prefixes.

    Returns:
        [samples, 2] in fp64, the same on every rank.
    """
    long = scope == "long"
    tasks = tasks_of(samples, scope, shape)
    ranks, rank = (parallel.data_size, parallel.data_rank) if long else (parallel.dp_cp_size, parallel.dp_cp_rank)
    mine = [tasks[i] for i in assign([t.cost for t in tasks], ranks)[rank]]
    packs = [[i] for i in range(len(mine))] if long else pack([t.tokens for t in mine], max_tokens)
    result = torch.zeros(len(samples), 2, dtype=torch.float64, device=platform.CURRENT.device)
    for numbers, sums in zip(
        packs,
        _forward(
            [[mine[i] for i in p] for p in packs], model, rotary, parallel, long, prefix_sharing, shape.window_size
        ),
        strict=True,
    ):
        for slot, number in enumerate(numbers):
            result[mine[number].sample] += sums[slot]
    if parallel.pipeline_size > 1:
        dist.broadcast(result, src=parallel.last_stage_rank, group=parallel.pipeline_group)
    # Plain sums of disjoint parts; no gradient is taken through them.
    dist.all_reduce(result, group=parallel.data_group if long else parallel.dp_cp_group)
    return result.cpu().numpy()


def _forward(
    packs: list[list[Task]],
    model: Sequence[torch.nn.Module],
    rotary: Rotary,
    parallel: Parallel,
    long: bool,
    prefix_sharing: bool,
    window: int | None,
) -> list[Tensor]:
    """[tasks of the pack, 2] sums of each pack; zeros on all but the last pipeline stage."""
    batches = []
    for pack_ in packs:
        rows = [
            Row(
                row.tokens_L,
                np.where(row.response_L < 0, row.response_L, row.response_L % 2 + 2 * slot),
                np.zeros_like(row.nll_L),
                slot,
            )
            for slot, task in enumerate(pack_)
            for row in task.rows
        ]
        batches.append(
            MicroBatch.make(
                rows,
                num_samples=len(pack_),
                prefix_sharing=prefix_sharing,
                parallel=parallel,
                context_parallel=long,
                window=window,
            )
        )
    if not batches:
        return []
    # Interleaved schedules want a multiple of the pipeline's length; what is added is not read.
    wanted = round_up(len(batches), parallel.pipeline_size) if parallel.virtual_stages else len(batches)
    fed = batches + [batches[-1]] * (wanted - len(batches))

    def forward_step(iterator: Any, chunk: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        batch: MicroBatch = next(iterator)
        output = chunk(batch.tokens_1s, batch.positions_1s, batch.plan, rotary, batch.loss_places_N, batch.targets_N)

        def collect(logps_N: Tensor, **_: Any) -> Tensor:
            sums = response_sums(logps_N, batch, parallel)
            return torch.stack([sums.chosen_B, sums.rejected_B], dim=1)

        return output, collect

    training = [chunk.training for chunk in model]
    for chunk in model:
        chunk.eval()
    with torch.no_grad():
        sums = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(fed) for _ in model] if len(model) > 1 else iter(fed),
            model=list(model) if len(model) > 1 else model[0],
            num_microbatches=len(fed),
            seq_length=1,  # ignored: lengths vary
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    for chunk, was in zip(model, training, strict=True):
        chunk.train(was)
    if parallel.is_last_stage:
        return list(sums)[: len(batches)]
    return [torch.zeros(b.num_samples, 2, dtype=torch.float64, device=platform.CURRENT.device) for b in batches]


# --------------------------------------------------------------------------------------------------
# Cache
# --------------------------------------------------------------------------------------------------


def weights_fingerprint(checkpoint: Path, shape: ModelShape) -> str:
    """What tells one set of weights from another: the hash taken at import, else one of the checkpoint's files."""
    if shape.weights_hash is not None:
        return shape.weights_hash
    digest = hashlib.sha256()
    for path in sorted(checkpoint.glob("*.distcp")):
        digest.update(path.name.encode() + sha256_of(path).encode())
    return digest.hexdigest()


class ReferenceCache:
    """Cached log-probs of a whole data set under one fingerprint.

    ``FOLDER/HASH.json`` says what they are of, ``FOLDER/HASH.npy`` holds [samples, 2] in fp64. While it is computed,
    ``HASH.partial`` holds what is done and NaN elsewhere, so that a computation broken off goes on.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], num_samples: int) -> None:
        self.folder, self.num_samples = folder, num_samples
        self.identity = {"schema_version": SCHEMA_VERSION, **identity}
        text = json.dumps(self.identity, sort_keys=True)
        self.name = hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}.npy"

    def read(self) -> np.ndarray | None:
        """The whole table, or None where it is not there.

        Raises:
            DataError: the file is damaged.
        """
        if not self.path.exists():
            return None
        try:
            table = np.load(self.path, allow_pickle=False)
        except Exception as error:  # numpy raises a dozen kinds for a file that is none of its own
            raise DataError(f"{self.path}: cannot be read ({error}); remove it to compute it again") from None
        if table.shape != (self.num_samples, 2) or table.dtype != np.float64 or not np.isfinite(table).all():
            raise DataError(
                f"{self.path}: holds {table.shape} of {table.dtype}, expected finite ({self.num_samples}, 2) of float64; "
                "remove it to compute it again"
            )
        return table

    def partial(self) -> np.ndarray:
        """What is done so far; NaN elsewhere."""
        path = self.folder / f"{self.name}.partial"
        table = np.full((self.num_samples, 2), np.nan)
        if path.exists():
            done = np.fromfile(path, np.float64)
            done = done[: len(done) // 2 * 2][: table.size]
            table.reshape(-1)[: len(done)] = done
        return table

    def write_partial(self, table: np.ndarray) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / f"{self.name}.partial", np.ascontiguousarray(table).tobytes())

    def finish(self, table: np.ndarray) -> None:
        write_atomically(self.folder / f"{self.name}.json", json.dumps(self.identity, indent=2).encode() + b"\n")
        temporary = self.folder / f"{self.name}.{os.getpid()}.tmp.npy"
        np.save(temporary, table, allow_pickle=False)
        os.replace(temporary, self.path)
        (self.folder / f"{self.name}.partial").unlink(missing_ok=True)


def cache_for(
    config: Config, data: PreferenceData, weights: str, rotary_base: float, shape: ModelShape
) -> ReferenceCache:
    """The cache of this configuration's reference, whose weights and shape are given."""
    scope = scope_of(config.objective.objective)
    identity = {
        "weights": weights,
        "data": data.manifest.bin_sha256,
        "index": data.manifest.idx_sha256,
        "scope": scope,
        "rotary_base": rotary_base,
        "dtype": "bfloat16" if config.training.bf16 else "float32",
    }
    # The same weights under another scaling or window are another reference. Named where they are, so that caches made
    # before there were any stay good.
    if shape.rope_scaling:
        identity["rope_scaling"] = shape.rope_scaling
    if shape.window_size:
        identity["window_size"] = shape.window_size
    folder = Path(config.reference.reference_cache or f"{data.prefix}.reference")
    return ReferenceCache(folder, identity, len(data))


def fill(
    cache: ReferenceCache,
    data: PreferenceData,
    score_samples: Callable[[list[Sample]], np.ndarray],
    *,
    parallel: Parallel,
    log: Callable[[str], None],
    block: int | None = None,
    interval_seconds: float = 10.0,
) -> np.ndarray:
    """Compute what a cache lacks, block by block; collective. Returns the whole table on every rank."""
    device = platform.CURRENT.device
    holder = torch.from_numpy(cache.partial() if parallel.rank == 0 else np.zeros((len(data), 2))).to(device)
    # All ranks go by what the first one finds on disk.
    dist.broadcast(holder, src=0)
    table = holder.cpu().numpy()
    todo = np.flatnonzero(np.isnan(table).any(axis=1))
    block = block or 8 * parallel.dp_cp_size
    began = said = time.monotonic()
    if len(todo) < len(data):
        log(f"reference: {len(data) - len(todo)} of {len(data)} samples were scored before")
    for start in range(0, len(todo), block):
        numbers = todo[start : start + block]
        table[numbers] = score_samples([data[int(i)] for i in numbers])
        if not np.isfinite(table[numbers]).all():
            bad = int(numbers[~np.isfinite(table[numbers]).all(axis=1)][0])
            raise DataError(
                f"the reference gives sample {bad} a log-prob that is not finite; check the reference checkpoint's weights"
            )
        if parallel.rank == 0:
            cache.write_partial(table)
        now = time.monotonic()
        done = start + len(numbers)
        if now - said > interval_seconds or done == len(todo):
            left = (now - began) / done * (len(todo) - done)
            log(f"reference: {done}/{len(todo)} samples scored, {left:.0f} s left")
            said = now
    if parallel.rank == 0:
        cache.folder.mkdir(parents=True, exist_ok=True)
        cache.finish(table)
    dist.barrier()
    return table
