"""``torch.cuda`` of a card that is not there. Only for a process that does nothing but simulate; it is never undone."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from megatron_longpo.simulation.request import Card

DEVICE = torch.device("cuda", 0)
# What a context and its libraries take of a card's memory before training allocates anything.
CONTEXT_BYTES = 2**30


class _Nothing:
    """A stream or an event: everything runs in program order."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def record_event(self, *_: Any) -> _Nothing:
        return self

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        # ``Event.query()`` is asked whether the event has happened.
        return lambda *_, **__: True


def _answer(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


class Spellings(TorchFunctionMode):
    """What only a CUDA build of torch, or only a real tensor, understands.

    ``device=0``, as megatron-core writes it, means ``cuda:0``. ``torch.tensor([x, y])`` reads numbers from tensors where no mode
    sees it; here they are read one by one.
    """

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if type(kwargs.get("device")) is int:
            kwargs["device"] = torch.device("cuda", kwargs["device"])
        if func is torch.tensor and isinstance(args[0], list | tuple):
            args = (tree_map_only(FakeTensor, lambda x: x.item(), args[0]), *args[1:])
        return func(*args, **kwargs)


def install(card: Card) -> None:
    """Have ``torch.cuda`` answer for a card, and torch's fake tensors behave as real ones do where training relies on it."""
    cuda: Any = torch.cuda
    for name in ("_cuda_setDevice", "_cuda_getDevice", "_cuda_maybeExchangeDevice", "_cuda_exchangeDevice"):
        setattr(torch._C, name, _answer(0))
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "device_count": card.per_node,
        "current_device": 0,
        "mem_get_info": (card.memory_bytes - CONTEXT_BYTES, card.memory_bytes),
        "get_device_capability": card.capability,
        "get_device_name": "simulated GPU",
        "is_bf16_supported": True,
        "get_device_properties": types.SimpleNamespace(
            name="simulated GPU",
            major=card.capability[0],
            minor=card.capability[1],
            total_memory=card.memory_bytes,
            multi_processor_count=card.processors,
        ),
    }
    nothing = (
        "_lazy_init",
        "set_device",
        "empty_cache",
        "reset_peak_memory_stats",
        "ipc_collect",
        "manual_seed",
        "synchronize",
    )
    answers |= dict.fromkeys((*nothing, "manual_seed_all"))
    answers |= dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"), 0)
    for name, value in answers.items():
        setattr(cuda, name, _answer(value))
    for name in ("Stream", "Event", "current_stream", "default_stream"):
        setattr(cuda, name, _Nothing)
    cuda.stream = lambda *_, **__: _Nothing()
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda *_, **__: torch.default_generator.get_state()
        module.set_rng_state = _answer(None)
    cuda.default_generators = [torch.Generator()]
    torch.backends.cudnn.version = _answer(card.cudnn)  # type: ignore[assignment]

    fake_tensor.init_gpu_context = _answer(None)  # type: ignore[assignment]
    # As the mode decides by itself where there is no GPU.
    FakeTensorMode.avoid_device_init = property(_answer(True))  # type: ignore[assignment]
    # The optimizers and the clipping compare these names.
    type_ = torch.Tensor.type

    def with_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = type_(self, *args, **kwargs)
        if isinstance(found, str) and self.device.type == "cuda" and "cuda" not in found:
            return found.replace("torch.", "torch.cuda.", 1)
        return found

    torch.Tensor.type = with_cuda  # type: ignore[method-assign,assignment]
    # model/layers.py knows a tensor by the address of its storage, which fake storages do not have: here by the storage itself.
    torch.UntypedStorage.data_ptr = lambda self: self._cdata  # type: ignore[method-assign]
    address = torch.Tensor.data_ptr

    def data_ptr(self: torch.Tensor) -> int:
        if not isinstance(self, FakeTensor):
            return address(self)
        # Allocations begin at multiples of 512 bytes.
        return int(self.untyped_storage()._cdata * 512 + self.storage_offset() * self.element_size())

    torch.Tensor.data_ptr = data_ptr  # type: ignore[method-assign,assignment]
    module_to = torch.nn.Module.to

    def to(self: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        """A real parameter is given other data; a fake one cannot change its device, so it is made anew."""
        device = torch.device(args[0]) if args and isinstance(args[0], str | torch.device) else kwargs.get("device")
        if device is None:
            return module_to(self, *args, **kwargs)
        for module in self.modules():
            for name, old in list(module._parameters.items()):
                if isinstance(old, FakeTensor) and old.device.type != device.type:
                    new = torch.nn.Parameter(torch.empty_like(old, device=device), requires_grad=old.requires_grad)
                    # Megatron's marks, but not what makes it a fake tensor.
                    new.__dict__.update({k: v for k, v in old.__dict__.items() if k not in new.__dict__})
                    module._parameters[name] = new
        return self

    torch.nn.Module.to = to  # type: ignore[method-assign,assignment]
