"""Fingerprints of tensors: numbers that change with any bit, by which two runs are compared without keeping their tensors."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

# A prime below 2^31, so that every product below stays within int64.
_PRIME = 2**31 - 1
# Elements at a time: as int64 they take 16 MiB.
_CHUNK = 2**21
# Places count differently within a period, which is prime so that it divides no tensor's rows.
_PERIOD = 251
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


def fingerprint(tensors: Iterable[Tensor]) -> int:
    """Fingerprint of all ranks' tensors, the same on every rank; collective.

    Integers are added, so that the order in which a device adds does not matter. It depends on the layout: a rank counts its
    part.

    Args:
        tensors: tensors of this rank, on one device.
    """
    total: Tensor | None = None
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        bits = flat.view(_INTEGERS[flat.element_size()])
        for start in range(0, bits.numel(), _CHUNK):
            part = bits[start : start + _CHUNK].to(torch.int64)
            places = torch.arange(start, start + part.numel(), device=part.device) % _PERIOD + 1
            # At most 2^31 * 2^8 * 2^21.
            found = (part * places).sum() % _PRIME
            total = found if total is None else (total * 31 + found) % _PRIME
    if total is None:
        return 0
    if not dist.is_initialized():
        return int(total)
    # Two ranks that trade their parts are told apart.
    total = total * (dist.get_rank() + 1)
    dist.all_reduce(total)
    return int(total % _PRIME)


def fingerprint_of_batch(numbers: Sequence[int]) -> int:
    """Fingerprint of the numbers of the samples of a batch, in their order."""
    return zlib.crc32(np.asarray(numbers, np.int64).tobytes())
