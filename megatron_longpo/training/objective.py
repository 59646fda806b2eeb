"""The losses as pure mathematics: tensors in, tensors out, no ranks and no configuration object.

Notation, as in the LongPO paper (arXiv 2502.13922):
    x_L  long document and instruction        y_S  answer given the short chunk (chosen)
    x_S  short chunk and the same instruction  y_L  answer given the long document (rejected)

Shape legend: B = samples.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

LOSS_TYPES = ("sigmoid", "sigmoid_norm", "robust", "ipo", "hinge", "simpo", "orpo")
# Losses of the policy's log-probs only: no reference is needed.
REFERENCE_FREE = frozenset({"simpo", "orpo"})

# Which rows of a sample the reference scores: the answers on their short chunks, or on the whole document.
ReferenceRows = Literal["short", "long"]


@dataclass(frozen=True)
class ObjectiveSpec:
    """What an objective consists of.

    Attributes:
        reference_rows: rows that the reference scores; None: there is no reference.
        uses_preference: whether the preference loss is part of the loss; if not, the policy computes no rejected rows.
        uses_nll: whether the NLL of the chosen rows is part of the loss.
        prefers_short: whether the preference loss is of the short rows, and the long chosen row only aligned with its short one.
    """

    reference_rows: ReferenceRows | None
    uses_preference: bool
    uses_nll: bool
    prefers_short: bool = False

    @property
    def responses(self) -> int:
        """Sums of response log-probs per sample: chosen and rejected, and the long chosen one if those are of short rows."""
        return 3 if self.prefers_short else 2


OBJECTIVES = {
    "longpo": ObjectiveSpec(reference_rows="short", uses_preference=True, uses_nll=True),
    "dpo": ObjectiveSpec(reference_rows="long", uses_preference=True, uses_nll=False),
    "sft": ObjectiveSpec(reference_rows=None, uses_preference=False, uses_nll=True),
    # With a loss that needs no reference.
    "solopo": ObjectiveSpec(reference_rows=None, uses_preference=True, uses_nll=False, prefers_short=True),
}


def spec_of(objective: str, loss_type: str) -> ObjectiveSpec:
    """What an objective consists of with a preference loss, which may need no reference.

    Args:
        objective: key of OBJECTIVES.
        loss_type: one of LOSS_TYPES.
    """
    spec = OBJECTIVES[objective]
    return replace(spec, reference_rows=None) if loss_type in REFERENCE_FREE else spec


@dataclass(frozen=True)
class PreferenceTerms:
    """Preference loss of each sample and what is reported with it; every tensor has shape [B].

    Rewards are defined as in TRL: ``beta * (policy log-prob - reference log-prob)`` of a whole response, and, for losses
    without a reference, ``beta * mean log-prob per token``.
    """

    loss_B: Tensor
    reward_chosen_B: Tensor
    reward_rejected_B: Tensor


def preference_loss(
    policy_chosen_B: Tensor,
    policy_rejected_B: Tensor,
    reference_chosen_B: Tensor | None,
    reference_rejected_B: Tensor | None,
    *,
    beta: float,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    simpo_gamma: float = 0.0,
    chosen_tokens_B: Tensor | None = None,
    rejected_tokens_B: Tensor | None = None,
) -> PreferenceTerms:
    """Preference loss of summed response log-probs, one value per sample.

    With ``policy_*`` = log pi_theta(y | x_L), ``reference_*`` = log pi_S(y | x_S) and the sigmoid form, this is the LongPO
    loss (paper, Eq. 9 and, with log-probs first summed over the turns of a sample, Eq. 13). With the reference
    conditioned on x_L it is the loss of DPO (arXiv 2305.18290, Eq. 7).

    Write ``c`` and ``r`` for the ratios ``policy - reference`` of the chosen and the rejected response, ``|c|`` and ``|r|`` for
    their lengths in tokens, ``p`` and ``q`` for the policy's mean log-probs per token, and ``e`` for label smoothing.

    ============  =================================================================  =====================
    loss_type     loss                                                               source
    ============  =================================================================  =====================
    sigmoid       smoothed(beta * (c - r))                                           arXiv 2305.18290
    sigmoid_norm  smoothed(beta * (c / |c| - r / |r|))                               TRL's ``sigmoid_norm``
    robust        ((1 - e) * s(m) - e * s(-m)) / (1 - 2e),  m = beta * (c - r)       arXiv 2403.00409
    ipo           (c / |c| - r / |r| - 1 / (2 beta)) ** 2                            arXiv 2310.12036, Eq. 17
    hinge         max(0, 1 - beta * (c - r))                                         arXiv 2305.10425
    simpo         smoothed(beta * (p - q) - simpo_gamma)                             arXiv 2405.14734, Eq. 6
    orpo          beta * s(logit(p) - logit(q)),  logit(p) = p - log(1 - exp(p))     arXiv 2403.07691, Eq. 7
    ============  =================================================================  =====================

    where ``s(m) = -log sigmoid(m)`` and ``smoothed(m) = (1 - e) * s(m) + e * s(-m)``, the expected loss if a label is flipped
    with probability e (conservative DPO). TRL's ``sigmoid`` computes the same up to 0.24 and ignores the option in 1.16. ``ipo``
    is on the mean log-prob per token, as its authors advise for responses of unequal length. In ``orpo``, beta is the paper's
    lambda, as in TRL.

    Args:
        policy_chosen_B, policy_rejected_B: [B], with gradient.
        reference_chosen_B, reference_rejected_B: [B], without gradient; None for ``simpo`` and ``orpo``.
        beta: strength of the constraint, > 0.
        loss_type: one of LOSS_TYPES.
        label_smoothing: probability that a preference label is flipped, in [0, 0.5).
        simpo_gamma: margin between the rewards of the two responses.
        chosen_tokens_B, rejected_tokens_B: response lengths in tokens; required by losses of means per token.

    Raises:
        ValueError: unknown ``loss_type``, or its response lengths or reference are not given.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type={loss_type} is unknown; use one of {', '.join(LOSS_TYPES)}")
    if loss_type in REFERENCE_FREE:
        chosen_B, rejected_B = policy_chosen_B, policy_rejected_B
    elif reference_chosen_B is None or reference_rejected_B is None:
        raise ValueError(
            f"loss_type={loss_type} compares with a reference; pass reference_chosen_B and reference_rejected_B"
        )
    else:
        chosen_B, rejected_B = policy_chosen_B - reference_chosen_B, policy_rejected_B - reference_rejected_B
    reward_chosen_B, reward_rejected_B = chosen_B, rejected_B
    if loss_type in _PER_TOKEN:
        if chosen_tokens_B is None or rejected_tokens_B is None:
            raise ValueError(f"loss_type={loss_type} averages over tokens; pass chosen_tokens_B and rejected_tokens_B")
        chosen_B, rejected_B = chosen_B / chosen_tokens_B.clamp(min=1), rejected_B / rejected_tokens_B.clamp(min=1)
    if loss_type in REFERENCE_FREE:
        reward_chosen_B, reward_rejected_B = chosen_B, rejected_B
    margin_B = beta * (chosen_B - rejected_B)
    if loss_type in ("sigmoid", "sigmoid_norm"):
        loss_B = _smoothed(margin_B, label_smoothing)
    elif loss_type == "robust":
        loss_B = -(1.0 - label_smoothing) * F.logsigmoid(margin_B) + label_smoothing * F.logsigmoid(-margin_B)
        loss_B = loss_B / (1.0 - 2.0 * label_smoothing)
    elif loss_type == "ipo":
        loss_B = (chosen_B - rejected_B - 1.0 / (2.0 * beta)) ** 2
    elif loss_type == "hinge":
        loss_B = torch.relu(1.0 - margin_B)
    elif loss_type == "simpo":
        loss_B = _smoothed(margin_B - simpo_gamma, label_smoothing)
    else:
        loss_B = -beta * F.logsigmoid(_log_odds(chosen_B) - _log_odds(rejected_B))
    return PreferenceTerms(
        loss_B=loss_B,
        reward_chosen_B=(beta * reward_chosen_B).detach(),
        reward_rejected_B=(beta * reward_rejected_B).detach(),
    )


# Losses of means per token.
_PER_TOKEN = frozenset({"sigmoid_norm", "ipo", "simpo", "orpo"})
# Largest mean log-prob whose odds are taken: those of probability 1 are infinite.
_LARGEST_LOGP = -1e-12


def _smoothed(margin_B: Tensor, label_smoothing: float) -> Tensor:
    """Expected ``-log sigmoid(margin)`` if the sign of the margin is wrong with a probability."""
    return -(1.0 - label_smoothing) * F.logsigmoid(margin_B) - label_smoothing * F.logsigmoid(-margin_B)


def _log_odds(logp_B: Tensor) -> Tensor:
    """``log(p / (1 - p))`` of probabilities that are given as logarithms."""
    logp_B = logp_B.clamp(max=_LARGEST_LOGP)
    return logp_B - torch.log(-torch.expm1(logp_B))


def response_nll(policy_chosen_B: Tensor, chosen_tokens_B: Tensor) -> Tensor:
    """NLL of the chosen responses per token, [B]: the term that RPO adds (arXiv 2404.19733, Eq. 1).

    Args:
        policy_chosen_B: [B] summed log-probs of the chosen responses.
        chosen_tokens_B: [B] their lengths in tokens.
    """
    return -policy_chosen_B / chosen_tokens_B.clamp(min=1)


def reward_distance(
    short_chosen_B: Tensor, long_chosen_B: Tensor, chosen_tokens_B: Tensor, *, beta: float, loss_type: str
) -> Tensor:
    """Distance between the rewards of the chosen response on its short and on its long context, [B].

    The short-to-long reward alignment of SoLoPO (arXiv 2505.11166) in its chosen-only form, ``|r(x_S, y) - r(x_L, y)|``, where
    the reward r is ``beta * p`` for ``simpo`` and ``logit(p)`` for ``orpo``, of the mean log-prob p per token. Added to a
    preference loss ``-log sigmoid`` on the short context it bounds the one on the long context, since that function's slope is
    at most 1.

    Args:
        short_chosen_B, long_chosen_B: [B] summed log-probs of the response given the short and given the long context.
        chosen_tokens_B: [B] its length in tokens.
        beta: strength of the constraint.
        loss_type: ``simpo`` or ``orpo``.

    Raises:
        ValueError: another loss, whose rewards need a reference on both contexts.
    """
    if loss_type not in REFERENCE_FREE:
        raise ValueError(
            f"loss_type={loss_type} needs a reference on both contexts; use one of {', '.join(REFERENCE_FREE)}"
        )
    short_B, long_B = (logps_B / chosen_tokens_B.clamp(min=1) for logps_B in (short_chosen_B, long_chosen_B))
    if loss_type == "simpo":
        return (beta * (short_B - long_B)).abs()
    return (_log_odds(short_B) - _log_odds(long_B)).abs()


def total_loss(
    objective: str,
    preference_B: Tensor | None,
    nll_B: Tensor,
    preference_weight: float,
    *,
    response_nll_B: Tensor | None = None,
    rpo_alpha: float = 0.0,
    distance_B: Tensor | None = None,
    solo_alpha: float = 0.0,
) -> Tensor:
    """Loss of each sample, shape [B].

    ``longpo``: ``preference_weight * L_pref + L_NLL`` (paper, Eq. 10); ``dpo``: ``L_pref`` only; ``sft``: ``L_NLL`` only;
    ``solopo``: ``L_pref + solo_alpha * distance``. To all but ``sft``, ``rpo_alpha`` times the NLL of the chosen responses is
    added.

    Raises:
        ValueError: unknown objective, or one without a term that it needs.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective={objective} is unknown; use one of {', '.join(OBJECTIVES)}")
    spec = OBJECTIVES[objective]
    if not spec.uses_preference:
        return nll_B
    if preference_B is None:
        raise ValueError(f"objective={objective} needs the preference term; pass preference_B")
    loss_B = preference_weight * preference_B + nll_B if spec.uses_nll else preference_B
    if spec.prefers_short:
        if distance_B is None:
            raise ValueError(f"objective={objective} needs the distance between rewards; pass distance_B")
        loss_B = loss_B + solo_alpha * distance_B
    if not rpo_alpha:
        return loss_B
    if response_nll_B is None:
        raise ValueError(
            f"objective={objective} with rpo_alpha={rpo_alpha} needs the responses' NLL; pass response_nll_B"
        )
    return loss_B + rpo_alpha * response_nll_B
