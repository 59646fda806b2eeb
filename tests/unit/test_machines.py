"""Machines as data: the files that come with the package, and what a file may hold."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.config import read_yaml
from megatron_longpo.errors import ConfigError
from megatron_longpo.planner.machine import FOLDER, load_machine, machine_from, machine_names, share_at
from megatron_longpo.planner.verify import card_of

# Memory, bandwidth in GB/s and dense bf16 TFLOP/s of the data sheets.
DATA_SHEETS = {
    "a100-40g": (40, 1555, 312),
    "a100-80g": (80, 2039, 312),
    "a800-80g": (80, 2039, 312),
    "b200": (180, 7700, 2250),
    "h100-pcie": (80, 2000, 756),
    "h100-sxm": (80, 3350, 989),
    "h200": (141, 4800, 989),
    "l40s": (48, 864, 362),
    "mi300x": (192, 5300, 1307),
    "rtx-4090": (24, 1008, 165.2),
}


@pytest.mark.parametrize("name", DATA_SHEETS)
def test_a_card_has_the_figures_of_its_data_sheet(name: str) -> None:
    machine = load_machine(name)
    memory, bandwidth, peak = DATA_SHEETS[name]
    # The driver keeps some, and "141 GB" of H200 are not GiB.
    assert 0.9 * memory < machine.memory_gib <= memory
    assert machine.memory_gb_per_s == bandwidth
    assert machine.peak_tflops["bfloat16"] == peak


@pytest.mark.parametrize(
    ("name", "capability"),
    [("a100-80g", (8, 0)), ("l40s", (8, 9)), ("h200", (9, 0)), ("b200", (10, 0)), ("cpu", (9, 0))],
)
def test_a_simulated_card_has_the_capability_of_the_machine(name: str, capability: tuple[int, int]) -> None:
    machine = load_machine(name)
    card = card_of(machine)
    assert (card.capability, card.memory_bytes) == (capability, int(machine.memory_bytes))
    assert card.per_node == machine.gpus_per_node


@pytest.mark.parametrize("name", [n for n in machine_names() if n != "cpu"])
def test_more_rows_and_longer_rows_are_not_slower_at_first_and_each_constant_has_a_source(name: str) -> None:
    machine = load_machine(name)
    rates = [machine.linear_flops_per_s("bfloat16", rows=2**n, width=4096) for n in range(4, 16)]
    assert rates == sorted(rates)
    # A product of few rows is bound by reading its weights: 16 rows are 16 operations per byte of a bf16 weight.
    assert rates[0] <= 1.01 * 16 * machine.memory_gb_per_s * 1e9
    attention = [machine.attention_flops_per_s("bfloat16", length=2**n, is_backward=False) for n in range(9, 15)]
    assert attention == sorted(attention)
    content = read_yaml(FOLDER / f"{name}.yaml")
    plain = {"schema_version", "name", "description", "device"}
    assert set(machine.sources) == set(content) - plain
    assert all(len(source) > 10 for source in machine.sources.values())


def test_the_rates_of_an_h200_are_those_that_were_measured_on_one() -> None:
    h200 = load_machine("h200")
    # docs/gpu.md: cuDNN, causal: TFLOP/s forward and backward.
    for length, forward, backward in ((16384, 649, 576), (32768, 656, 544), (131072, 583, 544)):
        assert h200.attention_flops_per_s("bfloat16", length=length, is_backward=False) == pytest.approx(
            forward * 1e12, rel=0.01
        )
        assert h200.attention_flops_per_s("bfloat16", length=length, is_backward=True) == pytest.approx(
            backward * 1e12, rel=0.01
        )


def test_a_share_is_linear_in_the_logarithm_of_the_size() -> None:
    curve = ((16.0, 0.2), (256.0, 0.6))
    assert share_at(curve, 1) == 0.2
    # 64 is half way between 16 and 256.
    assert share_at(curve, 64) == pytest.approx(0.4)
    assert share_at(curve, 4096) == 0.6


def _file(**changes: Any) -> dict[str, Any]:
    content = read_yaml(FOLDER / "h100-sxm.yaml")
    for key, value in changes.items():
        if value is None:
            del content[key]
        else:
            content[key] = {"value": value, "source": "test"}
    return content


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory_gib": None}, "memory_gib is missing"),
        ({"memory_gib": -1}, "memory_gib=-1.* must be finite and positive"),
        ({"memory_gib": "much"}, "memory_gib='much' is text"),
        ({"tensor_cores": 4}, "tensor_cores is unknown"),
        (
            {"linear_width_efficiency": [[64, 0.5], [32, 0.9]]},
            "linear_width_efficiency must be pairs of a size, ascending",
        ),
        ({"linear_efficiency": {"bfloat16": [[16, 1.5]], "float32": [[16, 0.5]]}}, "a share of the peak in"),
        ({"peak_tflops": {"bfloat16": 989}}, "linear_efficiency is given for bfloat16, float32; give it for bfloat16"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"here: .*{message}"):
        machine_from(_file(**changes), "here")


def test_an_unknown_machine_is_named_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gpu=h100-smx is unknown; did you mean 'h100-sxm'"):
        load_machine("h100-smx")
    file = tmp_path / "mine.yaml"
    file.write_text("schema_version: 7\n")
    with pytest.raises(ConfigError, match="schema_version is not 1; correct it there, or measure the machine"):
        load_machine(str(file))


def test_what_was_not_measured_follows_from_the_bandwidth() -> None:
    machine = machine_from(_file(memory_gb_per_s=1000, memory_efficiency=0.8), "here")
    assert machine.elementwise_bytes_per_s("bfloat16") == machine.optimizer_bytes_per_s == 800e9
    # The host's memory is taken for 1.5 times the card's, and its cores for as fast as the link to them.
    silent = dataclasses.replace(machine, host_memory_gib=None, host_update_gb_per_s=None)
    assert silent.host_memory_bytes == 1.5 * machine.memory_bytes
    assert silent.host_update_bytes_per_s == machine.host_link_gb_per_s * 1e9
    # 34 bytes per logit.
    assert machine.logits_per_s("bfloat16") == pytest.approx(800e9 / 34)
    measured = {
        "elementwise_efficiency": {"bfloat16": 0.5},
        "optimizer_gb_per_s": 300,
        "logits_g_per_s": {"float32": 7},
    }
    machine = machine_from(_file(memory_gb_per_s=1000, memory_efficiency=0.8, **measured), "here")
    assert machine.elementwise_bytes_per_s("bfloat16") == 500e9
    assert machine.elementwise_bytes_per_s("float32") == 800e9
    assert (machine.optimizer_bytes_per_s, machine.logits_per_s("float32")) == (300e9, 7e9)
    products = {"rows": 4096, "width": 1024}
    assert machine.logprob_flops_per_s("bfloat16", **products) == machine.linear_flops_per_s("bfloat16", **products)
    with pytest.raises(ConfigError, match=r"logprob_efficiency.float32=0.0 must be in"):
        machine_from(_file(logprob_efficiency={"float32": 0}), "here")
    with pytest.raises(ConfigError, match=r"elementwise_efficiency.bfloat16=1.5 must be in \(0, 1\]"):
        machine_from(_file(elementwise_efficiency={"bfloat16": 1.5}), "here")
