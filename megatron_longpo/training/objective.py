"""The losses as pure mathematics: tensors in, tensors out, no ranks and no configuration object.

Notation, as in the LongPO paper (arXiv 2502.13922):
    x_L  long document and instruction        y_S  answer given the short chunk (chosen)
    x_S  short chunk and the same instruction  y_L  answer given the long document (rejected)

Shape legend: B = samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

LOSS_TYPES = ("sigmoid", "ipo", "hinge")

# Which rows of a sample the reference scores: the answers on their short chunks, or on the whole document.
ReferenceRows = Literal["short", "long"]


@dataclass(frozen=True)
class ObjectiveSpec:
    """What an objective consists of.

    Attributes:
        reference_rows: rows that the reference scores; None: the objective has no preference term, and so no reference.
        needs_rejected: whether the policy computes the rejected rows.
        uses_nll: whether the NLL of the chosen rows is part of the loss.
    """

    reference_rows: ReferenceRows | None
    needs_rejected: bool
    uses_nll: bool

    @property
    def uses_preference(self) -> bool:
        """Whether the preference loss is part of the loss."""
        return self.reference_rows is not None


OBJECTIVES = {
    "longpo": ObjectiveSpec(reference_rows="short", needs_rejected=True, uses_nll=True),
    "dpo": ObjectiveSpec(reference_rows="long", needs_rejected=True, uses_nll=False),
    "sft": ObjectiveSpec(reference_rows=None, needs_rejected=False, uses_nll=True),
}


@dataclass(frozen=True)
class PreferenceTerms:
    """Preference loss of each sample and what is reported with it; every tensor has shape [B].

    Rewards are defined as in TRL: ``beta * (policy log-prob - reference log-prob)`` of a whole response.
    """

    loss_B: Tensor
    reward_chosen_B: Tensor
    reward_rejected_B: Tensor


def preference_loss(
    policy_chosen_B: Tensor,
    policy_rejected_B: Tensor,
    reference_chosen_B: Tensor,
    reference_rejected_B: Tensor,
    *,
    beta: float,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    chosen_tokens_B: Tensor | None = None,
    rejected_tokens_B: Tensor | None = None,
) -> PreferenceTerms:
    """Preference loss of summed response log-probs, one value per sample.

    With ``policy_*`` = log pi_theta(y | x_L), ``reference_*`` = log pi_S(y | x_S) and the sigmoid form, this is the LongPO
    loss (paper, Eq. 9 and, with log-probs first summed over the turns of a sample, Eq. 13). With the reference
    conditioned on x_L it is the loss of DPO (arXiv 2305.18290, Eq. 7). With label smoothing
    e the sigmoid loss is that of conservative DPO, the expected loss if a label is flipped with probability e::

        L = -(1 - e) * log sigmoid(m) - e * log sigmoid(-m)        m = beta * (chosen ratio - rejected ratio)

    TRL's ``sigmoid`` computes the same up to 0.24 and ignores the option in 1.16. Its ``robust`` is another loss, the unbiased
    ``(-(1 - e) * log sigmoid(m) + e * log sigmoid(-m)) / (1 - 2e)``, which is not offered here.

    ``hinge`` is SLiC's loss (arXiv 2305.10425), and ``ipo`` is Eq. 17 of arXiv 2310.12036 on the mean log-prob per token, as its
    authors advise for responses of unequal length.

    Args:
        policy_chosen_B, policy_rejected_B: [B], with gradient.
        reference_chosen_B, reference_rejected_B: [B], without gradient.
        beta: strength of the constraint, > 0.
        loss_type: ``sigmoid``, ``ipo`` or ``hinge``.
        label_smoothing: probability that a preference label is flipped, in [0, 0.5); ``sigmoid`` only.
        chosen_tokens_B, rejected_tokens_B: response lengths in tokens; required by ``ipo``.

    Raises:
        ValueError: unknown ``loss_type``, or ``ipo`` without response lengths.
    """
    chosen_ratio_B = policy_chosen_B - reference_chosen_B
    rejected_ratio_B = policy_rejected_B - reference_rejected_B
    if loss_type == "sigmoid":
        margin_B = beta * (chosen_ratio_B - rejected_ratio_B)
        loss_B = -(1.0 - label_smoothing) * F.logsigmoid(margin_B) - label_smoothing * F.logsigmoid(-margin_B)
    elif loss_type == "hinge":
        loss_B = torch.relu(1.0 - beta * (chosen_ratio_B - rejected_ratio_B))
    elif loss_type == "ipo":
        if chosen_tokens_B is None or rejected_tokens_B is None:
            raise ValueError("loss_type=ipo averages over tokens; pass chosen_tokens_B and rejected_tokens_B")
        mean_ratio_B = chosen_ratio_B / chosen_tokens_B.clamp(min=1) - rejected_ratio_B / rejected_tokens_B.clamp(min=1)
        loss_B = (mean_ratio_B - 1.0 / (2.0 * beta)) ** 2
    else:
        raise ValueError(f"loss_type={loss_type} is unknown; use one of {', '.join(LOSS_TYPES)}")
    return PreferenceTerms(
        loss_B=loss_B,
        reward_chosen_B=(beta * chosen_ratio_B).detach(),
        reward_rejected_B=(beta * rejected_ratio_B).detach(),
    )


def total_loss(objective: str, preference_B: Tensor | None, nll_B: Tensor, preference_weight: float) -> Tensor:
    """Loss of each sample, shape [B].

    ``longpo``: ``preference_weight * L_pref + L_NLL`` (paper, Eq. 10); ``dpo``: ``L_pref`` only; ``sft``: ``L_NLL`` only.

    Raises:
        ValueError: unknown objective, or a preference objective without its preference term.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective={objective} is unknown; use one of {', '.join(OBJECTIVES)}")
    spec = OBJECTIVES[objective]
    if not spec.uses_preference:
        return nll_B
    if preference_B is None:
        raise ValueError(f"objective={objective} needs the preference term; pass preference_B")
    return preference_weight * preference_B + nll_B if spec.uses_nll else preference_B
