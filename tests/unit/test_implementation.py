"""Whose linear layers are chosen, and that a norm before any of them does not save its output."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_longpo.errors import ConfigError
from megatron_longpo.model import implementation
from megatron_longpo.model.implementation import LayerChoice, choose_layers
from megatron_longpo.model.layers import NormFirst


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    implementation._trouble.cache_clear()
    yield
    implementation._trouble.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, linear: Any) -> None:
    """A stand-in for Transformer Engine on a stand-in for a GPU."""
    card = SimpleNamespace(is_cuda=True, name="cuda", device=torch.device("cpu"))
    monkeypatch.setattr(implementation.platform, "CURRENT", card)
    package, engine = ModuleType("transformer_engine"), ModuleType("transformer_engine.pytorch")
    engine.Linear = linear  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformer_engine", package)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", engine)


def right(inputs: int, outputs: int, *, bias: bool, params_dtype: torch.dtype, device: torch.device) -> torch.nn.Linear:
    return torch.nn.Linear(inputs, outputs, bias=bias, dtype=params_dtype, device=device)


def wrong(*sizes: int, **more: Any) -> torch.nn.Linear:
    """Its backward forgets a row of the weight."""
    layer = right(*sizes, **more)
    layer.weight.register_hook(lambda grad: torch.cat([grad[:1] * 0, grad[1:]]))
    return layer


def failing(*_: Any, **__: Any) -> None:
    raise RuntimeError("no kernel image is available")


def test_without_a_gpu_the_layers_are_megatrons() -> None:
    choice = choose_layers("auto")
    assert choice.name == "local" and "needs CUDA" in choice.reason
    assert choose_layers("local") == LayerChoice(False, "transformer_impl=local")
    with pytest.raises(ConfigError, match=r"transformer_engine cannot be used: .* needs CUDA.*; use local or auto"):
        choose_layers("transformer_engine")


@pytest.mark.parametrize(
    ("linear", "name", "reason"),
    [
        (right, "transformer_engine", "it agrees with torch"),
        (wrong, "local", "differs from torch's by"),
        (failing, "local", "fails .*no kernel image"),
    ],
)
def test_transformer_engine_is_taken_where_it_computes_right(
    monkeypatch: pytest.MonkeyPatch, linear: Any, name: str, reason: str
) -> None:
    install(monkeypatch, linear)
    choice = choose_layers("auto")
    assert choice.name == name and re.search(reason, choice.reason)


class _Engine(torch.nn.Module):
    """As Transformer Engine's linear layer: a Function that saves its input."""

    def __init__(self, inputs: int, outputs: int, *, config: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(outputs, inputs))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.nn.functional.linear(x, self.weight), None


class _Normed(NormFirst, _Engine):
    """The norm before it."""


def test_a_norm_before_any_linear_layer_saves_only_its_input() -> None:
    torch.manual_seed(0)
    config = SimpleNamespace(layernorm_epsilon=1e-5, params_dtype=torch.float32, sequence_parallel=False)
    layer = _Normed(8, 6, config=config)
    assert set(dict(layer.named_parameters())) == {"weight", "layer_norm_weight"}
    with torch.no_grad():
        layer.layer_norm_weight.copy_(torch.rand(8) + 0.5)
    x, grad = torch.randn(5, 1, 8, requires_grad=True), torch.randn(5, 1, 6)
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out, _ = layer(x)
    # The input, and numbers per place; the norm's output would be as large as the input.
    assert {t.data_ptr() for t in saved if t.shape == x.shape} == {x.data_ptr()}
    found = torch.autograd.grad(out, (x, layer.weight, layer.layer_norm_weight), grad)
    plain = torch.nn.functional.rms_norm(x, (8,), layer.layer_norm_weight, 1e-5)
    expected = torch.autograd.grad(plain @ layer.weight.t(), (x, layer.weight, layer.layer_norm_weight), grad)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
