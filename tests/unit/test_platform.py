"""What the platform does on CUDA, as far as a machine without a GPU can see it."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_longpo.config import Config
from megatron_longpo.runtime import platform as platform_module
from megatron_longpo.runtime.platform import CURRENT, Platform
from megatron_longpo.training.optimization import follow_config
from megatron_longpo.training.reference import swapped_weights

CUDA = Platform("cuda", "nccl", "a test")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A card that is host memory, and the copies to and from it as pairs of (pinned, waited for)."""
    copies: list[Any] = []
    monkeypatch.setattr(Platform, "device", torch.device("cpu"))

    def to(self: torch.Tensor, *_: Any, non_blocking: bool = False, **__: Any) -> torch.Tensor:
        copies.append((getattr(self, "pinned", False), not non_blocking))
        return self

    def pin(self: torch.Tensor) -> torch.Tensor:
        self.pinned = True  # type: ignore[attr-defined]
        return self

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    return copies


def test_arrays_reach_the_card_in_one_pinned_copy_that_is_not_waited_for(card: list[Any]) -> None:
    arrays = {
        "tokens": np.arange(5),
        "grad": np.array([0.5, np.nan], np.float32),
        "nothing": np.zeros(0, np.int64),
        "table": np.arange(6, dtype=np.float64).reshape(3, 2).T,
    }
    found = CUDA.to_device(arrays)
    assert card == [(True, False)]
    for name, array in arrays.items():
        assert found[name].dtype == torch.from_numpy(array).dtype
        np.testing.assert_array_equal(found[name].numpy(), array)
    assert {t.storage_offset() * t.element_size() % 16 for t in found.values()} == {0}


@pytest.mark.parametrize(
    ("tensor", "capability", "before", "expected"),
    [(2, (9, 0), None, "1"), (2, (8, 0), "8", "8"), (2, (10, 0), None, None), (1, (9, 0), None, None)],
)
def test_kernels_start_in_order_under_tensor_parallelism(
    monkeypatch: pytest.MonkeyPatch, tensor: int, capability: tuple[int, int], before: str | None, expected: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    for name, value in (("CUDA_DEVICE_MAX_CONNECTIONS", before),):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    CUDA.start_kernels_in_order(tensor)
    found = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    assert found == expected


@pytest.mark.parametrize(
    ("name", "tera"),
    [("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312)],
)
def test_the_peak_of_a_known_card(monkeypatch: pytest.MonkeyPatch, name: str, tera: int) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert CUDA.peak_flops() == tera * 1e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some Other Card")
    assert CUDA.peak_flops() is None and CURRENT.peak_flops() is None


def test_deterministic_mode_leaves_what_the_user_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NVTE_ALLOW_NONDETERMINISTIC_ALGO"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    try:
        CURRENT.use_deterministic_algorithms()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and os.environ["NCCL_ALGO"] == "Tree"
    assert os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "0"


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, "backend:native"),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, None),
    ],
)
def test_segments_of_the_allocator_grow(
    monkeypatch: pytest.MonkeyPatch, before: dict[str, str], expected: str | None
) -> None:
    """Micro batches have different lengths; with segments of fixed size the memory between them is lost."""
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    platform_module._tune_cuda_allocator()
    assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF") == expected


def test_swapped_weights_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """And none of the copies is waited for."""
    waited: list[bool] = []
    copy_ = torch.Tensor.copy_

    def watched(self: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        waited.append(not non_blocking)
        return copy_(self, source, non_blocking)

    monkeypatch.setattr(torch.Tensor, "copy_", watched)
    model = torch.nn.Linear(3, 2)
    own = [p.detach().clone() for p in model.parameters()]
    frozen = [CURRENT.host_copy(p + 1) for p in model.parameters()]
    with swapped_weights([model], [frozen]):
        assert all(torch.equal(p, f) for p, f in zip(model.parameters(), frozen, strict=True))
    assert all(torch.equal(p, o) for p, o in zip(model.parameters(), own, strict=True))
    assert waited and not any(waited)


def test_a_step_count_that_torch_stored_is_an_integer() -> None:
    """Transformer Engine's Adam hands it to a kernel that takes no float."""
    inner = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    inner.param_groups[0]["step"] = 3.0
    follow_config(SimpleNamespace(chained_optimizers=[SimpleNamespace(optimizer=inner)]), Config())  # type: ignore[arg-type]
    assert type(inner.param_groups[0]["step"]) is int and inner.param_groups[0]["step"] == 3


def test_facts_of_a_card_come_from_torch_and_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="NVIDIA H200", total_memory=2**37, major=9, minor=0)
    monkeypatch.setattr(Platform, "device", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    asked = {"topo": "GPU0\t X \tNV18\t0-47\nGPU1\tNV18\t X \t0-47\n", "--query-gpu=driver_version": "580.159.04\n" * 2}
    monkeypatch.setattr(platform_module, "_nvidia_smi", lambda *arguments: asked[arguments[0]])
    found = CUDA.facts()
    assert (found.name, found.memory_bytes, found.capability, found.cards) == ("NVIDIA H200", 2**37, "9.0", 2)
    assert (found.driver, found.runtime, found.nccl, found.links) == ("580.159.04", "13.0", "2.27.5", "NV18 x 1")
    # Without nvidia-smi, as in some containers, only what it tells is missing.
    asked |= dict.fromkeys(asked, "")
    found = CUDA.facts()
    assert (found.name, found.driver, found.links) == ("NVIDIA H200", "", "")


def test_facts_of_a_cpu_name_no_driver() -> None:
    found = CURRENT.facts()
    assert found.memory_bytes > 2**20 and (found.driver, found.cards, found.links) == ("", 0, "")
