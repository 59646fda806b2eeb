"""Every layout computes what one process computes, and one process what Hugging Face's model does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_longpo.data.indexed import PreferenceData
from megatron_longpo.data.preference import CHOSEN_RESPONSE, REJECTED_RESPONSE
from megatron_longpo.data.sampler import BatchSampler
from megatron_longpo.doctor.bounds import bounds_of
from megatron_longpo.runs.compare import is_of_the_machine
from megatron_longpo.training import held_out
from tests.support import gpus
from tests.support.models import FAMILIES, VARIANTS
from tests.support.parity.cases import CASES, Case
from tests.support.parity.hf_oracle import load, objective
from tests.support.parity.worker import EVALUATED, base_settings

# 1e-5 on the CPU.
LAYOUT_BOUND = bounds_of(torch.float32, gpus.DEVICE).step
HF_BOUND = 1e-4
# Rounding is random: two bf16 runs that are equally good differ by this much in their distance from fp32.
BF16_BOUND = 1.25
_REWARDS = {"rewards/chosen", "rewards/rejected", "rewards/margins"}


def _scale(metrics: dict[str, float], name: str, beta: float) -> float:
    """What a bound is relative to: the value, or, for a difference of log-probs, the log-probs it is taken of."""
    if name in _REWARDS:
        return beta * (abs(metrics["logps/chosen"]) + abs(metrics["ref/chosen"]))
    if name == "preference":
        # d softplus(x) <= d x.
        return max(abs(metrics[name]), beta * (abs(metrics["logps/chosen"]) + abs(metrics["ref/chosen"])))
    return abs(metrics[name])


def _assert_metrics(found: dict[str, float], expected: dict[str, float], bound: float) -> None:
    for name, value in expected.items():
        if not is_of_the_machine(name):
            assert abs(found[name] - value) <= bound * _scale(expected, name, 0.2) + 1e-12, name


def _assert_tensors(found: dict[str, Any], expected: dict[str, Any], bound: float, family: str) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        difference, scale = found[name] - value, value.norm()
        if family == "glm" and name.endswith("k_proj.bias"):
            # The same number on all keys changes no softmax. So the true gradient of channels that are not rotated, half of
            # a head's 16, is zero; what is computed is the rounding of terms as large as those of the query's bias.
            rest = difference.view(-1, 16)[:, 8:]
            assert rest.norm() <= bound * expected[name.replace("k_proj", "q_proj")].norm(), name
            difference, scale = difference.view(-1, 16)[:, :8], value.view(-1, 16)[:, :8].norm()
        error = difference.norm() / scale
        assert error <= bound, f"{name}: relative error {error:.1e}"


def _of(bf16: bool) -> Any:
    """Families and cases, a family's cases together: they share launches."""
    found = [(f, c) for f in FAMILIES + VARIANTS for c in CASES if f in c.families and c.bf16 == bf16]
    return pytest.mark.parametrize(("family", "case"), found, ids=[f"{f}-{c.name}" for f, c in found])


@_of(bf16=False)
def test_layout_agrees_with_one_process_without_sharing(results: dict[str, Any], family: str, case: Case) -> None:
    found, expected = results[family][case.name], results[family][case.oracle]
    _assert_metrics(found["metrics"], expected["metrics"], LAYOUT_BOUND)
    _assert_tensors(found["gradients"], expected["gradients"], LAYOUT_BOUND, family)
    for step, other in zip(found["steps"], expected["steps"], strict=True):
        _assert_metrics(step, other, LAYOUT_BOUND)
    _assert_tensors(found["weights"], expected["weights"], LAYOUT_BOUND, family)


_HUGGING_FACE = [
    ("one", "longpo", {}),
    ("one-independent", "longpo", {"turns": "independent"}),
    ("one-dpo", "dpo", {}),
    ("one-sft", "sft", {}),
    ("one-response-ipo", "longpo", {"response_nll": True, "loss_type": "ipo"}),
    ("one-few", "longpo", {}),
    ("one-norm", "longpo", {"loss_type": "sigmoid_norm", "label_smoothing": 0.1}),
    ("one-robust", "longpo", {"loss_type": "robust", "label_smoothing": 0.1}),
    ("one-hinge", "longpo", {"loss_type": "hinge"}),
    ("one-simpo", "longpo", {"loss_type": "simpo", "beta": 2.0}),
    ("one-rpo", "dpo", {"rpo_alpha": 0.7}),
    ("one-solo-simpo", "solopo", {"loss_type": "simpo", "beta": 2.0, "solo_alpha": 1.0}),
    ("one-solo-orpo", "solopo", {"loss_type": "orpo", "rpo_alpha": 1.0, "solo_alpha": 3.0}),
    ("one-orpo", "dpo", {"loss_type": "orpo", "rpo_alpha": 1.0, "response_nll": True}),
]


def _case(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


@pytest.mark.parametrize(
    ("family", "name", "kind", "options"),
    [(f, *c) for f in FAMILIES for c in _HUGGING_FACE if f in _case(c[0]).families]
    + [(f, *_HUGGING_FACE[0]) for f in VARIANTS],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_one_process_agrees_with_hugging_face(
    results: dict[str, Any], parity_folder: Path, family: str, name: str, kind: str, options: dict[str, Any]
) -> None:
    settings = base_settings(parity_folder, family)
    data = PreferenceData(parity_folder / _case(name).settings.get("data", {}).get("data_path", "data"))
    size = min(len(data), settings["training"]["global_batch_size"])
    batch = BatchSampler(len(data), size, shuffle=True, seed=settings["training"]["seed"])
    answer = objective(
        load(parity_folder / family, settings["model"]["rotary_base"]),
        load(parity_folder / family, None),
        [data[i] for i in batch.batch(0)],
        kind=kind,
        **{"beta": settings["objective"]["beta"], "weight": settings["objective"]["preference_weight"], **options},
    )
    found = results[family][name]
    _assert_metrics({k: found["metrics"][k] for k in answer.metrics}, answer.metrics, HF_BOUND)
    gradients = dict(answer.gradients)
    if "lm_head.weight" not in found["gradients"]:
        gradients.pop("lm_head.weight", None)
    _assert_tensors(found["gradients"], gradients, HF_BOUND, family)


@pytest.mark.parametrize("case", [c for c in CASES if EVALUATED in c.families and not c.bf16], ids=lambda c: c.name)
def test_held_out_figures_agree_with_one_process(results: dict[str, Any], case: Case) -> None:
    """Every figure of every sample, the last batch being filled up."""
    found, expected = results[EVALUATED][case.name]["held_out"], results[EVALUATED][case.oracle]["held_out"]
    assert found.keys() == expected.keys() == set(held_out.METRICS)
    assert all(len(table[name]) == 7 for table in (found, expected) for name in held_out.METRICS)
    for number in range(7):
        _assert_metrics(
            {name: values[number] for name, values in found.items()},
            {name: values[number] for name, values in expected.items()},
            LAYOUT_BOUND,
        )


def test_held_out_figures_agree_with_hugging_face(results: dict[str, Any], parity_folder: Path) -> None:
    settings = base_settings(parity_folder, EVALUATED)
    data = PreferenceData(parity_folder / "held_out")
    policy = load(parity_folder / EVALUATED, settings["model"]["rotary_base"])
    reference = load(parity_folder / EVALUATED, None)
    weights = {"beta": settings["objective"]["beta"], "weight": settings["objective"]["preference_weight"]}
    answer = objective(policy, reference, [data[i] for i in range(7)], **weights)
    answers = [objective(policy, reference, [data[i]], **weights) for i in range(7)]
    summary = held_out.summary(results[EVALUATED]["one"]["held_out"])
    both = [name for name in answer.metrics if name in summary]
    assert {"loss", "nll", "preference", "logps/chosen", "logps/rejected"} <= set(both)
    assert all(
        abs(summary[n] - answer.metrics[n]) <= HF_BOUND * _scale(answer.metrics, n, 0.2) + 1e-12 for n in both
    ), (summary, answer.metrics)
    m, beta = answer.metrics, settings["objective"]["beta"]
    margin = beta * ((m["logps/chosen"] - m["ref/chosen"]) - (m["logps/rejected"] - m["ref/rejected"]))
    assert abs(summary["rewards/margins"] - margin) <= HF_BOUND * _scale(m, "rewards/margins", beta)
    # Estimates of the KL per token, sample by sample.
    metrics = held_out.metrics_of(results[EVALUATED]["one"]["held_out"])
    for number in range(7):
        m = answers[number].metrics
        for side, first, second in (("chosen", "ref", "logps"), ("rejected", "logps", "ref")):
            mode = CHOSEN_RESPONSE if side == "chosen" else REJECTED_RESPONSE
            tokens = sum(len(p.tokens) for p in data[number].pieces if p.mode & mode == mode)
            kl = (m[f"{first}/{side}"] - m[f"{second}/{side}"]) / tokens
            assert abs(metrics[f"kl/{side}"][number] - kl) <= HF_BOUND * abs(m[f"logps/{side}"]) / tokens


@_of(bf16=True)
def test_bf16_is_as_near_to_fp32_as_plain_bf16(results: dict[str, Any], family: str, case: Case) -> None:
    """Sharing, merging of blocks and layouts cost bf16 no precision: against fp32, as near as without them."""
    found, plain = results[family][case.name], results[family]["one-not-shared-bf16"]
    exact = results[family][case.oracle]

    def away(numbers: dict[str, Any], name: str) -> float:
        return float((numbers["gradients"][name].float() - exact["gradients"][name]).norm())

    names = list(exact["gradients"])
    total = [sum(away(numbers, n) ** 2 for n in names) ** 0.5 for numbers in (found, plain)]
    assert total[1] > 0
    whole = sum(float(exact["gradients"][n].norm()) ** 2 for n in names) ** 0.5
    assert total[0] <= bounds_of(torch.bfloat16, gpus.DEVICE).step * whole
    assert total[0] <= BF16_BOUND * total[1]
    for name in names:
        assert away(found, name) <= 2 * BF16_BOUND * away(plain, name), name
    loss = exact["metrics"]["loss"]
    assert abs(found["metrics"]["loss"] - loss) <= max(
        BF16_BOUND * abs(plain["metrics"]["loss"] - loss), 2**-8 * abs(loss)
    )


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("dp2-distopt-overlap-gather", "dp2-distopt-overlap"),
        ("dp2-distopt-offloaded-part-rmsprop", "dp2-distopt-rmsprop"),
        ("dp2-distopt-rmsprop-offloaded-bf16", "dp2-distopt-rmsprop-bf16"),
        ("one-offloaded-up", "one-recompute-up"),
        ("one-offloaded-attention", "one-recompute-selective"),
        ("cp2-offloaded-up", "cp2"),
        ("one-recompute-up-bf16", "one-bf16"),
        ("one-offloaded-up-bf16", "one-bf16"),
        ("tp2-sp-recompute-up-bf16", "tp2-sp-bf16"),
    ],
)
def test_what_changes_only_places_and_times_changes_no_bit(results: dict[str, Any], name: str, same: str) -> None:
    """Activations in host memory, and weights that are gathered in the next forward; what is recomputed is the same products."""
    found, expected = results["qwen2"][name], results["qwen2"][same]
    for kind in ("gradients", "weights"):
        assert all(torch.equal(x, expected[kind][n]) for n, x in found[kind].items())


@pytest.mark.parametrize("name", ["one", "one-simpo", "one-orpo"])
def test_losses_without_a_reference_have_none(results: dict[str, Any], parity_folder: Path, name: str) -> None:
    has_reference = name == "one"
    assert (results["qwen2"][name]["reference"] is not None) == has_reference
    assert (parity_folder / "references" / "qwen2" / name).exists() == has_reference


def test_gradients_are_not_zero(results: dict[str, Any]) -> None:
    """The comparison says nothing of gradients that are all zero."""
    for family in FAMILIES + VARIANTS:
        for gradient in results[family]["one"]["gradients"].values():
            assert gradient.norm() > 0
