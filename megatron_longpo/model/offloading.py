"""Activations in host memory: what some layers of a stage save for their backward waits there (``cpu_offloading_num_layers``).

Copies run on streams of their own, one layer behind in the forward and one layer ahead in the backward:

- What a layer saves is copied to pinned host memory while the rest of the layer and the next one are computed. When the next
  layer is done, the computing stream waits for the copies, and the tensors are freed.
- When the gradient of that next layer's output arrives, the copies back begin; the layer's own backward waits for them.

So no more than two of these layers are on the device at a time. Nothing is lost by it where computing a layer takes longer than
copying what it saves, which at 128K tokens is so: computing grows with the square of the length. On the CPU the same code runs,
in order.

A tensor that several operations save is copied once; weights, and tables that all layers share, are not copied at all. What the
recomputation of a layer starts from (``layers.recompute_in_backward``) is held by ``keep``, since a plain reference would stay
on the device.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_longpo.runtime import platform

# Smaller tensors stay on the device: copying them would not pay.
_LEAST_BYTES = 4096


class _Kept:
    """A tensor of a layer: on the device, in host memory, or in both while it is copied."""

    def __init__(self, tensor: Tensor, traffic: platform.HostTraffic) -> None:
        self.shape = tensor.shape
        self.on_device: Tensor | None = tensor.detach()
        self.on_host: Tensor | None = traffic.send(tensor)


class SavedLayer:
    """What one layer saves in one forward.

    Args:
        traffic: streams for the copies.
        excluded: addresses of tensors that are not copied.
    """

    def __init__(self, traffic: platform.HostTraffic, excluded: Iterable[int]) -> None:
        self._traffic, self._excluded = traffic, frozenset(excluded)
        # While the layer is computed nothing that it has saved is freed, so addresses do not come twice.
        self._by_address: dict[tuple[int, int, torch.dtype], _Kept] = {}
        # What the backward no longer needs is gone, with its place in host memory.
        self._kept: weakref.WeakSet[_Kept] = weakref.WeakSet()
        self._copied: Any = None
        self._arrived: Any = None

    def pack(self, tensor: Tensor) -> Any:
        """What autograd keeps in place of a tensor."""
        address = tensor.data_ptr()
        if (
            address in self._excluded
            or not tensor.is_contiguous()
            or tensor.numel() * tensor.element_size() < _LEAST_BYTES
        ):
            return tensor
        key = (address, tensor.numel(), tensor.dtype)
        if key not in self._by_address:
            self._by_address[key] = _Kept(tensor, self._traffic)
            self._kept.add(self._by_address[key])
        return self._by_address[key], tensor.shape

    def unpack(self, kept: Any) -> Tensor:
        """The tensor, on the device."""
        if isinstance(kept, Tensor):
            return kept
        found, shape = kept
        if found.on_device is None:
            self.fetch()
        self._traffic.wait(self._arrived)
        self._arrived = None
        tensor: Tensor = found.on_device
        return tensor.view(shape)

    def computed(self) -> None:
        """The layer has been computed: all copies are under way."""
        self._copied = self._traffic.mark_sent()
        self._by_address.clear()

    def release(self) -> None:
        """Free what was copied on the device; it may be used again when the copies are done."""
        self._traffic.wait(self._copied)
        for kept in self._kept:
            kept.on_device = None

    def fetch(self) -> None:
        """Begin to copy what the backward still needs to the device."""
        for kept in self._kept:
            if kept.on_device is None:
                assert kept.on_host is not None
                kept.on_device, kept.on_host = self._traffic.bring_back(kept.on_host), None
        self._arrived = self._traffic.mark_received()


# The layer that is being computed, if what it saves goes to host memory.
_current: list[SavedLayer] = []


def keep(tensor: Tensor) -> Callable[[], Tensor]:
    """Hold a tensor for a recomputation in the backward, where the layer's saved tensors are.

    Returns:
        A function that gives it, on the device.
    """
    tensor = tensor.detach()
    if not _current or not torch.is_grad_enabled():
        return lambda: tensor
    layer = _current[-1]
    kept = layer.pack(tensor)
    return lambda: layer.unpack(kept)


class HostActivations:
    """Offloads layers of one model chunk, in the order in which they are computed.

    Args:
        first, count: number of the first layer, and how many layers.
    """

    def __init__(self, first: int, count: int) -> None:
        self._first, self._count = first, count
        self._traffic = platform.HostTraffic()
        self._before: SavedLayer | None = None

    def run(
        self, number: int, compute: Callable[[], tuple[Tensor, Any]], shared: Sequence[Tensor]
    ) -> tuple[Tensor, Any]:
        """Compute a layer.

        Args:
            number: number of the layer in the chunk.
            compute: computes it; the first of its results is the hidden states.
            shared: weights, and tables that other layers use too.
        """
        if not torch.is_grad_enabled() or not self._first <= number <= self._first + self._count:
            return compute()
        before = None if number == self._first else self._before
        self._before = None
        if number < self._first + self._count:
            self._before = layer = SavedLayer(self._traffic, (x.data_ptr() for x in shared))
            _current.append(layer)
            try:
                with torch.autograd.graph.saved_tensors_hooks(layer.pack, layer.unpack):
                    found = compute()
            finally:
                _current.pop()
            layer.computed()
        else:
            found = compute()
        if before is not None:
            before.release()
            fetch = before.fetch
            found[0].register_hook(lambda _: fetch())
        return found
