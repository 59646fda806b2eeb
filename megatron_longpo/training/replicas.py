"""Whether ranks that should hold the same weights do: memory or arithmetic that fails silently shows there."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_longpo.errors import PlatformError
from megatron_longpo.runtime.collectives import all_gather_objects
from megatron_longpo.runtime.heartbeat import whereabouts
from megatron_longpo.runtime.process_groups import Parallel


def check_replicas(weights: Iterable[Tensor], parallel: Parallel, *, step: int) -> None:
    """Compare the weights of data- and context-parallel replicas, bit for bit; collective.

    Every weight is copied to the host and hashed, so this is for now and then.

    Args:
        weights: this rank's weights.
        parallel: degrees and groups.
        step: optimizer steps done, for the error.

    Raises:
        PlatformError: some differ; on all ranks.
    """
    shard = (parallel.pipeline_rank, int(parallel_state.get_tensor_model_parallel_rank()))
    ranks = odd_ranks(all_gather_objects((shard, digest_of(weights))))
    if ranks:
        names = ", ".join(f"{rank}{whereabouts(rank)}" for rank in ranks)
        raise PlatformError(
            f"step {step}: the weights of rank {names} differ from those of the ranks that should have the same, so its memory "
            "or its arithmetic fails; leave that machine out, remove the checkpoints since the last check that found nothing "
            "(check_weight_hash_across_dp_replicas_interval), and rerun the command to resume from the one before"
        )


@torch.no_grad()
def digest_of(weights: Iterable[Tensor]) -> str:
    """Hash of the bits of tensors."""
    digest = hashlib.sha256()
    for weight in weights:
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def odd_ranks(found: Sequence[tuple[tuple[int, int], str]]) -> list[int]:
    """Ranks whose hash is not that of most ranks with the same shard; all of these where no hash has more than half.

    Args:
        found: pipeline and tensor rank, and hash, by rank.
    """
    shards: dict[tuple[int, int], dict[int, str]] = {}
    for rank, (shard, digest) in enumerate(found):
        shards.setdefault(shard, {})[rank] = digest
    return sorted(rank for digests in shards.values() for rank in _odd(digests))


def _odd(digests: Mapping[int, str]) -> list[int]:
    (most, count), *others = Counter(digests.values()).most_common()
    if not others:
        return []
    return [rank for rank, digest in digests.items() if digest != most or 2 * count <= len(digests)]
