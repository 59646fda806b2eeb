"""Log-probs without logits, against log_softmax: values and gradients, any chunk, padding of the vocabulary."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_longpo.model.logprobs import KnownGradients, TokenOrder, _Rows, check_known, chunk_tokens, token_logprobs


@pytest.mark.parametrize("chunk", [1, 5, 7, 64])
@pytest.mark.parametrize("padding", [0, 3])
def test_agrees_with_log_softmax(chunk: int, padding: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(23, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11 + padding, 8, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 11, (23,))
    direction = torch.randn(23)
    found = token_logprobs(hidden, weight, target, vocab_size=11, chunk=chunk)
    expected = F.log_softmax(hidden @ weight[:11].t(), -1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad((found * direction).sum(), (hidden, weight)),
        torch.autograd.grad((expected * direction).sum(), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_no_token_at_all() -> None:
    """A context-parallel rank may hold no loss; its backward must still run, for its peers wait in it."""
    hidden = torch.randn(0, 8, requires_grad=True)
    weight = torch.randn(11, 8, requires_grad=True)
    out = token_logprobs(hidden, weight, torch.zeros(0, dtype=torch.long), vocab_size=11)
    out.sum().backward()
    assert weight.grad is not None and (weight.grad == 0).all()


def test_large_logits_stay_finite() -> None:
    hidden = torch.full((2, 4), 100.0, requires_grad=True)
    weight = torch.tensor([[100.0] * 4, [-100.0] * 4, [0.0] * 4], requires_grad=True)
    out = token_logprobs(hidden, weight, torch.tensor([0, 1]), vocab_size=3)
    assert out.tolist() == pytest.approx([0.0, -80000.0])
    out.sum().backward()
    assert hidden.grad is not None and torch.isfinite(hidden.grad).all()


def test_gradient_of_bf16_weights_is_added_up_in_fp32() -> None:
    """In 512 chunks: sums kept in bf16 would be off by far more than one rounding."""
    torch.manual_seed(0)
    hidden = torch.randn(512, 16).bfloat16()
    weight = torch.randn(32, 16).bfloat16().requires_grad_()
    target = torch.randint(0, 32, (512,))
    whole = torch.autograd.grad(token_logprobs(hidden, weight, target, vocab_size=32, chunk=512).sum(), weight)[0]
    pieces = torch.autograd.grad(token_logprobs(hidden, weight, target, vocab_size=32, chunk=1).sum(), weight)[0]
    assert (whole.float() - pieces.float()).norm() / whole.float().norm() < 5e-3


@pytest.mark.parametrize("dummy", [False, True])
def test_goes_to_main_grad(dummy: bool) -> None:
    weight = torch.randn(11, 8, requires_grad=True)
    weight.main_grad = torch.ones(11, 8)  # type: ignore[attr-defined]
    plain = weight.detach().clone().requires_grad_()
    hidden, target = torch.randn(5, 8), torch.randint(0, 11, (5,))
    token_logprobs(hidden, weight, target, vocab_size=11, dummy_gradient=dummy).sum().backward()
    token_logprobs(hidden, plain, target, vocab_size=11).sum().backward()
    assert plain.grad is not None and (weight.grad is not None) == dummy
    torch.testing.assert_close(weight.main_grad, plain.grad + 1)  # type: ignore[attr-defined]
    assert weight.grad is None or (weight.grad == 0).all()
    assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]


def test_chunk_fits_its_budget() -> None:
    assert chunk_tokens(152064, 128 * 2**20) * 152064 * 4 <= 128 * 2**20
    assert chunk_tokens(152064, 128 * 2**20, torch.bfloat16) * 152064 * 6 <= 128 * 2**20
    assert chunk_tokens(10**9, 128 * 2**20) == 16


def test_a_rank_of_padding_alone_adds_nothing() -> None:
    """With a small vocabulary a tensor-parallel rank may hold no rows; uninitialised memory must not become its gradient."""
    weight = torch.randn(8, 4, requires_grad=True)
    weight.main_grad = torch.zeros(8, 4)  # type: ignore[attr-defined]
    hidden = torch.randn(6, 4, requires_grad=True)
    known = KnownGradients.of(torch.tensor([1.0, torch.nan] * 3))
    for _ in range(20):
        torch.full((6, 4), torch.nan)  # what fresh memory may hold
        out = token_logprobs(hidden, weight, torch.zeros(6, dtype=torch.long), vocab_size=8, vocab_start=8, known=known)
        (grad,) = torch.autograd.grad(out, hidden, torch.ones(6), retain_graph=False)
        assert (grad == 0).all() and (weight.main_grad == 0).all()  # type: ignore[attr-defined]


@pytest.mark.parametrize("chunk", [2, 64])
def test_gradients_known_in_advance_are_the_gradients(chunk: int) -> None:
    """Some known, some not: the same sums as with none known; and a forecast that fails says so."""
    torch.manual_seed(0)
    weight = torch.randn(14, 8)
    hidden, target, direction = torch.randn(23, 8), torch.randint(0, 11, (23,)), torch.randn(23)
    known_grad = torch.where(torch.arange(23) % 3 == 1, direction, torch.nan)
    found = []
    for told in (None, known_grad, torch.where(torch.isnan(known_grad), known_grad, known_grad * 1.01)):
        w, h = weight.clone().requires_grad_(), hidden.clone().requires_grad_()
        w.main_grad = torch.zeros_like(weight)  # type: ignore[attr-defined]
        known = [] if told is None else [KnownGradients.of(told)]
        out = token_logprobs(h, w, target, vocab_size=11, chunk=chunk, known=known[0] if known else None)
        (out * direction).sum().backward()
        if len(found) == 2:
            with pytest.raises(RuntimeError, match="differs from the one known in advance"):
                check_known(known)
            return
        check_known(known)
        found.append((out.detach(), w.main_grad, h.grad))  # type: ignore[attr-defined]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_chunks_take_as_many_tokens_of_each_rank() -> None:
    """Three ranks hold tokens 0 to 3, 4 and 5 to 7; the gradients of all but tokens 1 and 6 are known."""
    order = TokenOrder.make(np.array([1, 0, 1, 1, 1, 1, 0, 1], bool), (4, 1, 3))
    assert order.now_N.tolist() == [0, 2, 3, 4, 5, 7] and order.now_counts == (3, 1, 2)
    assert order.later_N.tolist() == [1, 6] and order.later_counts == (1, 0, 1)
    rows = _Rows(torch.arange(8), None, 4)
    # Chunks of at most 7 tokens: two of each rank, then what is left.
    pieces = list(rows.pieces(order.now_N, order.now_counts, 7))
    assert [p.index_C.tolist() for p in pieces] == [[0, 2, 4, 5, 7], [3]]
    assert [p.lengths for p in pieces] == [(2, 1, 2), (1, 0, 0)]
    # More ranks than tokens of a chunk: one of each.
    assert [p.index_C.tolist() for p in rows.pieces(order.later_N, order.later_counts, 2)] == [[1, 6]]
    assert list(rows.pieces(order.later_N[:0], (0, 0, 0), 7)) == []
    assert rows.largest(2, order, 8) == 3 and rows.largest(7, order, 8, later_only=True) == 2


@pytest.mark.parametrize("known", [False, True])
def test_rows_are_taken_where_the_tokens_are(known: bool) -> None:
    """The rows of some places only: values and gradients of selecting them first; the other rows get no gradient."""
    torch.manual_seed(0)
    weight, hidden, places = torch.randn(14, 8), torch.randn(9, 8), torch.tensor([0, 2, 3, 7])
    target, direction = torch.tensor([5, 0, 10, 3]), torch.randn(4)
    told = KnownGradients.of(torch.where(torch.arange(4) % 2 == 0, direction, torch.nan)) if known else None
    found = []
    for rows in (None, places):
        w, h = weight.clone().requires_grad_(), hidden.clone().requires_grad_()
        w.main_grad = torch.zeros_like(weight)  # type: ignore[attr-defined]
        given = h if rows is not None else h[places]
        out = token_logprobs(given, w, target, vocab_size=11, chunk=3, known=told, rows_N=rows)
        (out * direction).sum().backward()
        found.append((out.detach(), w.main_grad, h.grad))  # type: ignore[attr-defined]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_main_grad_of_16_bits_is_rounded_once_per_pass() -> None:
    """64 chunks of one token: added up in bf16 they would be off by several roundings."""
    torch.manual_seed(0)
    hidden, target = torch.randn(64, 16), torch.randint(0, 32, (64,))
    known = torch.where(torch.arange(64) % 2 == 0, torch.ones(64), torch.nan)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.ones(32, 16).normal_(generator=torch.Generator().manual_seed(1)).requires_grad_()
        weight.main_grad = torch.zeros(32, 16, dtype=dtype)  # type: ignore[attr-defined]
        token_logprobs(hidden, weight, target, vocab_size=32, chunk=1, known=KnownGradients.of(known)).sum().backward()
        found.append(weight.main_grad.double())  # type: ignore[attr-defined]
    # Rounded twice, by at most 2^-8 of it each time.
    assert ((found[1] - found[0]).abs() <= 2 * 2**-8 * found[0].abs().clamp(min=found[0].abs().mean())).all()
