"""Losses against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_longpo.training.objective import preference_loss, total_loss


def _t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_sigmoid_by_hand() -> None:
    # beta * ((-10 + 12) - (-20 + 15)) = 0.1 * 7 = 0.7;  -log sigmoid(0.7) = log(1 + e^-0.7)
    terms = preference_loss(_t(-10), _t(-20), _t(-12), _t(-15), beta=0.1)
    assert terms.loss_B.item() == pytest.approx(math.log(1 + math.exp(-0.7)), rel=1e-12)
    assert terms.reward_chosen_B.item() == pytest.approx(0.2)
    assert terms.reward_rejected_B.item() == pytest.approx(-0.5)


def test_no_difference_is_log_two() -> None:
    terms = preference_loss(_t(-3, -5), _t(-4, -1), _t(-3, -5), _t(-4, -1), beta=0.3)
    assert terms.loss_B.tolist() == pytest.approx([math.log(2)] * 2)


def test_label_smoothing_weighs_both_ways() -> None:
    margin = 0.7
    terms = preference_loss(_t(-10), _t(-20), _t(-12), _t(-15), beta=0.1, label_smoothing=0.1)
    expected = 0.9 * math.log(1 + math.exp(-margin)) + 0.1 * math.log(1 + math.exp(margin))
    assert terms.loss_B.item() == pytest.approx(expected)


def test_hinge_by_hand() -> None:
    assert preference_loss(
        _t(-10), _t(-20), _t(-12), _t(-15), beta=0.1, loss_type="hinge"
    ).loss_B.item() == pytest.approx(0.3)
    assert preference_loss(_t(-10), _t(-20), _t(-12), _t(-15), beta=1.0, loss_type="hinge").loss_B.item() == 0


def test_ipo_averages_over_tokens() -> None:
    # (2 / 4) - (-5 / 5) - 1 / (2 * 0.5) = 0.5;  squared 0.25
    terms = preference_loss(
        _t(-10), _t(-20), _t(-12), _t(-15), beta=0.5, loss_type="ipo", chosen_tokens_B=_t(4), rejected_tokens_B=_t(5)
    )
    assert terms.loss_B.item() == pytest.approx(0.25)


def test_gradient_of_sigmoid() -> None:
    chosen = _t(-10).requires_grad_()
    preference_loss(chosen, _t(-20), _t(-12), _t(-15), beta=0.1).loss_B.sum().backward()
    # d/dm softplus(-m) = -sigmoid(-m), m = 0.7
    assert chosen.grad is not None
    assert chosen.grad.item() == pytest.approx(-0.1 / (1 + math.exp(0.7)))


def test_large_margins_stay_finite() -> None:
    terms = preference_loss(_t(-1e5, -1), _t(-1, -1e5), _t(0, 0), _t(0, 0), beta=1.0)
    assert torch.isfinite(terms.loss_B).all()
    assert terms.loss_B.tolist() == pytest.approx([99999.0, 0.0])


def test_total() -> None:
    preference, nll = _t(2.0), _t(3.0)
    assert total_loss("longpo", preference, nll, 0.01).item() == pytest.approx(3.02)
    assert total_loss("dpo", preference, nll, 0.01).item() == 2
    assert total_loss("sft", None, nll, 0.01).item() == 3


@pytest.mark.parametrize(
    "call", [lambda: total_loss("longpo", None, _t(1), 1), lambda: total_loss("x", _t(1), _t(1), 1)]
)
def test_wrong_objective_is_refused(call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="objective"):
        call()
