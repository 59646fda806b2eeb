"""Where two computations part first, and on which rank."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron_longpo.training.rerun import (
    _BACKWARD,
    _FORWARD,
    _GRADIENT,
    Mismatch,
    Place,
    Record,
    culprits,
    first_difference,
)


def record(*values: tuple[int, torch.Tensor]) -> Record:
    made = Record()
    for number, (kind, value) in enumerate(values):
        made.add(Place(f"value {number}", kind, 0), value)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bit", [0, 9, 15])
def test_one_bit_is_found(dtype: torch.dtype, bit: int) -> None:
    value = torch.linspace(-1, 1, 33).to(dtype)
    other = value.clone()
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()]
    other.view(integers)[7] ^= 1 << bit if bit < 15 else -(1 << 15)
    first = record((_FORWARD, torch.ones(3)), (_FORWARD, value))
    assert first_difference(first, record((_FORWARD, torch.ones(3)), (_FORWARD, value)), bound=0.0) is None
    found = first_difference(first, record((_FORWARD, torch.ones(3)), (_FORWARD, other)), bound=0.0)
    assert found is not None and found[0] == 1


def test_values_that_change_places_are_found() -> None:
    value = torch.tensor([1.0, 2.0, 3.0, 4.0])
    for order in ([1, 0, 2, 3], [2, 3, 0, 1], [3, 1, 2, 0]):
        assert first_difference(record((_FORWARD, value)), record((_FORWARD, value[order])), bound=0.0) is not None


def test_a_bound_is_for_norms() -> None:
    """Of 3 and 4 the norm is 5; of 3 and 4.0001 it is 5.00008, which differs by 1.6e-5."""
    first, other = (record((_FORWARD, torch.tensor([3.0, x]))) for x in (4.0, 4.0001))
    assert first_difference(first, other, bound=2e-5) is None
    found = first_difference(first, other, bound=1e-5)
    assert found is not None and found[0] == 0 and found[1] == pytest.approx((5.0, 5.00008))
    nan = record((_FORWARD, torch.tensor([3.0, float("nan")])))
    assert first_difference(first, nan, bound=0.5) is not None and first_difference(nan, nan, bound=0.0) is None


def values(count: int = 5000) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(3))


def _negate(x: torch.Tensor) -> None:
    x[1000:1016] *= -1


def _zero(x: torch.Tensor) -> None:
    x[2560:2816] = 0


def _permute_rows(x: torch.Tensor) -> None:
    x[:4608] = x[:4608].view(-1, 512).flip(0).reshape(-1)


def _enlarge(x: torch.Tensor) -> None:
    x[4999] = 200


@pytest.mark.parametrize("change", [_negate, _zero, _permute_rows, _enlarge])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_norm_hides_is_found_where_bits_may_differ(
    change: Callable[[torch.Tensor], None], dtype: torch.dtype
) -> None:
    first = values().to(dtype)
    wrong = first.clone()
    change(wrong)
    assert first_difference(record((_BACKWARD, first)), record((_BACKWARD, wrong)), bound=2.0**-7) is not None


def test_rounding_is_no_difference() -> None:
    """Each value differs by up to two units in the last place of bfloat16, and some are what is left of larger ones."""
    first = values()
    first[1024:2048] *= 1e-4
    noise = 2.0**-7 * (2 * torch.rand(5000, generator=torch.Generator().manual_seed(4)) - 1)
    other = first * (1 + noise)
    other[1024:2048] += 1e-4
    assert first_difference(record((_BACKWARD, first)), record((_BACKWARD, other)), bound=2.0**-7) is None


def test_an_overflow_in_both_is_no_difference() -> None:
    """Infinity less infinity is NaN; beside the overflow the other values are compared."""
    first = values()
    first[3] = float("inf")
    other = first * (1 + 1e-7)
    assert torch.any(first != other)
    assert first_difference(record((_FORWARD, first)), record((_FORWARD, other)), bound=1e-5) is None
    other[2000] = 9.0
    assert first_difference(record((_FORWARD, first)), record((_FORWARD, other)), bound=1e-5) is not None
    finite = values()
    assert first_difference(record((_FORWARD, first)), record((_FORWARD, finite)), bound=0.5) is not None
    first[4999] = float("nan")
    assert first_difference(record((_FORWARD, first)), record((_FORWARD, first * (1 + 1e-7))), bound=1e-5) is None


def test_nothing_to_compare() -> None:
    empty = record((_FORWARD, torch.zeros(0)), (_FORWARD, torch.zeros(3)))
    assert first_difference(empty, empty, bound=1e-5) is None


def test_the_forward_counts_before_what_follows_from_it() -> None:
    """A layer that is recomputed in the backward comes after gradients that it has nothing to do with."""
    one, two = torch.ones(2), torch.full((2,), 2.0)
    first = record((_FORWARD, one), (_BACKWARD, one), (_FORWARD, one), (_GRADIENT, one))
    other = record((_FORWARD, one), (_BACKWARD, two), (_FORWARD, two), (_GRADIENT, two))
    found = first_difference(first, other, bound=0.0)
    assert found is not None and found[0] == 2


def mismatch(kind: int, order: int, *, position: int = 0, replica: int = 0) -> Mismatch:
    return Mismatch(Place("x", kind, 0), order, (1.0, 2.0), position, replica, "the CPU")


@pytest.mark.parametrize(
    ("found", "named"),
    [
        # Context parallelism: rank 1's keys differ, then what rank 0 makes of them.
        ([mismatch(_FORWARD, 5), mismatch(_FORWARD, 3)], [1]),
        # An exchange within a module hides whose it was.
        ([mismatch(_FORWARD, 5), mismatch(_FORWARD, 5)], [0, 1]),
        # Pipeline: stage 0 goes first in the forward, and last in the backward.
        ([mismatch(_FORWARD, 9, position=0), mismatch(_FORWARD, 1, position=1)], [0]),
        ([mismatch(_BACKWARD, 1, position=0), mismatch(_BACKWARD, 9, position=1)], [1]),
        # In the forward of stage 1; stage 0 gets another gradient.
        ([mismatch(_BACKWARD, 1, position=0), mismatch(_FORWARD, 9, position=1)], [1]),
        # A virtual pipeline: chunk 1 of stage 0 comes after chunk 0 of stage 1.
        ([mismatch(_FORWARD, 4, position=2), mismatch(_FORWARD, 6, position=1)], [1]),
        # Replicas do not exchange before the gradients are reduced.
        ([mismatch(_FORWARD, 2, replica=0), None, mismatch(_GRADIENT, 7, replica=1)], [0, 2]),
        ([None, mismatch(_GRADIENT, 30)], [1]),
        ([None, None], []),
    ],
)
def test_the_rank_is_named_where_it_began(found: list[Mismatch | None], named: list[int]) -> None:
    assert culprits(found) == named
