"""The doctor on one process: faults in kernels are named, lines of ranks are put together, records are read, memory and disk."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_longpo.config import Config, from_dict
from megatron_longpo.doctor import checkpoints, resources
from megatron_longpo.doctor import kernels as doctor_kernels
from megatron_longpo.doctor import run as doctor_run
from megatron_longpo.doctor.bounds import bounds_of
from megatron_longpo.doctor.calls import PACKED, SINGLE, block_calls
from megatron_longpo.doctor.collectives import collective_checks, link_of
from megatron_longpo.doctor.examination import Check, Examination
from megatron_longpo.doctor.findings import EXIT_STATUS, Line, Report, by_error, merged, ranges
from megatron_longpo.doctor.kernels import Device, kernel_checks
from megatron_longpo.doctor.ranks import Ranks
from megatron_longpo.doctor.resources import Wanted, resource_checks
from megatron_longpo.doctor.run import Order, examine
from megatron_longpo.doctor.steps import Numbers, layouts
from megatron_longpo.errors import ConfigError, PlatformError
from megatron_longpo.model import kernels, layers, logprobs
from megatron_longpo.model.kernels import (
    BlockInputs,
    CpuFlash,
    CudaFlash,
    CudaFused,
    CudaLargestFused,
    CudaMemoryEfficient,
)
from megatron_longpo.model.rotary import Rotary
from megatron_longpo.runtime import machine_record, platform, products
from megatron_longpo.runtime.machine_record import Record, WrongKernel, machine_of, read_record, write_record
from megatron_longpo.runtime.platform import DeviceFacts, links_in
from megatron_longpo.simulation.fallback import estimate
from megatron_longpo.simulation.request import Card, Request
from megatron_longpo.training.preflight import refuse_wrong_kernels
from tests.unit.test_kernels import _Operators


def examined(checks: list[Check], seconds: float = 30.0) -> dict[str, Line]:
    """Lines of checks by name, as a world of one finds them."""
    report = Report()
    examination = Examination(
        Ranks.alone(), report, check_seconds=seconds, on_change=lambda _: None, on_end=lambda _: None
    )
    examination.run(checks, seconds=seconds)
    return {line.name: line for line in examination.close()}


# --------------------------------------------------------------------------------------------------
# Kernels
# --------------------------------------------------------------------------------------------------

_FORWARD, _BACKWARD = CpuFlash.forward, CpuFlash.backward


def _strides_swapped(self: CpuFlash, block: BlockInputs) -> Any:
    q = block.q
    if q.storage_offset():
        # It might read past the end.
        return _FORWARD(self, block)
    wrong = q.as_strided(q.shape, (q.stride(1), q.stride(0), 1))
    return _FORWARD(self, dataclasses.replace(block, q=wrong))


def _delta_misread(self: CpuFlash, block: BlockInputs, grad_out: Any, out: Any, lse: Any) -> Any:
    # Rows as far apart as one key-value head's queries are wide: what the memory-efficient kernel does.
    group = block.q.shape[1] // block.k.shape[1]
    wrong = out.as_strided(out.shape, (group * out.shape[2], out.stride(1), 1))
    return _BACKWARD(self, block, grad_out, wrong, lse)


def _without_epsilon(norm: Any) -> Callable[..., Any]:
    return staticmethod(lambda ctx, x, weight, eps: norm(ctx, x, weight, 0.0))  # type: ignore[return-value]


def _last_chunk_dropped(pieces: Any) -> Callable[..., Any]:
    def shortened(*args: Any) -> Any:
        found = list(pieces(*args))
        return iter(found[:-1] or found)

    return shortened


_COS_SIN = Rotary.cos_sin
FAULTS: dict[str, tuple[str, list[tuple[Any, str, Any]]]] = {
    "two strides swapped": ("attention flash", [(CpuFlash, "forward", _strides_swapped)]),
    "delta misread": ("attention flash", [(CpuFlash, "backward", _delta_misread)]),
    "maximum for log-sum-exp": ("merged blocks", [(torch, "logaddexp", torch.maximum)]),
    "merged log-sum-exps that are NaN": ("merged blocks", [(torch, "logaddexp", lambda a, b: a + b * torch.nan)]),
    "rotary off by one": (
        "rotary embedding",
        [(Rotary, "cos_sin", lambda self, positions, dtype: _COS_SIN(self, positions + 1, dtype))],
    ),
    "norm without epsilon": (
        "norm",
        [(layers._RMSNormFunction, "forward", _without_epsilon(layers._RMSNormFunction.forward))],
    ),
    "norm without weight": (
        "norm",
        [(layers, "_normalised", lambda x, weight, scale, eps: (x.float() * scale).to(x.dtype))],
    ),
    "norm that gives NaN": ("norm", [(layers, "_normalised", lambda x, weight, scale, eps: x * torch.nan)]),
    "gate without sigmoid": (
        "gate of the MLP",
        [(layers, "_activated", lambda both: both.chunk(2, -1)[0] * both.chunk(2, -1)[1])],
    ),
    "a chunk dropped": ("log-probs", [(logprobs._Rows, "pieces", _last_chunk_dropped(logprobs._Rows.pieces))]),
    "known gradient not scaled": (
        "log-probs",
        [(logprobs, "_add_product", lambda total, grad, hidden: total.add_(grad.t().float() @ hidden.float() * 0.5))],
    ),
}


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_a_fault_in_a_kernel_is_named_by_its_line_and_no_other(
    monkeypatch: pytest.MonkeyPatch, fault: str | None
) -> None:
    expected, patches = FAULTS[fault] if fault else ("", [])
    for where, name, value in patches:
        monkeypatch.setattr(where, name, value)
    checks = [c for c in kernel_checks("auto") if c.name.endswith("float32") and "unfused" not in c.name]
    found = examined(checks)
    assert len(found) == len(checks) == 6
    assert [name for name, line in found.items() if line.status != "pass"] == (
        [f"{expected}, float32"] if fault else []
    )
    if fault:
        assert found[f"{expected}, float32"].remedy and "off by" in found[f"{expected}, float32"].detail


def test_gradients_of_weights_that_are_rounded_before_they_are_added_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    (check,) = [c for c in kernel_checks("auto") if c.name == "gradients of weights, bfloat16"]
    assert examined([check])[check.name].status == "pass"

    def rounded(total: torch.Tensor, grad: torch.Tensor, given: torch.Tensor) -> None:
        total += grad.t() @ given

    monkeypatch.setattr(products, "add_product", rounded)
    line = examined([check])[check.name]
    assert line.status == "fail" and line.remedy == "--no-gradient-accumulation-fusion"


@pytest.mark.parametrize(
    "kernel", [CudaFlash(), CudaFused(), CudaMemoryEfficient(), None], ids=lambda k: k.name if k else "a view"
)
def test_kernels_for_cuda_are_given_the_calls_of_real_layouts(monkeypatch: pytest.MonkeyPatch, kernel: Any) -> None:
    """On stand-ins for torch's operators, which read memory as those do."""
    _Operators().install(monkeypatch)
    device = Device(torch.device("cpu"), "small", (torch.float32,))
    if kernel is None:
        # As version 0.1.0 handed it over.
        monkeypatch.setattr(kernels, "rows_of_groups", kernels._grouped)
    # The packed calls of whole models would take long here.
    monkeypatch.setattr(doctor_kernels, "block_calls", lambda size, _: block_calls(size, SINGLE)[::3])
    errors = doctor_kernels.attention_errors(kernel or CudaMemoryEfficient(), torch.float32, device)
    assert errors.keys() == {"output", "log-sum-exp", "dQ", "dK", "dV"}
    bound = bounds_of(torch.float32, "cpu").kernel
    assert (max(errors["dQ"], errors["dK"]) <= bound) == (kernel is not None)
    assert max(errors["output"], errors["log-sum-exp"], errors["dV"]) <= bound


def test_on_cuda_a_kernel_that_runs_would_use_must_be_there_and_others_need_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        Device, "current", lambda: Device(torch.device("cuda"), "large", (torch.bfloat16, torch.float32))
    )

    def missing(*_: Any) -> Any:
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")

    monkeypatch.setattr(doctor_kernels, "attention_errors", missing)

    def statuses(attention_backend: str) -> dict[str, str]:
        checks = [check for check in kernel_checks(attention_backend) if check.name.startswith("attention")]
        return {name.removeprefix("attention "): line.status for name, line in examined(checks).items()}

    found = statuses("auto")
    assert list(found) == [
        *("flash, bfloat16", "fused, bfloat16", "memory_efficient, bfloat16", "unfused, bfloat16"),
        *("memory_efficient, float32", "unfused, float32"),
    ]
    assert [name for name, status in found.items() if status == "fail"] == [
        "flash, bfloat16",
        "memory_efficient, float32",
    ]
    # What flash cannot do in fp32, a run that asks for it is told at its start.
    assert [name for name, status in statuses("fused").items() if status == "fail"] == ["fused, bfloat16"]


def test_packed_calls_have_several_runs() -> None:
    assert all(len(call.lengths or ()) <= 1 for call in block_calls("large", SINGLE))
    packed = block_calls("large", PACKED)
    assert any(call.lengths and len(call.lengths) > 1 for call in packed)
    assert any(call.lengths is None for call in packed)
    # A slice within a wider tensor, and heads that are not next to each other.
    assert any(call.tensors["q"][2] > 0 for call in packed)


# --------------------------------------------------------------------------------------------------
# Lines
# --------------------------------------------------------------------------------------------------


def test_lines_of_ranks_become_the_worst_of_them() -> None:
    of_ranks = [
        [Line("a", "pass", "fast", figures={"bytes_per_second": 3.0, "error": 1.0})],
        [Line("a", "slow", "slower", figures={"bytes_per_second": 1.0, "error": 2.0}), Line("b", "pass")],
        [Line("a", "slow", "slower too", figures={"bytes_per_second": 2.0, "error": 0.5})],
    ]
    first, second = merged(of_ranks)
    assert (first.status, first.detail, first.ranks) == ("slow", "slower", (1, 2))
    assert first.figures == {"bytes_per_second": 1.0, "error": 2.0}
    assert (second.status, second.ranks) == ("pass", ())
    assert ranges([7, 0, 1, 2, 3]) == "0-3, 7"
    report = Report(lines=[first, second, Line("c", "skipped")])
    assert (report.status, EXIT_STATUS[report.status]) == ("slow", 3)
    report.lines.append(Line("d", "fail"))
    assert EXIT_STATUS[report.status] == 4
    assert EXIT_STATUS[Report(lines=[Line("c", "skipped")]).status] == 0


def test_an_error_that_is_not_a_number_fails(tmp_path: Path) -> None:
    line = by_error("x", {"a": float("nan")}, 1.0, remedy="r")
    assert line.status == "fail"
    Report(lines=[line]).write(tmp_path / "doctor.json")
    written = json.loads((tmp_path / "doctor.json").read_text(), parse_constant=pytest.fail)
    assert written["lines"][0]["figures"] == {"a": None}
    assert by_error("x", {"a": 0.9}, 1.0, remedy="r").status == "pass"


def test_a_check_that_raises_is_a_line_and_the_next_one_runs() -> None:
    def fails(_: Ranks) -> Any:
        yield Line("before", "pass")
        raise RuntimeError("CUDA error: an illegal memory access")

    found = examined([Check("broken", fails, "mend it"), Check("next", lambda _: [Line("next", "pass")])])
    assert {name: line.status for name, line in found.items()} == {"before": "pass", "broken": "fail", "next": "pass"}
    assert "illegal memory access" in found["broken"].detail and found["broken"].remedy == "mend it"


def test_optional_checks_are_left_out_when_the_time_is_over() -> None:
    checks = [Check(name, lambda _, n=name: [Line(n, "pass")], optional=name > "a") for name in "abc"]  # type: ignore[misc]
    found = examined(checks, seconds=0.0)
    assert found.keys() == {"a", "2 more"} and found["2 more"].status == "skipped"
    assert "b, c" in found["2 more"].detail


def test_layouts_of_a_number_of_ranks() -> None:
    assert [x.name for x in layouts(1)] == ["one process"]
    assert [x.name for x in layouts(2)] == [
        *("DP 2", "CP 2 a2a", "CP 2 allgather", "PP 2", "PP 2 interleaved", "TP 2", "TP 2 + SP"),
    ]
    # One kind: DP, CP in two forms, PP, TP with and without SP. Two kinds of two ranks: with CP twice as many, with PP also.
    four = [x.name for x in layouts(4)]
    assert len(four) == len(set(four)) == 6 + (2 + 2 + 1) + (4 + 2) + 2
    assert four[0] == "DP 4" and "TP 2 + SP, PP 2 interleaved" in four and "PP 2, CP 2 allgather" in four
    # Heads do not divide over three ranks.
    assert [x.name for x in layouts(3)] == ["DP 3", "CP 3 allgather"]
    for size in (6, 8, 16):
        for layout in layouts(size):
            assert (
                size % (layout.parallel["tensor_model_parallel_size"] * layout.parallel["context_parallel_size"]) == 0
            )


def test_groups_of_collectives_are_those_of_the_run_or_all_there_could_be() -> None:
    def names(world: int, local: int, **degrees: Any) -> list[str]:
        parallel = from_dict({"parallel": degrees}, "test").parallel
        return [c.name for c in collective_checks(parallel, world_size=world, local_size=local, links="")]

    assert names(1, 1) == []
    assert names(4, 2) == [f"collectives over {kind}" for kind in ("world", "TP", "CP", "DP", "PP")]
    assert names(4, 4, tensor_model_parallel_size=2, context_parallel_size=2) == [
        f"collectives over {kind}" for kind in ("world", "TP", "CP", "DP")
    ]


def test_the_slowest_link_of_a_group_counts() -> None:
    assert link_of([0, 1], 2, "NV18 x 7", on_cuda=False) == "gloo"
    assert link_of([0, 1], 2, "NV18 x 7", on_cuda=True) == "NVLink"
    assert link_of([0, 2], 2, "NV18 x 7", on_cuda=True) == "network"
    assert link_of([0, 1], 2, "NV12 x 1, SYS x 2", on_cuda=True) == "PCIe"
    assert link_of([2, 3], 2, "", on_cuda=True) == "PCIe"


# --------------------------------------------------------------------------------------------------
# Memory, disk
# --------------------------------------------------------------------------------------------------

_SHAPE = {
    "schema_version": 1,
    "family": "llama",
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 16,
    "vocab_size": 128,
    "layernorm_epsilon": 1e-5,
    "add_qkv_bias": False,
    "untie_embeddings_and_output_weights": True,
    "rotary_base": 1e4,
    "max_position_embeddings": 2048,
}
# 2 layers of 64 x (2 x 64 + 2 x 32) and 3 x 64 x 128, embedding and output layer of 128 x 64; fp32 weights and Adam's two states.
_CHECKPOINT = 12 * (2 * (64 * 192 + 3 * 64 * 128) + 2 * 128 * 64)


def test_memory_and_disk_for_the_model_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.json").write_text(json.dumps(_SHAPE))
    monkeypatch.setitem(resources._BYTES, "cpu", 2**20)

    def found(available: int) -> dict[str, Line]:
        monkeypatch.setattr(platform.Platform, "available_memory_bytes", lambda _: available)
        monkeypatch.setattr(resources, "free_bytes", lambda _: available)
        return examined(resource_checks(Wanted(Config(), str(tmp_path), None), tmp_path, world_size=1, local_size=2))

    enough = found(2**34)
    assert [line.status for line in enough.values()] == ["pass"] * 3
    # The model's own context.
    assert "2,4" in enough["memory for the model"].detail
    assert enough["disk space"].figures["checkpoint_bytes"] == _CHECKPOINT
    little = found(2**21)
    assert {name: line.status for name, line in little.items()} == {
        "memory for the model": "fail",
        "disk space": "pass",
        "disk speed": "pass",
    }
    assert "--context-parallel-size" in little["memory for the model"].remedy
    assert found(_CHECKPOINT - 1)["disk space"].status == "fail"
    # A disk that is full takes nothing: there is no speed to tell of, nor to divide by.
    full = found(3)
    assert (full["disk space"].status, full["disk speed"].status) == ("fail", "skipped")
    # Half of what is there, since two ranks share it.
    assert little["memory for the model"].figures["available_bytes"] == 2**20
    monkeypatch.setitem(resources._SLOWEST, "cpu", 1e6)
    assert found(2**34)["disk speed"].status == "slow"
    assert not list(tmp_path.glob("rates-*"))


def test_the_host_s_memory_counts_what_waits_there_in_training(tmp_path: Path) -> None:
    """Adam's fp32 weights, states and pinned gradients (twice): 20 bytes per weight; twice what one of two layers keeps."""
    (tmp_path / "model.json").write_text(json.dumps(_SHAPE))

    def waiting(training: dict[str, Any], optimizer: dict[str, Any], **more: Any) -> int:
        parallel = {"use_distributed_optimizer": True}
        config = from_dict(
            {"parallel": parallel, "training": {"bf16": True, **training}, "optimizer": optimizer}, "test"
        )
        request = Request(config.as_dict(), model=str(tmp_path), tokens=1000)
        return estimate(request, Card(), **more).host_bytes

    none, host = {"recompute_granularity": "none"}, {"optimizer_cpu_offload": True}
    assert waiting(none, {}) == 0
    optimizer = waiting(none, host)
    # A norm's weights are no part of a checkpoint's count above.
    assert optimizer == 20 * (_CHECKPOINT // 12 + 5 * 64)
    layer = waiting({**none, "cpu_offloading_num_layers": 1}, {})
    assert waiting({**none, "cpu_offloading_num_layers": 1}, host) == layer + optimizer
    # A rejected answer of 384 tokens beside the chosen row.
    places = 1000 - 1 + 384
    assert layer == 2 * places * (2 * (2 * 64 + 2 * 64 + 2 * 32 + 2 * 128) + 4 * (2 + 4))
    # All that there is are two layers recomputed as a whole; what the host has no room for is not chosen.
    full = {"recompute_granularity": "full", "recompute_method": "block", "cpu_offloading_num_layers": 1}
    assert waiting({**full, "recompute_num_layers": 2}, {}) == 0
    wanted = {"recompute_granularity": "auto", "cpu_offloading_num_layers": 1}
    assert waiting(wanted, {}) > 0 == waiting(wanted, {}, host_memory=1000)
    assert waiting(none, host, on_cuda=False) == 0

    wanted_run = Wanted(Config(), str(tmp_path), None)
    lines = [resources._host_line(wanted_run, n, world_size=2, local_size=2) for n in (0, 10**9, 10**15)]
    needed = [line.figures["needed_bytes"] for line in lines]
    assert needed[1] - needed[0] == 2 * 10**9 and lines[2].status == "fail"
    assert (
        "1.9 of it for activations and the optimizer" in lines[1].detail
        and "--optimizer-cpu-offload" in lines[2].remedy
    )


def test_without_a_model_memory_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(resources._BYTES, "cpu", 2**20)
    found = examined(resource_checks(Wanted(Config(), None, None), tmp_path, world_size=1, local_size=1))
    assert found["memory for the model"].status == "skipped" and "--hf" in found["memory for the model"].detail
    assert found["disk space"].status == "pass"


def test_weights_whose_copies_differ_are_a_line_of_the_checkpoint_and_not_an_error_of_one_rank() -> None:
    right = Numbers({}, {}, {})
    wrong = dataclasses.replace(right, trouble="decoder.weight: copies on ranks 0 and 1 differ")
    for resumed, saved in ((wrong, right), (right, wrong)):
        line = checkpoints._line("checkpoint", ({}, resumed), {}, saved, 1e-5)
        assert line.status == "fail" and "copies on ranks 0 and 1" in line.detail


def test_a_folder_that_is_none_is_refused_by_the_node_that_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others say so in a line, later: who ends before the ranks meet lets them wait."""
    order = Order(Wanted(Config(), None, None), tmp_path / "none", tmp_path / "doctor.json", 1.0, 1.0)
    with pytest.raises(ConfigError, match=r"none is not a folder; make it"):
        examine(order)
    monkeypatch.setenv("GROUP_RANK", "1")

    def reached(*_: Any) -> None:
        raise InterruptedError

    monkeypatch.setattr(doctor_run, "_by_itself", reached)
    with pytest.raises(InterruptedError):
        examine(order)


# --------------------------------------------------------------------------------------------------
# Records
# --------------------------------------------------------------------------------------------------

_WRONG = WrongKernel("attention/flash/bfloat16", "dQ is off by 7.6e-01", "--attention-backend memory_efficient")


def _session(kernels: Any, dtype: torch.dtype = torch.bfloat16, transformer_engine: bool = False) -> Any:
    model = SimpleNamespace(
        config=SimpleNamespace(params_dtype=dtype),
        attention=SimpleNamespace(kernels=kernels),
        implementation=SimpleNamespace(is_transformer_engine=transformer_engine),
    )
    return SimpleNamespace(chunks=[model], config=from_dict({"training": {"bf16": dtype == torch.bfloat16}}, "test"))


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Leaves a record of this machine, with changes to what it says of the machine."""
    monkeypatch.setenv(machine_record.VARIABLE, str(tmp_path / "record.json"))
    machine = machine_of(platform.CURRENT.name, platform.CURRENT.facts())

    def write(wrong: WrongKernel = _WRONG, **changes: str) -> None:
        found = Record(dataclasses.replace(machine, **changes), "2026-11-26T09:00:00+00:00", (wrong,))
        write_record(found, tmp_path / "record.json")
        assert read_record(tmp_path / "record.json") == found

    return write


def test_training_refuses_a_kernel_that_the_last_doctor_found_wrong(
    record: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record()
    with pytest.raises(PlatformError) as refusal:
        refuse_wrong_kernels(_session(CpuFlash()))
    for part in ("attention/flash/bfloat16", str(tmp_path / "record.json"), "2026-11-26", "dQ is off by 7.6e-01"):
        assert part in str(refusal.value)
    assert "--attention-backend memory_efficient" in str(refusal.value)
    # What auto may choose for a block counts as well.
    with pytest.raises(PlatformError):
        refuse_wrong_kernels(_session(CudaLargestFused()))
    # Other kernels, other types.
    refuse_wrong_kernels(_session(CudaMemoryEfficient()))
    refuse_wrong_kernels(_session(CpuFlash(), torch.float32))
    for kernel, session in (
        ("norm/bfloat16", _session(CpuFlash())),
        ("layers/transformer_engine", _session(CpuFlash(), transformer_engine=True)),
    ):
        record(dataclasses.replace(_WRONG, kernel=kernel))
        with pytest.raises(PlatformError, match=kernel):
            refuse_wrong_kernels(session)
    refuse_wrong_kernels(_session(CpuFlash()))
    # Products that add to fp32 sums are used on CUDA only, and by local layers only.
    record(dataclasses.replace(_WRONG, kernel="gradients of weights/bfloat16"))
    refuse_wrong_kernels(_session(CpuFlash()))
    with monkeypatch.context() as patch:
        patch.setattr(products, "are_fused", lambda _: True)
        with pytest.raises(PlatformError, match="gradients of weights/bfloat16"):
            refuse_wrong_kernels(_session(CpuFlash()))
        refuse_wrong_kernels(_session(CpuFlash(), transformer_engine=True))
        refuse_wrong_kernels(_session(CpuFlash(), torch.float32))
    record(dataclasses.replace(_WRONG, kernel="layers/transformer_engine"))
    monkeypatch.setenv(machine_record.VARIABLE, "ignore")
    refuse_wrong_kernels(_session(CpuFlash(), transformer_engine=True))


@pytest.mark.parametrize(
    "change",
    [{"host": "another"}, {"card": "A100"}, {"driver": "580.1"}, {"torch": "2.0"}, {"transformer_engine": "9"}],
)
def test_a_record_of_another_machine_is_not_used(record: Callable[..., None], change: dict[str, str]) -> None:
    record(**change)
    refuse_wrong_kernels(_session(CpuFlash()))


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"version": 2}', '{"version": 1, "machine": {}, "date": "", "wrong": []}']
)
def test_a_damaged_record_keeps_nobody_from_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    (tmp_path / "record.json").write_text(content)
    monkeypatch.setenv(machine_record.VARIABLE, str(tmp_path / "record.json"))
    refuse_wrong_kernels(_session(CpuFlash()))


def test_the_record_is_in_the_cache_folder_under_the_host_s_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(machine_record.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = machine_record.record_path()
    assert path is not None and path.parent == tmp_path / "megatron_longpo"
    assert path.name == f"doctor-{os.uname().nodename}.json"


def test_links_are_read_from_the_topology() -> None:
    topology = (
        "\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\x1b[0m\n"
        "GPU0\t X \tNV18\tPHB\tPIX\t0-47\n"
        "GPU1\tNV18\t X \tPHB\tSYS\t0-47\n"
        "GPU2\tPHB\tPHB\t X \tSYS\t0-47\n"
        "NIC0\tPIX\tSYS\tSYS\t X \t\n\nLegend:\n\n  X    = Self\n"
    )
    assert links_in(topology) == "NV18 x 1, PHB x 1"
    assert links_in("") == links_in("GPU0\t X \t0-47\n") == ""
    assert DeviceFacts("x", 1).links == ""


def test_what_was_wrong_stays_in_the_record_until_it_is_examined_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "record.json"
    monkeypatch.setenv(machine_record.VARIABLE, str(path))
    wrong = tuple(WrongKernel(kernel, "off", "a flag") for kernel in ("norm/float32", "attention/flash/bfloat16"))
    here = machine_of(platform.CURRENT.name, platform.CURRENT.facts())
    write_record(Record(here, "2026-01-01", wrong), path)
    # As after a hang: what came later was left out.
    lines = [
        Line("norm", "pass", kernel="norm/float32"),
        Line("attention", "skipped", kernel="attention/flash/bfloat16"),
    ]
    doctor_run._record(lines, 1)
    found = read_record(path)
    assert found is not None and found.wrong == wrong[1:]
    write_record(Record(dataclasses.replace(here, host="another"), "2026-01-01", wrong), path)
    doctor_run._record(lines, 1)
    found = read_record(path)
    assert found is not None and found.wrong == ()
