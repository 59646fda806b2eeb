"""Preference losses against TRL's own code, on the same rows and log-probs."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_longpo.training.objective import preference_loss, response_nll, total_loss
from tests.support.models import make_chat_model
from tests.support.tokenizers import TEXT, make_fast_tokenizer

pytestmark = pytest.mark.slow

# TRL's own loss computes in fp32.
BOUND = 1e-5
BETA = 0.3
SMOOTHING = 0.2


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TRL's DPO trainer with a policy, another reference, and rows of unequal lengths."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    folder = tmp_path_factory.mktemp("trl")
    make_fast_tokenizer(folder / "tokenizer")
    make_chat_model(folder / "policy")
    make_chat_model(folder / "reference", std=0.2)
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("policy", "reference"))
    words = TEXT.split()
    rows = [
        {
            "prompt": " ".join(words[: 9 + i]),
            "chosen": " " + " ".join(words[i : 2 * i + 3]),
            "rejected": " " + " ".join(words[2 * i + 1 : 2 * i + 9 - i]),
        }
        for i in range(4)
    ]
    settings = DPOConfig(
        output_dir=str(folder / "output"),
        beta=BETA,
        label_smoothing=SMOOTHING,
        loss_type="robust",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    return DPOTrainer(
        model=policy,
        ref_model=reference,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def _sums(model: torch.nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Summed log-probs of the chosen and the rejected responses, from plain logits."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1].double()
    logps = logits.log_softmax(-1).gather(2, inputs["input_ids"][:, 1:, None])[..., 0]
    chosen, rejected = (logps * inputs["completion_mask"][:, 1:]).sum(1).chunk(2)
    return chosen, rejected


def _ours(trainer: Any, inputs: dict[str, Tensor], rpo_alpha: float = 0.0, **settings: Any) -> Tensor:
    policy = _sums(trainer.model, inputs)
    with torch.no_grad():
        reference = _sums(trainer.ref_model, inputs)
    lengths = inputs["completion_mask"].sum(1).chunk(2)
    terms = preference_loss(
        *policy, *reference, beta=BETA, chosen_tokens_B=lengths[0], rejected_tokens_B=lengths[1], **settings
    )
    nll_B = response_nll(policy[0], lengths[0])
    return total_loss("dpo", terms.loss_B, nll_B, 1.0, response_nll_B=nll_B, rpo_alpha=rpo_alpha).mean()


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (["sigmoid"], {"loss_type": "sigmoid"}),
        (["ipo"], {"loss_type": "ipo"}),
        (["hinge"], {"loss_type": "hinge"}),
        (["robust"], {"loss_type": "robust", "label_smoothing": SMOOTHING}),
        (["sigmoid_norm"], {"loss_type": "sigmoid_norm"}),
        # RPO, as TRL writes it since 1.0.
        (["sigmoid", "sft"], {"loss_type": "sigmoid", "rpo_alpha": 0.7}),
        # Sorted over a batch of one, TRL's aot is conservative DPO, which its sigmoid no longer computes.
        (["aot"], {"loss_type": "sigmoid", "label_smoothing": SMOOTHING}),
    ],
    ids=lambda x: "+".join(x) if isinstance(x, list) else "",
)
def test_dpo_losses_and_gradients_are_trls(trainer: Any, theirs: list[str], ours: dict[str, Any]) -> None:
    # A pair at a time: TRL's NLL is a mean over all tokens of a batch, ours one over samples.
    batches = [trainer.data_collator([trainer.train_dataset[i]]) for i in range(4)]
    lengths = {tuple(batch["completion_mask"].sum(1).tolist()) for batch in batches}
    assert all(chosen != rejected for chosen, rejected in lengths) and len(lengths) == 4
    trainer.loss_types, trainer.loss_weights = theirs, [1.0, ours.get("rpo_alpha", 0.0)][: len(theirs)]

    def gradients(loss_of: Callable[[dict[str, Tensor]], Tensor]) -> tuple[list[float], list[Tensor]]:
        trainer.model.zero_grad()
        losses = [loss_of(batch) for batch in batches]
        torch.stack(losses).mean().backward()
        return [float(loss.detach()) for loss in losses], [p.grad.clone() for p in trainer.model.parameters()]

    expected, expected_gradients = gradients(lambda b: trainer._compute_loss(trainer.model, b, return_outputs=False))
    found, found_gradients = gradients(lambda b: _ours(trainer, b, **ours))
    assert found == pytest.approx(expected, rel=BOUND)
    for a, b in zip(found_gradients, expected_gradients, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


def _logps() -> tuple[Tensor, Tensor]:
    """Mean log-probs per token of four pairs."""
    return torch.tensor([-0.2, -1.5, -0.01, -4.0]), torch.tensor([-0.9, -0.3, -2.5, -4.1])


@pytest.mark.parametrize("smoothing", [0.0, SMOOTHING])
def test_simpo_is_trls(monkeypatch: pytest.MonkeyPatch, smoothing: float) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.cpo import CPOTrainer

    chosen, rejected = _logps()
    settings = {"alpha": 0.0, "loss_type": "simpo", "simpo_gamma": 0.4, "beta": 2.0, "label_smoothing": smoothing}
    its = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), **settings)
    losses, *rewards = CPOTrainer.cpo_loss(its, chosen, rejected)
    lengths = torch.tensor([3, 5, 2, 7]), torch.tensor([4, 1, 9, 2])
    terms = preference_loss(
        chosen * lengths[0],
        rejected * lengths[1],
        None,
        None,
        beta=2.0,
        loss_type="simpo",
        simpo_gamma=0.4,
        label_smoothing=smoothing,
        chosen_tokens_B=lengths[0],
        rejected_tokens_B=lengths[1],
    )
    torch.testing.assert_close(terms.loss_B, losses, rtol=BOUND, atol=0)
    torch.testing.assert_close([terms.reward_chosen_B, terms.reward_rejected_B], rewards, rtol=BOUND, atol=0)


def test_orpo_is_trls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.orpo import ORPOTrainer

    chosen, rejected = _logps()
    its = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), beta=0.1)
    # TRL subtracts it from the NLL.
    losses, *rewards = ORPOTrainer.odds_ratio_loss(its, chosen, rejected)[:3]
    lengths = torch.tensor([3, 5, 2, 7]), torch.tensor([4, 1, 9, 2])
    terms = preference_loss(
        (chosen * lengths[0]).double(),
        (rejected * lengths[1]).double(),
        None,
        None,
        beta=0.1,
        loss_type="orpo",
        chosen_tokens_B=lengths[0],
        rejected_tokens_B=lengths[1],
    )
    torch.testing.assert_close(terms.loss_B.float(), -losses, rtol=BOUND, atol=0)
    torch.testing.assert_close(terms.reward_chosen_B.float(), rewards[0], rtol=BOUND, atol=0)
