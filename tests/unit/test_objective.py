"""Losses against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_longpo.training.objective import (
    LOSS_TYPES,
    preference_loss,
    response_nll,
    reward_distance,
    spec_of,
    total_loss,
)


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


# Ratios 2 and -5, lengths 4 and 5: the means per token are 0.5 and -1.
_PAIR = (_t(-10), _t(-20), _t(-12), _t(-15))
_LENGTHS = {"chosen_tokens_B": _t(4), "rejected_tokens_B": _t(5)}


def _softplus(x: float) -> float:
    return math.log(1 + math.exp(x))


def test_sigmoid_norm_is_of_means_per_token() -> None:
    terms = preference_loss(*_PAIR, beta=2.0, loss_type="sigmoid_norm", **_LENGTHS)
    # -log sigmoid(2 * (0.5 + 1)) = log(1 + e^-3)
    assert terms.loss_B.item() == pytest.approx(_softplus(-3), rel=1e-12)
    # Rewards stay those of whole responses.
    assert (terms.reward_chosen_B.item(), terms.reward_rejected_B.item()) == (4.0, -10.0)
    smoothed = preference_loss(*_PAIR, beta=2.0, loss_type="sigmoid_norm", label_smoothing=0.1, **_LENGTHS)
    assert smoothed.loss_B.item() == pytest.approx(0.9 * _softplus(-3) + 0.1 * _softplus(3))


def test_robust_is_unbiased() -> None:
    def robust(*pair: torch.Tensor) -> float:
        return preference_loss(*pair, beta=0.1, loss_type="robust", label_smoothing=0.2).loss_B.item()

    # (0.8 log(1 + e^-0.7) - 0.2 log(1 + e^0.7)) / 0.6
    assert robust(*_PAIR) == pytest.approx((0.8 * _softplus(-0.7) - 0.2 * _softplus(0.7)) / 0.6, rel=1e-12)
    # Over labels of which a fifth is flipped, its mean is the loss of the right label.
    swapped = (_PAIR[1], _PAIR[0], _PAIR[3], _PAIR[2])
    assert 0.8 * robust(*_PAIR) + 0.2 * robust(*swapped) == pytest.approx(_softplus(-0.7), rel=1e-12)


def test_simpo_by_hand() -> None:
    # Mean log-probs -10 / 4 = -2.5 and -20 / 5 = -4; 2 * (-2.5 + 4) - 0.5 = 2.5
    terms = preference_loss(_t(-10), _t(-20), None, None, beta=2.0, loss_type="simpo", simpo_gamma=0.5, **_LENGTHS)
    assert terms.loss_B.item() == pytest.approx(_softplus(-2.5), rel=1e-12)
    assert (terms.reward_chosen_B.item(), terms.reward_rejected_B.item()) == (-5.0, -8.0)


def test_orpo_by_hand() -> None:
    # Mean probabilities 1/2 and 1/4 have the odds 1 and 1/3; -0.1 log sigmoid(log 3) = -0.1 log(3/4)
    terms = preference_loss(
        _t(4 * math.log(0.5)), _t(5 * math.log(0.25)), None, None, beta=0.1, loss_type="orpo", **_LENGTHS
    )
    assert terms.loss_B.item() == pytest.approx(-0.1 * math.log(0.75), rel=1e-12)
    assert terms.reward_chosen_B.item() == pytest.approx(0.1 * math.log(0.5))
    assert terms.reward_rejected_B.item() == pytest.approx(0.1 * math.log(0.25))


@pytest.mark.parametrize("logp", [0.0, -1e-30, -1e5])
def test_orpo_of_certain_and_impossible_answers_is_finite(logp: float) -> None:
    chosen, rejected = _t(logp).requires_grad_(), _t(-3).requires_grad_()
    loss = preference_loss(chosen, rejected, None, None, beta=0.1, loss_type="orpo", **_LENGTHS).loss_B
    loss.sum().backward()
    assert torch.isfinite(loss).all() and chosen.grad is not None and rejected.grad is not None
    assert torch.isfinite(chosen.grad).all() and torch.isfinite(rejected.grad).all()


def test_solopo_aligns_the_rewards_of_two_contexts() -> None:
    # Means -10 / 4 = -2.5 on the short context and -12 / 4 = -3 on the long one: |2 * 0.5| = 1, whichever is larger.
    for short, long in ((-10, -12), (-12, -10)):
        assert reward_distance(_t(short), _t(long), _t(4), beta=2.0, loss_type="simpo").item() == pytest.approx(1.0)
    # Probabilities 1/2 and 1/4 have the odds 1 and 1/3.
    logps = _t(4 * math.log(0.5)), _t(4 * math.log(0.25))
    assert reward_distance(*logps, _t(4), beta=9.0, loss_type="orpo").item() == pytest.approx(math.log(3))
    # 2 + 3 * 1 + 0.7 * 2.5
    found = total_loss(
        "solopo", _t(2.0), _t(9.0), 0.01, response_nll_B=_t(2.5), rpo_alpha=0.7, distance_B=_t(1.0), solo_alpha=3.0
    )
    assert found.item() == pytest.approx(6.75)
    with pytest.raises(ValueError, match="distance_B"):
        total_loss("solopo", _t(2.0), _t(9.0), 0.01)
    with pytest.raises(ValueError, match="needs a reference on both contexts"):
        reward_distance(*logps, _t(4), beta=1.0, loss_type="sigmoid")


def test_solopo_bounds_the_loss_on_the_long_context() -> None:
    """Short loss plus the distances of both answers' rewards is at least the long loss."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(4, 1000, generator=generator, dtype=torch.float64) * 3
    short = -torch.nn.functional.logsigmoid(rewards[0] - rewards[1])
    long = -torch.nn.functional.logsigmoid(rewards[2] - rewards[3])
    assert (long <= short + (rewards[0] - rewards[2]).abs() + (rewards[1] - rewards[3]).abs()).all()


def test_rpo_adds_the_nll_per_token_of_the_chosen_answer() -> None:
    nll = response_nll(_t(-10), _t(4))
    assert nll.item() == 2.5
    assert total_loss("dpo", _t(2.0), _t(9.0), 0.01, response_nll_B=nll, rpo_alpha=0.7).item() == pytest.approx(3.75)
    assert total_loss("longpo", _t(2.0), _t(9.0), 0.5, response_nll_B=nll, rpo_alpha=2).item() == pytest.approx(15)
    with pytest.raises(ValueError, match="response_nll_B"):
        total_loss("dpo", _t(2.0), _t(9.0), 0.01, rpo_alpha=0.7)


def test_what_a_loss_needs() -> None:
    for loss_type in LOSS_TYPES:
        reference = spec_of("longpo", loss_type).reference_rows
        assert (reference is None) == (loss_type in ("simpo", "orpo"))
        if reference is not None:
            with pytest.raises(ValueError, match="reference_chosen_B"):
                preference_loss(_t(-1), _t(-2), None, None, beta=0.1, loss_type=loss_type)
    for loss_type in ("sigmoid_norm", "ipo", "simpo", "orpo"):
        with pytest.raises(ValueError, match="chosen_tokens_B"):
            preference_loss(*_PAIR, beta=0.1, loss_type=loss_type)
    with pytest.raises(ValueError, match="loss_type=x"):
        preference_loss(*_PAIR, beta=0.1, loss_type="x")


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
