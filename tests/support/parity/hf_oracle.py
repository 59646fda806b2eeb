"""The objectives written out on Hugging Face's own model, row by row, from the papers' formulas.

Nothing of this project is used but the stored pieces of a sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_longpo.data.preference import Mode, Sample


@dataclass
class Answer:
    """Loss, metrics and gradients by Hugging Face's names."""

    loss: float
    metrics: dict[str, float]
    gradients: dict[str, Tensor]


def load(folder: Path, rope_theta: float | None) -> torch.nn.Module:
    """The model in fp32, with another RoPE theta where one is given."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    if rope_theta is not None:
        config.rope_parameters = {**config.rope_parameters, "rope_theta": rope_theta}
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32, attn_implementation="eager")


def _token_logps(model: torch.nn.Module, tokens: list[int]) -> Tensor:
    """Log-prob of each token after the first."""
    ids = torch.tensor([tokens])
    logits = model(input_ids=ids).logits[0, :-1].float()
    return F.log_softmax(logits, dim=-1).gather(1, ids[0, 1:, None])[:, 0]


def _of(sample: Sample, mode: Mode, turn: int | None = None) -> list[Any]:
    pieces = sample.pieces if turn is None else sample.turn_pieces()[turn]
    return [p for p in pieces if p.mode & mode]


def _row(pieces: list[Any]) -> tuple[list[int], list[bool]]:
    tokens: list[int] = []
    answer: list[bool] = []
    for piece in pieces:
        tokens += piece.tokens.tolist()
        answer += [bool(piece.mode & Mode.RESPONSE)] * len(piece.tokens)
    return tokens, answer


def _answer_logp(model: torch.nn.Module, tokens: list[int], answer: list[bool]) -> Tensor:
    return (_token_logps(model, tokens) * torch.tensor(answer[1:]).float()).sum()


def objective(
    policy: torch.nn.Module,
    reference: torch.nn.Module,
    samples: list[Sample],
    *,
    kind: str = "longpo",
    beta: float,
    weight: float,
    turns: str = "chained",
    response_nll: bool = False,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    rpo_alpha: float = 0.0,
    solo_alpha: float = 0.0,
) -> Answer:
    """Mean loss of samples and its gradients."""
    losses, rows = [], []
    for sample in samples:
        count = len(sample.turn_pieces())
        sides = (Mode.CHOSEN, Mode.REJECTED)
        if turns == "chained":
            long = {side: [_row(_of(sample, side))] for side in sides}
        else:
            long = {side: [] for side in sides}
            document = sample.pieces[0]
            for turn in range(count):
                own = [p for p in sample.turn_pieces()[turn] if not p.mode & Mode(15)]
                prompt = own or [p for p in _of(sample, Mode.CHOSEN, turn) if not p.mode & Mode.RESPONSE]
                for side in sides:
                    response = [p for p in _of(sample, side, turn) if p.mode & Mode.RESPONSE]
                    long[side].append(_row([document, *prompt, *response]))
        # NLL of the chosen rows; what several have in common counts once.
        nll_sum, nll_count = torch.zeros(()), 0
        earlier: list[list[int]] = []
        for tokens, answer in long[Mode.CHOSEN]:
            logps = _token_logps(policy, tokens)
            fresh = [True] * len(tokens)
            for other in earlier:
                for i, (a, b) in enumerate(zip(tokens, other, strict=False)):
                    if a != b:
                        break
                    fresh[i] = False
            earlier.append(tokens)
            mask = torch.tensor([f and (a or not response_nll) for f, a in zip(fresh, answer, strict=True)][1:])
            nll_sum = nll_sum - (logps * mask.float()).sum()
            nll_count += int(mask.sum())
        nll = nll_sum / nll_count
        chosen = sum((_answer_logp(policy, *row) for row in long[Mode.CHOSEN]), torch.zeros(()))
        rejected = torch.zeros(())
        preference = ref_chosen = ref_rejected = torch.zeros(())
        if kind == "sft":
            loss = nll
        else:
            rejected = sum((_answer_logp(policy, *row) for row in long[Mode.REJECTED]), torch.zeros(()))
            with torch.no_grad():
                if loss_type in ("simpo", "orpo"):
                    pass
                elif kind == "dpo":
                    ref_chosen, ref_rejected = (_answer_logp(reference, *long[s][0]) for s in sides)
                else:
                    ref_chosen, ref_rejected = (
                        sum(_answer_logp(reference, *_row(_of(sample, s, turn))) for turn in range(count))
                        for s in (Mode.SHORT_CHOSEN, Mode.SHORT_REJECTED)
                    )
            on_long = chosen
            if kind == "solopo":
                chosen, rejected = (
                    sum((_answer_logp(policy, *_row(_of(sample, s, turn))) for turn in range(count)), torch.zeros(()))
                    for s in (Mode.SHORT_CHOSEN, Mode.SHORT_REJECTED)
                )
            lengths = [sum(sum(answer) for _, answer in long[s]) for s in sides]
            margin = (chosen - ref_chosen) - (rejected - ref_rejected)
            mean_margin = (chosen - ref_chosen) / lengths[0] - (rejected - ref_rejected) / lengths[1]
            right, wrong = (-F.logsigmoid(sign * beta * margin) for sign in (1, -1))
            if loss_type == "ipo":
                preference = (mean_margin - 1 / (2 * beta)) ** 2
            elif loss_type == "sigmoid_norm":
                right, wrong = (-F.logsigmoid(sign * beta * mean_margin) for sign in (1, -1))
                preference = (1 - label_smoothing) * right + label_smoothing * wrong
            elif loss_type == "robust":
                preference = ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)
            elif loss_type == "hinge":
                preference = torch.clamp(1 - beta * margin, min=0)
            elif loss_type == "simpo":
                preference = -F.logsigmoid(beta * mean_margin - 0.5)
            elif loss_type == "orpo":
                odds = [p / (1 - p) for p in (torch.exp(chosen / lengths[0]), torch.exp(rejected / lengths[1]))]
                preference = -beta * F.logsigmoid(torch.log(odds[0] / odds[1]))
            else:
                assert loss_type == "sigmoid"
                preference = right
            loss = weight * preference + nll if kind == "longpo" else preference
            if kind == "solopo":
                means = chosen / lengths[0], on_long / lengths[0]
                if loss_type == "simpo":
                    rewards = [beta * mean for mean in means]
                else:
                    rewards = [torch.log(torch.exp(mean) / (1 - torch.exp(mean))) for mean in means]
                loss = loss + solo_alpha * (rewards[0] - rewards[1]).abs()
            loss = loss - rpo_alpha * chosen / lengths[0]
        loss = sample.weight * loss
        losses.append(loss)
        rows.append([v.item() for v in (loss, nll, preference, chosen, rejected, ref_chosen, ref_rejected)])
    total = torch.stack(losses).mean()
    policy.zero_grad()
    total.backward()
    names = ("loss", "nll", "preference", "logps/chosen", "logps/rejected", "ref/chosen", "ref/rejected")
    means = torch.tensor(rows, dtype=torch.float64).mean(0).tolist()
    gradients = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
    return Answer(float(total), dict(zip(names, means, strict=True)), gradients)
