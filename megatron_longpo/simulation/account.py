"""What a step does to a GPU, counted operator by operator: live bytes, operations, exchanges, host waits, kernels.

``Account`` stands above torch's fake tensors, which have shapes, strides, types and a device, but no numbers. It sees every
operator that the training code calls, in the forward and in the backward.

Small tensors that come from the host (indices, lengths, positions) keep their numbers beside the fake ones, and whatever is
computed from nothing else does as well. So ``nonzero`` finds what it would find, and lengths are known where a kernel is called.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib
import sys
import threading
import weakref
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter, tree_map

from megatron_longpo.simulation.places import Place, kind_of

# torch's caching allocator hands out multiples of this.
_BLOCK = 512
# Numbers of tensors with more elements are not kept.
_LARGEST_KNOWN = 2**22
# Points of the curve of live bytes.
_POINTS = 3000
_HERE = str(Path(__file__).parent)
# A product belongs to whoever asks for it.
_PRODUCTS = str(Path(__file__).parent.parent / "runtime" / "products.py")
_PACKAGE = str(Path(__file__).parent.parent.parent)


@dataclass
class Exchange:
    """All calls of one collective in one group.

    Attributes:
        calls: number of calls.
        sent: bytes that this rank sends, by the ring or pairwise algorithm.
    """

    calls: int = 0
    sent: int = 0


@dataclass
class Peak:
    """The moment with the most live bytes.

    Attributes:
        live: bytes.
        place: where the training code was.
        operator: what it called.
        phase: part of the step.
        kinds, places: live bytes by kind and by place of allocation.
    """

    live: int = 0
    place: str = ""
    operator: str = ""
    phase: str = ""
    kinds: dict[str, int] = field(default_factory=dict)
    places: dict[str, int] = field(default_factory=dict)


@dataclass
class Curve:
    """Live bytes by kind over the operators, thinned out evenly."""

    every: int = 1
    at: list[int] = field(default_factory=list)
    live: array[int] = field(default_factory=lambda: array("q"))
    kinds: list[dict[str, int]] = field(default_factory=list)
    phases: list[str] = field(default_factory=list)

    def add(self, number: int, live: int, kinds: dict[str, int], phase: str) -> None:
        if number % self.every:
            return
        self.at.append(number)
        self.live.append(live)
        self.kinds.append({k: v for k, v in kinds.items() if v})
        self.phases.append(phase)
        if len(self.at) > _POINTS:
            self.every *= 2
            keep = [i for i, n in enumerate(self.at) if n % self.every == 0]
            self.at, self.kinds = [self.at[i] for i in keep], [self.kinds[i] for i in keep]
            self.phases = [self.phases[i] for i in keep]
            self.live = array("q", (self.live[i] for i in keep))


class Account(TorchDispatchMode):
    """Counts. Enter it above the fake mode; ``phase`` names what is going on."""

    def __init__(self) -> None:
        super().__init__()
        # Not before torch's and megatron-core's functions have been replaced: it imports megatron-core.
        self._contracts: Any = importlib.import_module("megatron_longpo.model.contracts")
        self.phase = "set-up"
        self.live = 0
        self.kinds: collections.Counter[str] = collections.Counter()
        self.places: collections.Counter[str] = collections.Counter()
        self._blocks: dict[int, tuple[int, str, str]] = {}
        self._lock = threading.RLock()
        self._hidden = 0
        self.pinned = 0
        # Numbers of a received shape, by what the peers send: set by the world (world.py).
        self.received: Callable[[Tensor], Tensor | None] = lambda _: None
        self.group_name: Callable[[Any], str] = lambda _: "?"
        self.reset()

    def reset(self) -> None:
        """Forget what was counted; what is live stays."""
        self.operators = 0
        self.pinned_peak = self.pinned
        self.peaks: dict[str, Peak] = {}
        self.curve = Curve()
        self.flops: collections.Counter[str] = collections.Counter()
        self.exchanges: dict[tuple[str, str], Exchange] = collections.defaultdict(Exchange)
        self.waits: collections.Counter[tuple[str, str]] = collections.Counter()
        self.host_work: collections.Counter[str] = collections.Counter()
        self.kernels: collections.Counter[tuple[str, str]] = collections.Counter()
        self.violations: collections.Counter[tuple[str, str]] = collections.Counter()

    # ---------------------------------------------------------------------------------------------
    # Live bytes
    # ---------------------------------------------------------------------------------------------

    def note(self, tensor: Tensor, kind: str | None = None) -> None:
        """Count the storage of a tensor, unless it is counted already; ``kind`` changes what it counts as."""
        if not isinstance(tensor, FakeTensor) or tensor.device.type != "cuda" or self._hidden:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // _BLOCK) * _BLOCK
        with self._lock:
            known = self._blocks.get(key)
            if known is not None and known[0] == size and kind is None:
                return
            if known is None:
                here = place()
                block = (size, kind or kind_of(here, self.phase), str(here))
                weakref.finalize(storage, self._gone, key).atexit = False
            else:
                self._subtract(known)
                block = (size, kind or known[1], known[2])
            self._blocks[key] = block
            self.live += block[0]
            self.kinds[block[1]] += block[0]
            self.places[block[2]] += block[0]

    def _gone(self, key: int) -> None:
        with self._lock:
            known = self._blocks.pop(key, None)
            if known is not None:
                self._subtract(known)

    def _subtract(self, block: tuple[int, str, str]) -> None:
        size, kind, where = block
        self.live -= size
        self.kinds[kind] -= size
        self.places[where] -= size
        if not self.places[where]:
            del self.places[where]

    def rename(self, old: str, new: str) -> None:
        """Count what is live of a kind as another."""
        with self._lock:
            for key, (size, kind, where) in self._blocks.items():
                if kind == old:
                    self._blocks[key] = (size, new, where)
            self.kinds[new] += self.kinds.pop(old, 0)

    def measure(self, operator: str, workspace: int = 0) -> None:
        """Compare live bytes with the peak of the phase."""
        peak = self.peaks.setdefault(self.phase, Peak(phase=self.phase))
        live = self.live + workspace
        if live > peak.live:
            peak.live, peak.place, peak.operator = live, str(place()), operator
            peak.kinds, peak.places = dict(self.kinds), dict(self.places)
            if workspace:
                peak.kinds["kernels' workspace"] = peak.places[f"workspace of {operator}"] = workspace
        self.curve.add(self.operators, live, self.kinds, self.phase)

    @contextlib.contextmanager
    def hidden(self) -> Iterator[None]:
        """Inside this context nothing is counted as live: a compiled function keeps its intermediate results in registers."""
        self._hidden += 1
        try:
            yield
        finally:
            self._hidden -= 1

    # ---------------------------------------------------------------------------------------------
    # Operators
    # ---------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name, _, overload = func.name().partition(".")
        if name == "aten::_local_scalar_dense" and isinstance(args[0], FakeTensor):
            return self._number(args[0])
        if name in ("aten::allclose", "aten::equal") and isinstance(args[0], FakeTensor):
            if args[0].is_cuda:
                self.wait("tensors are compared")
            return True
        if name == "aten::nonzero" and isinstance(args[0], FakeTensor):
            return self._nonzero(args[0])
        if name == "aten::_pin_memory":
            return self._pinned(args[0])
        if name == "profiler::_record_function_enter_new" and str(args[0]).startswith("longpo/"):
            self.phase = str(args[0]).removeprefix("longpo/").replace("_", " ")
        out = func(*args, **kwargs)
        if kwargs.get("pin_memory"):
            self._pin(out)
        self.operators += 1
        inputs = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_iter(out) if isinstance(x, Tensor)]
        if name.startswith("c10d::"):
            self._exchange(name, args)
        else:
            self._follow(func, name, args, kwargs, inputs, out, outputs)
        workspace = 0
        contract = self._contracts.contract_of(name, overload)
        if contract is not None:
            workspace = self._kernel(contract, name, overload, func, args, kwargs)
        for x in outputs:
            self.note(x)
        if not self._hidden:
            self.measure(name, workspace)
        return out

    def _kernel(self, contract: Any, name: str, overload: str, func: Any, args: Any, kwargs: Any) -> int:
        schema = func._schema.arguments
        arguments = {a.name: a.default_value for a in schema if a.has_default_value()}
        arguments |= dict(zip((a.name for a in schema), args, strict=False)) | kwargs
        call = self._contracts.Call(arguments, known)
        where = place()
        attention = "attention" in name
        # Known numbers are real tensors.
        with _disable_current_modes():
            flops, problems = contract.flops(call), list(contract.violations(call))
            workspace = int(contract.workspace(call))
        self.flops["attention" if attention else products_kind(where)] += flops
        for problem in problems:
            self.violations[f"{name}: {problem}", str(where)] += 1
        if attention or overload.startswith("dtype"):
            given = ", ".join(
                f"{k} {_described(v)}" for k, v in arguments.items() if isinstance(v, Tensor) and v.dim() > 1
            )
            runs = "" if arguments.get("is_causal") is None else f"; causal={arguments['is_causal']}"
            self.kernels[name, given + runs] += 1
        return workspace

    def _follow(
        self, func: Any, name: str, args: Any, kwargs: Any, inputs: list[Tensor], out: Any, outputs: list[Tensor]
    ) -> None:
        """Copies between host and device, work on the host, and numbers that are known."""
        on_gpu = any(x.is_cuda for x in outputs)
        crosses = bool(inputs) and on_gpu != any(x.is_cuda for x in inputs)
        if name in ("aten::_to_copy", "aten::copy_", "aten::lift_fresh", "aten::lift_fresh_copy") or crosses:
            self._copied(name, args, kwargs, outputs)
        elif outputs and not on_gpu and any(x.dim() for x in outputs) and name not in _VIEWS:
            self.host_work[f"{name} in {place()}"] += 1
        if not outputs:
            return
        mutable = func._schema.is_mutable
        if not inputs and name not in ("aten::lift_fresh", "aten::lift_fresh_copy"):
            return
        if all(known(x) is not None for x in inputs) and sum(x.numel() for x in inputs + outputs) <= _LARGEST_KNOWN:
            self._compute(func, args, kwargs, out)
        elif mutable:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
                    source = known(args[1]) if name == "aten::copy_" else None
                    if source is not None and value.numel() <= _LARGEST_KNOWN:
                        with _disable_current_modes():
                            _know(value, source.to(value.dtype).expand(value.shape).clone())
                    else:
                        value.__dict__.pop("_known", None)

    def _compute(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Compute an operator's numbers on the host, beside its fake result."""

        def real(x: Any) -> Any:
            if isinstance(x, Tensor):
                return known(x)
            return torch.device("cpu") if isinstance(x, torch.device) else x

        try:
            with _disable_current_modes(), torch.no_grad():
                found = func(*tree_map(real, args), **tree_map(real, kwargs))
        except (RuntimeError, NotImplementedError):
            return
        for x, value in zip(tree_iter(out), tree_iter(found), strict=True):
            if isinstance(x, FakeTensor) and isinstance(value, Tensor):
                _know(x, value)

    def _copied(self, name: str, args: Any, kwargs: Any, outputs: list[Tensor]) -> None:
        if name == "aten::copy_":
            target, source = args[0], args[1]
            non_blocking = bool(args[2]) if len(args) > 2 else bool(kwargs.get("non_blocking"))
        elif name == "aten::_to_copy":
            target, source, non_blocking = outputs[0], args[0], bool(kwargs.get("non_blocking"))
        elif name in ("aten::lift_fresh", "aten::lift_fresh_copy"):
            # torch.tensor([...], device="cuda") copies from pageable memory.
            if args[0].is_cuda and args[0].dim():
                self.wait("copy of a new tensor to the GPU")
            return
        else:
            return
        if source.is_cuda == target.is_cuda:
            return
        if source.is_cuda:
            if not non_blocking or not is_pinned(target):
                self.wait("copy to the host")
        elif not non_blocking:
            self.wait("copy to the GPU")
        elif not is_pinned(source):
            self.wait("copy to the GPU from pageable memory")

    def wait(self, what: str) -> None:
        """The host waits for the GPU here."""
        self.waits[what, str(place())] += 1

    def _number(self, x: Tensor) -> Any:
        if x.is_cuda:
            self.wait("a number is read")
        value = known(x)
        if value is not None:
            with _disable_current_modes():
                return value.item()
        if x.dtype == torch.bool:
            return True
        return 1.0 if x.is_floating_point() else 1

    def tolist(self, x: Tensor) -> Any:
        """``x.tolist()``: one wait, where fake tensors would read number by number."""
        if x.is_cuda:
            self.wait("numbers are read")
        value = known(x)
        with _disable_current_modes():
            return (torch.ones(x.shape, dtype=x.dtype) if value is None else value).tolist()

    def _nonzero(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            self.wait("nonzero")
        value = known(x)
        if value is None:
            raise NotImplementedError(f"nonzero of a tensor whose numbers are not known, in {place()}")
        with _disable_current_modes():
            found = value.nonzero()
        out = torch.empty(found.shape, dtype=torch.int64, device=x.device)
        _know(out, found)
        self.note(out)
        return out

    def _pinned(self, x: Tensor) -> Tensor:
        out, value = x.clone(), known(x)
        if value is not None:
            _know(out, value)
        self._pin(out)
        return out

    def _pin(self, x: Tensor) -> None:
        """Mark a host tensor as page-locked, and count its bytes as long as it lives."""
        x.__dict__["_pinned"] = True
        storage = x.untyped_storage()
        with self._lock:
            self.pinned += storage.nbytes()
            self.pinned_peak = max(self.pinned_peak, self.pinned)
        weakref.finalize(storage, self._unpinned, storage.nbytes()).atexit = False

    def _unpinned(self, size: int) -> None:
        with self._lock:
            self.pinned -= size

    def _exchange(self, name: str, args: Any) -> None:
        name = name.removeprefix("c10d::").strip("_")
        tensors = [x for x in tree_iter(args) if isinstance(x, Tensor)]
        group = next((a for a in args if isinstance(a, torch.ScriptObject)), None)
        if not tensors or group is None:
            return
        process_group = dist.ProcessGroup.unbox(group)
        ranks = process_group.size()
        if name in ("recv", "recv_any_source"):
            with _disable_current_modes():
                value = self.received(tensors[0])
            if value is not None:
                _know(tensors[0], value)
        largest = max(x.numel() * x.element_size() for x in tensors)
        share = {"allreduce": 2 * (ranks - 1) / ranks, "send": 1.0, "recv": 0.0, "broadcast": 1.0, "barrier": 0.0}
        found = self.exchanges[_COLLECTIVES.get(name, name), self.group_name(process_group)]
        found.calls += 1
        found.sent += int(largest * share.get(name, (ranks - 1) / ranks))
        for x in tensors:
            # ProcessGroupNCCL refuses other tensors; nothing on a CPU would show it.
            if not x.is_cuda or not x.is_contiguous():
                self.violations[
                    f"{name}: {_described(x)} on {x.device.type}, must be contiguous on the GPU", str(place())
                ] += 1


_VIEWS = frozenset(
    {"aten::view", "aten::slice", "aten::select", "aten::unsqueeze", "aten::squeeze", "aten::expand", "aten::detach"}
    | {"aten::alias", "aten::transpose", "aten::t", "aten::permute", "aten::split", "aten::as_strided", "aten::unbind"}
    | {"aten::_unsafe_view", "aten::lift_fresh"}
)
_COLLECTIVES = {
    "alltoall_base": "all_to_all",
    "allgather_base": "all_gather",
    "allgather": "all_gather",
    "reduce_scatter_base": "reduce_scatter",
    "allreduce": "all_reduce",
}


def products_kind(where: Place) -> str:
    """Whose matrix product it is."""
    return "log-probs" if where.file.endswith("model/logprobs.py") else "linear layers"


def known(x: Tensor) -> Tensor | None:
    """Numbers of a tensor, on the host, if they are known."""
    if isinstance(x, FakeTensor):
        return x.__dict__.get("_known") if x.constant is None else x.constant
    return x


def _know(x: Tensor, value: Tensor) -> None:
    x.__dict__["_known"] = value


def is_pinned(x: Tensor) -> bool:
    """Whether a host tensor is in page-locked memory."""
    return bool(x.__dict__.get("_pinned"))


def _described(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)} strides {list(x.stride())}"


def place() -> Place:
    """Where the training code is: the innermost frame that is its own or megatron-core's."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name.startswith("<"):
            # A comprehension is part of its function.
            frame = frame.f_back
            continue
        found = _place_in(frame.f_code)
        if found is not None:
            return Place(found[0], frame.f_lineno, found[1])
        frame = frame.f_back
    node = torch._C._current_autograd_node()
    return Place("autograd", 0, "" if node is None else node.name())


@functools.cache
def _place_in(code: Any) -> tuple[str, str] | None:
    name = code.co_filename
    if name.startswith(_HERE) or name == _PRODUCTS:
        return None
    if name.startswith(_PACKAGE):
        return name[len(_PACKAGE) + 1 :], code.co_name
    core = name.find("/megatron/core/")
    return (name[core + 1 :], code.co_name) if core >= 0 else None
