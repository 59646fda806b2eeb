"""Gradients of linear layers' weights, added to fp32 sums inside the product, and what megatron-core's DDP makes of them."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import pytest
import torch
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from megatron.core.tensor_parallel import layers as megatron_layers
from torch import Tensor

from megatron_longpo.config import from_dict
from megatron_longpo.doctor.steps import SHAPE, Layout, Workshop, quietly
from megatron_longpo.model.layers import fuse_weight_gradients
from megatron_longpo.runtime import process_groups, products
from megatron_longpo.runtime.process_groups import destroy_groups
from megatron_longpo.training import optimization
from megatron_longpo.training.plan import make_plan
from megatron_longpo.training.session import open_session
from megatron_longpo.training.trainer import start_training


def test_a_sum_over_micro_batches_keeps_what_a_rounded_product_loses() -> None:
    """Each of 256 products is 1 * 1 + 1 * 2^-9, which lies between the bf16 numbers 1 and 1 + 2^-7, and is rounded to 1."""
    grad, given = torch.ones(2, 1, dtype=torch.bfloat16), torch.tensor([[1.0], [2.0**-9]], dtype=torch.bfloat16)
    total, rounded = torch.zeros(1, 1), torch.zeros(1, 1)
    for _ in range(256):
        products.add_product(total, grad, given)
        rounded += grad.t() @ given
    assert total.item() == 256 * (1 + 2.0**-9) == 256.5
    assert rounded.item() == 256


def test_a_product_is_added_in_fp32_whatever_is_widened_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    grad, given = (torch.randn(70, n, generator=generator).bfloat16() for n in (6, 10))
    start = torch.randn(6, 10, generator=generator)
    right = start.double() + grad.double().t() @ given.double()
    for widened in (1, 16 * 9, 10**6):
        monkeypatch.setattr(products, "_WIDENED", widened)
        total = start.clone()
        # As megatron-core calls it.
        fused: Any = megatron_layers.fused_weight_gradient_mlp_cuda
        fused.wgrad_gemm_accum_fp32(given, grad, total)
        assert (total - right).norm() <= 1e-6 * right.norm()
    total = start.clone()
    products.add_product(total, grad.float(), given.float())
    assert (total - right).norm() <= 1e-6 * right.norm()


# --------------------------------------------------------------------------------------------------
# In a training step
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Found:
    """What a batch of four micro batches left.

    Attributes:
        gradients: what DDP holds, by name of the weight.
        exact: sums in fp64 of the products that were added to it.
        products: how many these were.
        ready: how often DDP was told that a gradient is complete.
    """

    gradients: dict[str, Tensor]
    exact: dict[str, Tensor]
    products: collections.Counter[str]
    ready: collections.Counter[str]


_NONE, _FULL = {"recompute_granularity": "none"}, {"recompute_granularity": "full"}
_UP = {"recompute_granularity": "selective", "recompute_modules": ("mlp_up",)}
_OVERLAPPED = {"overlap_grad_reduce": True, "use_distributed_optimizer": True}
RUNS: dict[str, tuple[bool, dict[str, Any], dict[str, Any]]] = {
    "apart": (False, _NONE, {}),
    "fused": (True, _NONE, {}),
    "up-projections recomputed": (True, _UP, {}),
    "layers recomputed": (True, _FULL, {}),
    "layers recomputed, overlapped": (True, _FULL, _OVERLAPPED),
    "sums in bf16": (True, _UP, {"grad_reduce_in_bf16": True}),
}
MICRO_BATCHES = 4


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    workshop = Workshop(tmp_path_factory.mktemp("workshop"))
    results = {}
    with quietly():
        workshop.prepare()
        with process_groups.alone():
            for name, (fused, training, parallel) in RUNS.items():
                with pytest.MonkeyPatch.context() as patch:
                    results[name] = _batch(workshop, patch, fused=fused, training=training, parallel=parallel)
                destroy_groups()
    return results


def _batch(
    workshop: Workshop, patch: pytest.MonkeyPatch, *, fused: bool, training: dict[str, Any], parallel: dict[str, Any]
) -> Found:
    config = workshop.config(Layout("one process", parallel), torch.bfloat16)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, **training))
    trainer = start_training(open_session(make_plan(config, 1)), began=0.0)
    (chunk,) = trainer.chunks
    if fused:
        fuse_weight_gradients(chunk)
    names = {p: n for n, p in chunk.named_parameters()}
    places = {p.main_grad.data_ptr(): n for p, n in names.items()}  # type: ignore[attr-defined]
    result = Found({}, {}, collections.Counter(), collections.Counter())
    add, register = products.add_product, _ParamAndGradBucketGroup.register_grad_ready

    def counted(total: Tensor, grad: Tensor, given: Tensor) -> None:
        name = places[total.data_ptr()]
        result.products[name] += 1
        result.exact[name] = result.exact.get(name, 0) + grad.double().t() @ given.double()
        add(total, grad, given)

    def told(self: Any, param: Any, *args: Any) -> None:
        result.ready[names[param]] += 1
        register(self, param, *args)

    patch.setattr(products, "add_product", counted)
    patch.setattr(_ParamAndGradBucketGroup, "register_grad_ready", told)
    numbers = trainer.sampler.batch(0)
    reference = trainer.reference.logps(trainer.session.data.train, numbers)
    for model in trainer.model:
        model.zero_grad_buffer()
    batches = trainer.session.runner.lay_out(trainer.session.data.train, numbers, reference)
    trainer.session.runner.forward_backward(trainer.model, batches, count=len(numbers))
    result.gradients = {n: p.main_grad.clone() for p, n in names.items()}  # type: ignore[attr-defined]
    return result


_LINEAR = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")


def _is_linear(name: str) -> bool:
    return name.endswith(_LINEAR)


def test_each_weight_has_a_product_per_micro_batch_and_its_gradient_is_their_sum(found: dict[str, Found]) -> None:
    """Whatever is recomputed; what DDP's hooks add themselves is not added twice, nor left out."""
    for name in RUNS:
        if name in ("apart", "sums in bf16"):
            continue
        run = found[name]
        linear = {n for n in run.gradients if _is_linear(n)}
        assert run.products == dict.fromkeys(linear, MICRO_BATCHES) and len(linear) == 4 * SHAPE.num_layers
        for n in linear:
            error = (run.gradients[n] - run.exact[n]).norm() / run.exact[n].norm()
            assert error <= 1e-6, f"{name}, {n}: {error:.1e}"
    fused, apart = found["fused"], found["apart"]
    for n, gradient in apart.gradients.items():
        if _is_linear(n):
            # Four products, each rounded by up to 2^-8 of it: 1.6e-3 in the norm were the roundings equally likely.
            error = (gradient - fused.exact[n]).norm() / fused.exact[n].norm()
            assert 2e-4 < error < 4e-3, f"{n}: {error:.1e}"
        else:
            assert torch.equal(gradient, fused.gradients[n]), n


@pytest.mark.parametrize("name", ["up-projections recomputed", "layers recomputed", "layers recomputed, overlapped"])
def test_recomputing_changes_no_bit_of_a_gradient(name: str, found: dict[str, Found]) -> None:
    for n, gradient in found["fused"].gradients.items():
        assert torch.equal(found[name].gradients[n], gradient), n


def test_ddp_is_told_once_of_each_gradient(found: dict[str, Found]) -> None:
    """Once per micro batch, when whole layers are recomputed and gradients reduced as they come. megatron-core's DDP refuses a
    gradient that is neither there nor marked as added, which it would be if the mark were set on what autograd saved."""
    run = found["layers recomputed, overlapped"]
    assert run.ready == dict.fromkeys(run.gradients, MICRO_BATCHES)


def test_sums_of_16_bits_are_made_as_before(found: dict[str, Found]) -> None:
    run = found["sums in bf16"]
    assert not run.products
    assert {gradient.dtype for gradient in run.gradients.values()} == {torch.bfloat16}


def test_the_log_says_what_becomes_of_gradients_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine's layers are not megatron-core's, which have the fusion."""
    monkeypatch.setattr(optimization.products, "are_fused", lambda _: True)
    config = from_dict({"training": {"bf16": True}}, "test")
    assert optimization.weight_gradients(config, is_transformer_engine=False).endswith("added inside their products")
    assert (
        "rounded to bfloat16 in each micro batch, since gradient_accumulation_fusion"
        in optimization.weight_gradients(config, is_transformer_engine=True)
    )
    for apart in ({"gradient_accumulation_fusion": False}, {"grad_reduce_in_bf16": True}):
        config = from_dict({"training": {"bf16": True}, "parallel": apart}, "test")
        assert not any(optimization.weight_gradients(config, is_transformer_engine=engine) for engine in (True, False))
