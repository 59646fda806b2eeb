"""FP8 products, on a stand-in for Transformer Engine: what they demand; what is computed again is computed in FP8 again."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.transformer import transformer_block
from torch import Tensor

from megatron_longpo.config import Config, check, from_dict
from megatron_longpo.data.sequence import Row
from megatron_longpo.errors import ConfigError
from megatron_longpo.model import fp8
from megatron_longpo.model.gpt import build_model, transformer_config
from megatron_longpo.model.implementation import linear_error
from megatron_longpo.model.layers import GatedMLP
from megatron_longpo.model.rotary import rotary_of
from megatron_longpo.runtime import process_groups
from megatron_longpo.training.activations import Activations
from megatron_longpo.training.batch import MicroBatch
from tests.support.plans import SHAPE, parallel_of

_RIGHT = {
    "model": {"transformer_impl": "transformer_engine"},
    "training": {"bf16": True, "fp8_format": "hybrid"},
}


def _config(**changes: dict[str, Any]) -> Config:
    return from_dict({name: {**values, **changes.get(name, {})} for name, values in _RIGHT.items()}, "test")


def test_fp8_is_never_a_default_and_needs_what_computes_it() -> None:
    assert Config().training.fp8_format is None
    check(_config())
    for changes, message in (
        ({"training": {"bf16": False}}, "fp8_format=hybrid is for training in bfloat16; set bf16"),
        (
            {"model": {"transformer_impl": "auto"}},
            "transformer_impl=auto may be others; set transformer_impl=transformer",
        ),
        ({"model": {"transformer_impl": "local"}}, "transformer_impl=local may be others"),
        ({"training": {"fp8_recipe": "delayed"}}, "fp8_recipe=delayed scales by .* use fp8_recipe=tensorwise"),
        ({"training": {"cpu_offloading_num_layers": 2}}, "cpu_offloading_num_layers=2 would copy .* leave one"),
    ):
        with pytest.raises(ConfigError, match=message):
            check(_config(**changes))
    with pytest.raises(ConfigError, match="fp8_format"):
        _config(training={"fp8_format": "e4m3"})
    # A recipe that is not offered is refused without fp8_format, too.
    with pytest.raises(ConfigError, match="fp8_recipe=delayed scales by"):
        check(from_dict({"training": {"fp8_recipe": "delayed"}}, "test"))


@pytest.mark.parametrize(
    ("capability", "version", "tensor_size", "message"),
    [
        (None, "2.8", 1, "needs a GPU of compute capability 8.9 or higher, and this is the CPU; leave fp8_format out"),
        ((8, 0), "2.8", 1, "and this is a GPU of compute capability 8.0"),
        ((9, 0), "2.5", 1, "needs Transformer Engine 2.6.0 or later, not 2.5"),
        # 48 channels of queries on two ranks.
        ((9, 0), "2.8", 2, "a rank's width of the queries is 24 with tensor_model_parallel_size=2; lower that"),
    ],
)
def test_what_the_machine_or_the_model_lacks_is_said(
    monkeypatch: pytest.MonkeyPatch, capability: Any, version: str, tensor_size: int, message: str
) -> None:
    _machine(monkeypatch, capability, version)
    with pytest.raises(ConfigError, match=message):
        fp8.check_fp8(SHAPE, tensor_size)


def _machine(monkeypatch: pytest.MonkeyPatch, capability: Any, version: str) -> None:
    monkeypatch.setattr(fp8.platform, "CURRENT", SimpleNamespace(capability=lambda: capability))
    monkeypatch.setattr(fp8, "is_te_min_version", lambda least: version >= least)
    monkeypatch.setattr(fp8, "get_te_version", lambda: version)


def test_a_hopper_with_a_new_transformer_engine_takes_a_model_of_multiples_of_16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _machine(monkeypatch, (9, 0), "2.6.0")
    fp8.check_fp8(SHAPE, 1)


@pytest.mark.parametrize(("scale", "passes"), [(1.0, True), (1.25, False), (float("nan"), False)])
def test_products_that_are_wrong_by_more_than_rounding_are_refused(
    monkeypatch: pytest.MonkeyPatch, scale: float, passes: bool
) -> None:
    """Rounded as FP8 the stand-in's product is off by some percent, in its output and in its gradients."""
    config: Any = SimpleNamespace(fp8="hybrid")
    made: list[_Scaled] = []

    def linear(inputs: int, outputs: int, **_: Any) -> _Scaled:
        made.append(_Scaled(outputs, inputs, scale))
        return made[-1].bfloat16()

    engine = SimpleNamespace(Linear=linear)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", engine)
    monkeypatch.setattr(fp8, "get_fp8_context", _fp8_context)
    assert linear_error(engine, torch.device("cpu")) < 0.01 or not passes
    error = linear_error(engine, torch.device("cpu"), fp8.products_as_now(config))
    assert (0.04 < error < 0.08) == passes
    if passes:
        fp8.check_fp8_products(config)
        # The layer is tried as the model's are.
        assert made[-1].save_original_input and not made[-2].save_original_input
        return
    with pytest.raises(ConfigError, match=r"FP8 products differ from plain mathematics by .* leave fp8_format out"):
        fp8.check_fp8_products(config)


def test_a_failure_of_transformer_engine_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def linear(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", SimpleNamespace(Linear=linear))
    with pytest.raises(ConfigError, match=r"FP8 products fail \(.*no kernel image.*\); leave fp8_format out"):
        fp8.check_fp8_products(SimpleNamespace(fp8="hybrid"))  # type: ignore[arg-type]


def test_megatron_core_is_told_of_fp8_with_transformer_engine_only() -> None:
    settings = ("fp8", "fp8_recipe", "fp8_param", "disable_parameter_transpose_cache")
    told = [transformer_config(SHAPE, _config(), use_transformer_engine=engine) for engine in (True, False)]
    assert [getattr(told[0], name) for name in settings] == ["hybrid", "tensorwise", False, True]
    assert told[1].fp8 is None


def test_only_forwards_that_record_gradients_are_in_fp8() -> None:
    config: Any = SimpleNamespace(fp8="hybrid")
    with fp8.fp8_for_gradients_only(config):
        assert config.fp8 == "hybrid"
    with torch.no_grad(), fp8.fp8_for_gradients_only(config):
        assert config.fp8 is None
    assert config.fp8 == "hybrid"


def test_layers_keep_their_inputs_as_they_were_given() -> None:
    layers = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    layers[0].save_original_input = False  # type: ignore[assignment]
    fp8.keep_inputs_as_given(layers)
    assert layers[0].save_original_input is True and not hasattr(layers[1], "save_original_input")


_PARALLEL = parallel_of()


def test_places_are_padded_to_a_multiple_of_16() -> None:
    tokens = np.arange(1, 38)
    rows = [Row(tokens, np.full(37, -1), np.ones(37, bool), 0)]
    made = [
        MicroBatch.make(
            rows,
            num_samples=1,
            prefix_sharing=True,
            parallel=_PARALLEL,
            context_parallel=False,
            alignment=fp8.alignment(config.training),
        )
        for config in (Config(), _config())
    ]
    # The last token predicts nothing.
    assert [batch.inputs.tokens_1s.shape[1] for batch in made] == [36, 48]
    # What is padded has no loss.
    assert torch.equal(made[0].inputs.loss_places_N, made[1].inputs.loss_places_N)


def test_the_estimate_counts_fp8_copies_of_weights_and_padding() -> None:
    plain, quantized = (
        Activations(SHAPE, config, _PARALLEL, tokens=100, is_first=True, is_last=True, on_cuda=True)
        for config in (_config(training={"fp8_format": None}), _config())
    )
    # 48 x (48 + 2 x 24) for the attention, 48 x 48, and 3 x 48 x 96 for the MLP.
    weights = 48 * 96 + 48 * 48 + 3 * 48 * 96
    # Padded to 112 places: in bf16 two layer inputs, queries, keys, values, output; in fp32 two norms and four heads.
    place = (2 * 48 + 48 + 24 + 24 + 48) * 2 + (2 + 4) * 4
    assert plain.without_mlp == 100 * place
    assert quantized.without_mlp == 112 * place + 2 * weights
    peaks = [a.peak(4, whole_layers=0, recompute_up=True).total for a in (plain, quantized)]
    # Of each layer's weights, and of the first product's gradient and input while it is computed.
    assert peaks[1] - peaks[0] > 4 * 2 * weights


# --------------------------------------------------------------------------------------------------
# Recomputation
# --------------------------------------------------------------------------------------------------

_active: list[bool] = []


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As an FP8 matrix scaled by its own largest number."""
    scale = torch.finfo(dtype).max / x.abs().max()
    return (x * scale).to(dtype).to(x.dtype) / scale


class _Product(torch.autograd.Function):
    """Keeps its input as it was given, and remembers whether it was in FP8, as Transformer Engine's linear layer does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.fp8 = bool(_active)
        if ctx.fp8:
            x, weight = (_rounded(t, torch.float8_e4m3fn) for t in (x, weight))
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        if ctx.fp8:
            grad = _rounded(grad, torch.float8_e5m2)
            x, weight = (_rounded(t, torch.float8_e4m3fn) for t in (x, weight))
        return grad @ weight, grad.flatten(0, -2).t() @ x.flatten(0, -2)


class _Linear(torch.nn.Module):
    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(outputs)))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return _Product.apply(x, self.weight), None


class _Scaled(_Linear):
    """Its output is too large by a factor."""

    def __init__(self, outputs: int, inputs: int, scale: float) -> None:
        super().__init__(outputs, inputs)
        self._scale = scale
        self.save_original_input = False

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0] * self._scale


@contextlib.contextmanager
def _fp8_context(config: Any) -> Iterator[None]:
    assert config.fp8 == "hybrid"
    _active.append(True)
    try:
        yield
    finally:
        _active.pop()


def _gradients(*, recompute_up: bool, quantized: bool) -> list[Tensor]:
    """Output of an MLP and its gradients; the backward is outside of the forward's context, as in a training step."""
    mlp = GatedMLP.__new__(GatedMLP)
    torch.nn.Module.__init__(mlp)
    config: Any = SimpleNamespace(fp8="hybrid" if quantized else None)
    mlp.config, mlp.recompute_up = config, recompute_up
    mlp.linear_fc1, mlp.linear_fc2 = _Linear(24, 16), _Linear(16, 12)
    x = torch.randn(5, 1, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with _fp8_context(config) if quantized else contextlib.nullcontext():
        out, _ = mlp(x)
    out.backward(torch.linspace(-1, 2, out.numel()).view_as(out))
    found = [out, x.grad, mlp.linear_fc1.weight.grad, mlp.linear_fc2.weight.grad]
    return [t.detach() for t in found if t is not None]


def test_a_first_product_that_is_computed_again_gives_the_same_bits_in_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "get_fp8_context", _fp8_context)
    kept, again = (_gradients(recompute_up=up, quantized=True) for up in (False, True))
    assert len(kept) == 4 and all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    plain = _gradients(recompute_up=True, quantized=False)
    assert all(not torch.equal(a, b) for a, b in zip(kept, plain, strict=True))
    # Outside of the context it would have other numbers than the forward had.
    monkeypatch.setattr(fp8, "get_fp8_context", lambda _: contextlib.nullcontext())
    other = _gradients(recompute_up=True, quantized=True)
    assert torch.equal(other[0], kept[0])
    assert not any(torch.equal(a, b) for a, b in zip(kept[2:], other[2:], strict=True))


def test_in_a_model_every_layer_of_a_training_forward_is_in_fp8_and_what_is_computed_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """megatron-core's block opens a context per layer, the backward one per first product; without gradients there is none."""
    opened: list[str] = []

    def context(config: Any, layer: int | None = None, **_: Any) -> Any:
        assert config.fp8 == "hybrid"
        opened.append("again" if layer is None else f"layer {layer}")
        return contextlib.nullcontext()

    monkeypatch.setattr(fp8, "get_fp8_context", context)
    monkeypatch.setattr(transformer_block, "get_fp8_context", context)
    plain = from_dict({"training": {"recompute_granularity": "selective", "recompute_modules": ("mlp_up",)}}, "test")
    tokens = np.arange(1, 20)
    with process_groups.alone():
        parallel = process_groups.set_up()
        (model,) = build_model(SHAPE, plain, parallel)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        # The local layers know nothing of FP8; the settings are those of a run with it.
        model.config.fp8, model.config.fp8_recipe = "hybrid", "tensorwise"
        inputs = MicroBatch.make(
            [Row(tokens, np.full(19, -1), np.ones(19, bool), 0)],
            num_samples=1,
            prefix_sharing=True,
            parallel=parallel,
            context_parallel=False,
        ).inputs
        rotary = rotary_of(SHAPE, SHAPE.rotary_base)
        with torch.no_grad():
            model(inputs, rotary)
        assert opened == []
        model(inputs, rotary).sum().backward()
        assert opened == [f"layer {n}" for n in range(4)] + ["again"] * 4
        process_groups.destroy_groups()
