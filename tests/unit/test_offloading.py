"""What layers save waits in host memory: freed one layer behind, back one layer ahead, the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_longpo.config import check, from_dict
from megatron_longpo.errors import ConfigError
from megatron_longpo.model import offloading
from megatron_longpo.model.layers import recompute_in_backward
from megatron_longpo.model.offloading import HostActivations, keep

_SIZE = 1024


class _Square(torch.autograd.Function):
    """Saves its input, and tells what the backward is given."""

    seen: list[tuple[int, Tensor]]

    @staticmethod
    def forward(ctx: Any, x: Tensor, number: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.number = number
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        _Square.seen.append((ctx.number, x))
        return 2 * x * grad, None


class _Traffic:
    """Writes down which layer's tensors are copied when; a layer's tensors hold its number."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []

    def send(self, tensor: Tensor) -> Tensor:
        self.log.append(("send", int(tensor[0])))
        return tensor.detach().clone()

    def bring_back(self, tensor: Tensor) -> Tensor:
        self.log.append(("back", int(tensor[0])))
        return tensor.clone()

    def mark_sent(self) -> str:
        return "sent"

    def mark_received(self) -> str:
        return "received"

    def wait(self, mark: str | None) -> None:
        if mark:
            self.log.append((f"wait {mark}", -1))


def _stack(host: HostActivations, layers: int) -> Tensor:
    """Layer i saves a tensor of its own, full of i."""
    hidden = torch.ones(_SIZE, requires_grad=True)

    def compute(number: int, hidden: Tensor) -> tuple[Tensor, None]:
        own = torch.full((_SIZE,), float(number), requires_grad=True)
        return hidden + _Square.apply(own * 1, number), None

    for number in range(layers):
        hidden, _ = host.run(number, lambda n=number, h=hidden: compute(n, h), [])  # type: ignore[misc]
    return hidden


def test_copies_go_one_layer_behind_and_come_one_layer_ahead() -> None:
    _Square.seen = []
    host = HostActivations(first=1, count=2)
    traffic: Any = _Traffic()
    host._traffic = traffic
    out = _stack(host, 5)
    # Layers 1 and 2 of five; the computing stream waits for a layer's copies when the next layer is done.
    assert traffic.log == [("send", 1), ("send", 2), ("wait sent", -1), ("wait sent", -1)]
    traffic.log.clear()
    out.sum().backward()
    # Layer 2 begins to come back with the gradient of layer 3's output, layer 1 with that of layer 2's.
    assert [x for x in traffic.log if x[0] == "back"] == [("back", 2), ("back", 1)]
    assert traffic.log.count(("wait received", -1)) == 2
    assert [(number, x[0].item()) for number, x in _Square.seen] == [(n, float(n)) for n in (4, 3, 2, 1, 0)]


def test_no_more_than_two_offloaded_layers_are_on_the_device() -> None:
    host = HostActivations(first=0, count=3)
    alive: list[list[bool]] = []
    refs: list[StorageWeakRef] = []
    hidden = torch.ones(_SIZE, requires_grad=True)

    def compute(hidden: Tensor) -> tuple[Tensor, None]:
        made = hidden.sin()
        refs.append(StorageWeakRef(made.untyped_storage()))
        return hidden + made * made, None

    for number in range(4):
        hidden, _ = host.run(number, lambda h=hidden: compute(h), [])  # type: ignore[misc]
        alive.append([not ref.expired() for ref in refs])
    # After each layer, whether what the layers saved is still on the device.
    assert alive == [[True], [False, True], [False, False, True], [False, False, False, True]]


def _gradients(host: HostActivations | None) -> list[Tensor]:
    torch.manual_seed(0)
    weights = [torch.randn(64, 64, requires_grad=True) for _ in range(4)]
    x = torch.randn(64, 64, requires_grad=True)
    hidden = x

    def compute(hidden: Tensor, weight: Tensor) -> tuple[Tensor, None]:
        # As the layers do: the product's input is computed again from the layer's input.
        normed = hidden.tanh()
        held = keep(hidden)
        with recompute_in_backward(normed, lambda: held().tanh()):
            return hidden + normed @ weight, None

    for number, weight in enumerate(weights):
        if host is None:
            hidden, _ = compute(hidden, weight)
        else:
            hidden, _ = host.run(number, lambda h=hidden, w=weight: compute(h, w), [weight])  # type: ignore[misc]
    return list(torch.autograd.grad(hidden.square().sum(), [x, *weights]))


def test_gradients_are_the_same_to_the_bit_and_weights_stay() -> None:
    host = HostActivations(first=0, count=3)
    sent: list[tuple[int, ...]] = []
    send = host._traffic.send
    host._traffic.send = lambda x: sent.append(x.shape) or send(x)  # type: ignore[func-returns-value,method-assign]
    for found, expected in zip(_gradients(host), _gradients(None), strict=True):
        assert torch.equal(found, expected)
    # The result of tanh, and the input that it is recomputed from; no weight.
    assert len(sent) == 2 * 3


def test_without_gradients_nothing_is_copied() -> None:
    host = HostActivations(first=0, count=1)
    host._traffic = None  # type: ignore[assignment]
    with torch.no_grad():
        assert host.run(0, lambda: (keep(torch.ones(_SIZE))(), None), [])[0].sum() == _SIZE
    assert offloading._current == []


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"cpu_offloading_num_layers": -1}, r"cpu_offloading_num_layers=-1 must not be negative; 0 turns it off"),
        (
            {"cpu_offloading_num_layers": 2, "recompute_granularity": "full"},
            r"recompute_method=uniform recomputes all of them; use recompute_method=block",
        ),
    ],
)
def test_what_cannot_wait_is_refused(training: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(from_dict({"training": training}, "test"))
