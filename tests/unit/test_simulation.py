"""Steps on simulated GPUs: bytes and operations by hand, every layout, what kernels are given, host waits with their lines."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import benchmark_estimate
from megatron_longpo.commands.simulate import simulate as command
from megatron_longpo.config import Config, from_dict
from megatron_longpo.doctor import calls
from megatron_longpo.errors import ConfigError, PlatformError
from megatron_longpo.model import contracts
from megatron_longpo.model.kernels import _shared, rows_of_groups
from megatron_longpo.model.shape import ModelShape
from megatron_longpo.planner.machine import load_machine
from megatron_longpo.planner.space import candidate_of
from megatron_longpo.planner.timing import TimeModel
from megatron_longpo.planner.verify import units
from megatron_longpo.planner.workload import made_up
from megatron_longpo.simulation import shim
from megatron_longpo.simulation.request import Report, Request
from megatron_longpo.simulation.start import simulate
from tests.support.parity.cases import CASES

pytestmark = pytest.mark.slow

SHAPE = {
    "family": "qwen2",
    "num_layers": 2,
    "hidden_size": 48,
    "ffn_hidden_size": 96,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "kv_channels": 16,
    "vocab_size": 256,
    "layernorm_epsilon": 1e-5,
    "add_qkv_bias": True,
    "untie_embeddings_and_output_weights": True,
    "rotary_base": 1e4,
    "max_position_embeddings": 4096,
}
TOKENS, ANSWER = 300, 40


def _layouts() -> dict[str, Request]:
    """The last rank of each layout of the parity matrix; of pipelines the first as well."""
    found: dict[str, Request] = {}
    seen: set[str] = set()
    # Of several cases with one layout the one with the shortest name.
    for case in sorted(CASES, key=lambda c: len(c.name)):
        layout = {k: v for k, v in case.settings.get("parallel", {}).items() if v is True or v != 1 or "virtual" in k}
        layout.pop("use_distributed_optimizer", None)
        name = repr(sorted(layout.items()))
        stages = layout.get("pipeline_model_parallel_size", 1)
        if name in seen:
            continue
        seen.add(name)
        config = {
            "parallel": {**layout, "use_distributed_optimizer": True},
            "training": {"bf16": True, "recompute_granularity": "none", "global_batch_size": 4},
            "optimizer": {"optimizer": "rmsprop"},
        }
        # Pipelines are cut for the matrix's four layers.
        shape = {**SHAPE, "num_layers": 2 if stages == 1 else 4}
        for rank in {case.processes - 1, *([0] if stages == case.processes == 2 else [])}:
            found[f"{case.name} rank {rank}"] = Request(
                config, case.processes, rank, shape, tokens=TOKENS, answer_tokens=ANSWER
            )
    return found


LAYOUTS = _layouts()
_ONE = LAYOUTS["one rank 0"]
ONLINE = {
    how: dataclasses.replace(_ONE, config={**_ONE.config, "reference": {"reference": "online", "reference_model": how}})
    for how in ("swapped", "resident")
}
# Whoever asks for Transformer Engine and FP8 gets local layers in bf16.
ONLINE["resident"] = dataclasses.replace(
    ONLINE["resident"],
    config={
        **ONLINE["resident"].config,
        "model": {"transformer_impl": "transformer_engine"},
        "training": {**_ONE.config["training"], "fp8_format": "hybrid"},
    },
)


OFFLOADED = {
    f"{layers} offloaded": dataclasses.replace(
        _ONE,
        config={**_ONE.config, "training": {**_ONE.config["training"], "cpu_offloading_num_layers": layers}},
        shape={**SHAPE, "num_layers": 6},
    )
    for layers in (0, 3)
}
# Some of the layouts that block_calls.json is of.
RECORDED = {
    key: calls.requests()[key]
    for key in (
        ("small", "single", "7B, TP 2 + SP, CP 2 a2a"),
        ("small", "single", "window, TP 1"),
        ("large", "packed", "7B, TP 1"),
        ("large", "packed", "28 heads, CP 2 allgather"),
    )
}


OFFLOADED["optimizer offloaded"] = dataclasses.replace(
    _ONE, config={**_ONE.config, "optimizer": {"optimizer": "adam", "optimizer_cpu_offload": True}}
)
# Mistral-7B's widths, where the estimate's allowance for small tensors hides nothing.
WIDE = {f"wide {pair.recompute} rank {pair.rank}": pair.request(None) for pair in benchmark_estimate.OFFLOADED[3:]}


@pytest.fixture(scope="module")
def reports() -> dict[Any, Report]:
    requests: dict[Any, Request] = {**LAYOUTS, **ONLINE, **OFFLOADED, **RECORDED, **WIDE}
    return dict(zip(requests, simulate(list(requests.values()), quiet=True), strict=True))


@pytest.mark.parametrize("name", LAYOUTS)
def test_kernels_and_collectives_are_given_what_they_take(name: str, reports: dict[str, Report]) -> None:
    report = reports[name]
    assert report.violations == []
    # The last stage computes log-probs; every stage computes attention.
    assert {"attention", "linear layers"} <= set(report.flops)
    assert any(row["operator"].endswith("attention_backward") for row in report.kernels)


@pytest.mark.parametrize("name", LAYOUTS)
def test_host_waits_have_their_lines_and_no_tensor_is_computed_on_the_host(
    name: str, reports: dict[str, Report]
) -> None:
    report = reports[name]
    assert report.waits
    for row in report.waits:
        assert re.fullmatch(r"(megatron_longpo|megatron/core)/[\w/]+\.py:\d+ \w+", row["place"]), row
    # Of our own code none belongs to a micro batch: the foretold gradients are checked, the metrics read and the clock stopped
    # once in a step.
    own = {row["place"].split()[1]: row["times"] for row in report.waits if row["place"].startswith("megatron_longpo/")}
    # Pipeline stages also tell each other the lengths of their micro batches.
    lengths = {"shape_of", "_communicate_shapes"} if "pp" in name else set()
    assert set(own) <= {"check_known", "reduce_samples", "synchronize"} | lengths, own
    assert {times for function, times in own.items() if function not in lengths} == {1}, own
    # Lengths of a call with several runs, and megatron-core's comparison of random states.
    allowed = ("model/kernels.py", "tensor_parallel/random.py")
    assert [place for place in report.host_work if not any(name in place for name in allowed)] == []


def test_bytes_and_operations_of_one_process_are_those_counted_by_hand(reports: dict[str, Report]) -> None:
    report = reports["one rank 0"]
    # The prompt without its last token, and that token with an answer that lacks its last, for answers of 40 and 30 tokens.
    trunk, chosen, rejected = TOKENS - ANSWER - 1, ANSWER, 30
    places = trunk + chosen + rejected
    assert report.tokens == places == 329
    layer = 48 * (128 + 64 + 64) + 128 * 48 + 3 * 48 * 96
    parameters = 2 * (layer + 2 * 48 + 128 + 64 + 64) + 2 * 256 * 48 + 48
    size = sum(report.kinds[kind] for kind in ("weights", "gradients", "optimizer"))
    # Two bytes of weights, four of gradients, four of master weights, four of RMSProp's state; buffers are padded and blocks
    # rounded up.
    assert 0 <= size / ((2 + 4 + 4 + 4) * parameters) - 1 < 0.03
    # A product forward and two backward for each matrix.
    assert report.flops["linear layers"] == 3 * 2 * places * 2 * layer
    # The same for the logits of all places, and a second time those whose gradient is not known in the forward.
    assert report.flops["log-probs"] == 2 * 256 * 48 * (3 * places + chosen + rejected)
    pairs = sum(n * (n + 1) // 2 for n in (trunk, chosen, rejected)) + trunk * (chosen + rejected)
    # Two products per pair and channel forward, five backward.
    assert report.flops["attention"] == (2 + 5) * 2 * 2 * 128 * pairs


@pytest.mark.parametrize("key", RECORDED, ids=" ".join)
def test_the_doctor_s_calls_are_those_of_the_simulation(key: tuple[str, str, str], reports: dict[Any, Report]) -> None:
    """Every kind of call that a layout makes is in the file; if not: python -m megatron_longpo.doctor.calls."""
    size, kind, _ = key
    content = json.loads(calls.FILE.read_text(encoding="utf-8"))[size][kind]
    recorded = {calls.signature(row) for rows in content.values() for row in rows}
    assert reports[key].blocks
    assert {calls.signature(row) for row in reports[key].blocks} <= recorded


def test_an_online_reference_is_scored_in_the_step_and_may_be_a_second_model(reports: dict[str, Report]) -> None:
    cached, swapped, resident = (reports[name] for name in ("one rank 0", "swapped", "resident"))
    # Its forward takes as many products as a third of the policy's step, on rows that are no longer than its own.
    assert 1 < swapped.flops["linear layers"] / cached.flops["linear layers"] < 1.4
    assert swapped.flops == resident.flops
    assert cached.layers == "local; transformer_impl=auto is not simulated"
    assert resident.layers == "local; transformer_impl=transformer_engine with fp8_format=hybrid is not simulated"
    assert resident.kinds["weights"] == pytest.approx(2 * cached.kinds["weights"], rel=0.02)
    assert swapped.kinds["weights"] == cached.kinds["weights"]


def test_activations_in_host_memory_are_not_on_the_gpu(reports: dict[str, Report]) -> None:
    none, three = reports["0 offloaded"], reports["3 offloaded"]
    # A place of a layer: two layer inputs, queries, keys, values, output and the MLP's first product in bf16; in fp32 a number of
    # each of two norms, of which 329 are fewer than 4096 bytes, and the log-sum-exps of eight heads.
    layer = 329 * ((2 * 48 + 128 + 64 + 64 + 128 + 2 * 96) * 2 + 8 * 4)
    assert three.host_bytes == 3 * layer > none.host_bytes
    # Blocks are multiples of 512 bytes; the peak is before the first layer comes back.
    assert abs((none.peak_bytes - three.peak_bytes) / (3 * layer) - 1) < 0.02
    assert three.flops == none.flops
    own = [{row["place"] for row in report.waits} for report in (none, three)]
    assert own[0] == own[1]
    for report in (none, three):
        assert report.violations == [] and report.peak_bytes <= (report.estimate_bytes or 0)


def test_optimizer_states_in_host_memory_are_not_on_the_gpu(reports: dict[str, Report]) -> None:
    here, there = reports["one rank 0"], reports["optimizer offloaded"]
    # Step counts and scalars are left.
    assert here.kinds["optimizer"] > 2**18 and there.kinds.get("optimizer", 0) < 2**13
    assert there.kinds["weights"] == here.kinds["weights"] and there.kinds["gradients"] == here.kinds["gradients"]
    assert there.violations == [] and there.peak_bytes <= (there.estimate_bytes or 0)


def test_exchanges_are_counted_by_group(reports: dict[str, Report]) -> None:
    sent = {(row["collective"], row["group"]): row for row in reports["cp2 rank 1"].exchanges}
    # Queries, keys, values and output of a layer forward, their gradients backward: 16 KiB per place of 330 in bf16 with 128 +
    # 2 * 64 + 128 channels; half of what a rank holds, half of the places, goes to the other rank.
    assert sent["all_to_all", "cp"]["bytes"] >= 2 * 2 * 2 * 165 * (128 + 64 + 64 + 128) // 2
    assert sent["reduce_scatter", "dp_cp"]["calls"] == 1
    # Each of the two layers has two exchanges forward and two backward, in four groups: two of each rank's two key-value heads'
    # query heads; with one key-value head per rank, its two query heads are exchanged apart.
    assert sent["all_to_all", "cp"]["calls"] == 2 * 4 * 4
    alone = {row["collective"]: row for row in reports["cp4 rank 3"].exchanges if row["group"] == "cp"}
    assert alone["all_to_all"]["calls"] == 2 * 4 * 2
    # Keys and values travel once: queries, keys, values and output forward, the gradient and the output and their gradients
    # backward, of 83 places in bf16, to three ranks of four.
    channels = (128 + 2 * 64 + 128) + (128 + 128 + 128 + 2 * 64)
    assert alone["all_to_all"]["bytes"] == 2 * 2 * 83 * channels * 3 // 4
    assert ("all_to_all", "cp") not in {(r["collective"], r["group"]) for r in reports["tp2-sp rank 1"].exchanges}
    assert {row["group"] for row in reports["tp2-sp rank 1"].exchanges} >= {"tp"}
    assert any(row["collective"] == "send" for row in reports["pp2 rank 0"].exchanges)


def test_stages_of_a_pipeline_hold_what_they_should(reports: dict[str, Report]) -> None:
    first, last = reports["pp2 rank 0"], reports["pp2 rank 1"]
    assert "log-probs" in last.flops and "log-probs" not in first.flops
    # The first stage holds the hidden states of two micro batches, the last of one.
    assert first.kinds["queries, keys, values"] > 1.5 * last.kinds["queries, keys, values"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_estimate_is_not_below_the_peak(name: str, reports: dict[str, Report]) -> None:
    """Nor far above it, less the 8 MiB that it adds for small tensors, which here is more than all others."""
    report = reports[name]
    assert report.estimate_bytes is not None
    assert report.peak_bytes <= report.estimate_bytes
    assert report.estimate_bytes - 2**23 <= 1.25 * report.peak_bytes


@pytest.mark.parametrize("name", WIDE)
def test_the_estimate_with_activations_in_host_memory_is_within_5_percent(
    name: str, reports: dict[str, Report]
) -> None:
    report = reports[name]
    assert report.violations == [] and report.peak_bytes <= (report.estimate_bytes or 0) <= 1.05 * report.peak_bytes


# --------------------------------------------------------------------------------------------------
# Contracts
# --------------------------------------------------------------------------------------------------


def _backward_call(out_KGnD: torch.Tensor) -> contracts.Call:
    """The memory-efficient backward, given an output in some layout; the other tensors are right."""
    kv_heads, groups, n, size = out_KGnD.shape
    q = torch.empty(kv_heads, groups, n, size, dtype=torch.bfloat16)
    k = _shared(torch.empty(n, kv_heads, size, dtype=torch.bfloat16), kv_heads * groups)
    lse = torch.empty(kv_heads, groups, -(-n // 32) * 32)
    names = {"grad_out_": torch.empty_like(q), "query": q, "key": k, "value": k, "out": out_KGnD, "logsumexp": lse}
    return contracts.Call({**names, "is_causal": True})


def _beyond_device(call: contracts.Call) -> list[str]:
    found = contracts.violations("aten::_scaled_dot_product_efficient_attention_backward", call)
    return [line for line in found if "must be on the GPU" not in line]


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_planner_counts_what_the_step_does(name: str, reports: dict[str, Report]) -> None:
    """Operations of the simulated stage by kind, and the bytes that it sends by group; here 300 tokens, where padding and biases
    weigh more than in any real run."""
    request, report = LAYOUTS[name], reports[name]
    shape, config = ModelShape(**request.shape), from_dict(request.config, "test", Config)
    candidate = dataclasses.replace(candidate_of(config, shape, request.world_size), micro_batches=report.micro_batches)
    workload = made_up(config, shape, length=TOKENS, answer=ANSWER, turns=1, short=1024, samples=None)
    stage = request.rank // (request.world_size // candidate.parallel.pipeline_size)
    operations, exchanges = (
        TimeModel(unit, shape, workload).step(candidate, up=False, whole_layers=0, stage=stage)
        for unit in units(load_machine("a100-80g"))
    )
    found = operations.parts
    # With allgather, tiles are padded, and the simulated rank may be another than the most loaded one.
    exact = 0.05 if candidate.parallel.comm_type == "allgather" else 1e-6
    assert found["linear"] == pytest.approx(report.flops["linear layers"], rel=exact)
    assert found["attention"] == pytest.approx(report.flops["attention"], rel=exact)
    if "log-probs" in report.flops:
        # The places that have a loss are not the same number on all context-parallel ranks.
        assert found["log-probs"] == pytest.approx(
            report.flops["log-probs"], rel=0.15 if candidate.parallel.context_size > 1 else 1e-6
        )
    sent: dict[str, int] = {}
    for row in report.exchanges:
        sent[row["group"]] = sent.get(row["group"], 0) + row["bytes"]
    for part, group, near in (("TP exchange", "tp", 0.12), ("CP exchange", "cp", 0.02), ("DP exchange", "dp_cp", 0.02)):
        assert exchanges.parts[part] == pytest.approx(sent.get(group, 0), rel=near, abs=100), part


def test_the_output_handed_over_as_a_view_breaks_the_contract_of_the_memory_efficient_backward() -> None:
    """As version 0.1.0 did it: a view of [n, 32, 128], whose rows lie 32 * 128 elements apart, where the kernel reads them
    4 * 128 apart, since it sees the 4 query heads of one of 8 key-value heads. Gradients were wrong, the loss was not."""
    out = torch.empty(70, 32, 128, dtype=torch.bfloat16)
    old = out.transpose(0, 1).unflatten(0, (8, -1))
    assert _beyond_device(_backward_call(old)) == [
        "out: rows 4096 elements apart, but the kernel reads them 512 apart (heads x channels)"
    ]
    assert _beyond_device(_backward_call(rows_of_groups(out, 8))) == []
    # With one key-value head the two layouts are one, which is why a2a over as many ranks as there are heads was right.
    alone = torch.empty(70, 4, 128, dtype=torch.bfloat16)
    assert _beyond_device(_backward_call(alone.transpose(0, 1).unflatten(0, (1, -1)))) == []


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (
            {"query": torch.empty(8, 16, 4, dtype=torch.bfloat16).transpose(1, 2)},
            "query: stride 4 in the last dimension",
        ),
        ({"key": torch.empty(8, 2, 17, dtype=torch.bfloat16)[..., :16]}, "key: rows 34 elements apart"),
        ({"query": torch.empty(8, 4, 16)}, "query: torch.float32, must be"),
        ({"cum_seq_q": torch.tensor([0, 3, 8])}, "cum_seq_q: torch.int64"),
        ({"cum_seq_q": torch.tensor([0, 3, 9], dtype=torch.int32)}, "cum_seq_q: [0, 3, 9]..., must rise"),
        ({"max_q": 4}, "max_q=4, must be at least the longest run, 5"),
    ],
)
def test_flash_takes_aligned_rows_of_16_bits_and_runs_that_fit(change: dict[str, Any], found: str) -> None:
    runs = torch.tensor([0, 3, 8], dtype=torch.int32)
    arguments = {
        "query": torch.empty(8, 4, 16, dtype=torch.bfloat16),
        "key": torch.empty(8, 2, 16, dtype=torch.bfloat16),
        "value": torch.empty(8, 2, 16, dtype=torch.bfloat16),
        "cum_seq_q": runs,
        "cum_seq_k": runs,
        "max_q": 5,
        "max_k": 5,
        "is_causal": True,
    }

    def lines(call: dict[str, Any]) -> list[str]:
        all_lines = contracts.violations("aten::_flash_attention_forward", contracts.Call(call, lambda x: x))
        return [line for line in all_lines if "must be on the GPU" not in line]

    assert lines(arguments) == []
    assert any(line.startswith(found) for line in lines({**arguments, **change}))


# --------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------


def test_the_command_writes_what_it_found_and_draws_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.json").write_text(json.dumps({"schema_version": 1, **SHAPE}))
    found, picture = tmp_path / "found.json", tmp_path / "bytes.svg"
    line = f"--model {tmp_path} --tokens 300 --answer-tokens 40 --world-size 4 --rank 2"
    line += " --context-parallel-size 2 --bf16 --global-batch-size 2"
    command([*line.split(), "--json", str(found), "--plot", str(picture)], prog="simulate")
    report = Report.from_json(found.read_text())
    assert report.layout.endswith("CP 2 a2a, DP 2") and max(report.curve["live"]) <= report.peak_bytes
    assert sum(report.kinds.values()) == report.peak_bytes
    assert "<svg" in picture.read_text()
    assert "every kernel and every collective is given what it takes" in capfd.readouterr().out


def test_what_cannot_be_simulated_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=r"rank=4 must be from 0 to world_size - 1 = 3"):
        simulate([Request({}, 4, 4, SHAPE, tokens=100)])
    with pytest.raises(ConfigError, match=r"has no suffix that is known; use \.png"):
        command(["--plot", "bytes.txt"], prog="simulate")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(PlatformError, match=r"no C\+\+ compiler .*; install one to simulate"):
        shim.build()
    # What is left is the estimate.
    (tmp_path / "model.json").write_text(json.dumps({"schema_version": 1, **SHAPE}))
    command([*f"--model {tmp_path} --tokens 300 --answer-tokens 40 --bf16".split()], prog="simulate")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("no simulation but an estimate, since there is no C++ compiler")
    # The logits of 329 tokens, and weights with their states: nothing here takes a hundredth of a GiB but tables and rounding.
    assert re.search(r"TP 1, PP 1, CP 1, DP 1, 329 tokens .*: about 0\.0 GiB of tensors", lines[-1])
    monkeypatch.setenv("CXX", "/bin/false")
    with pytest.raises(PlatformError, match=r"/bin/false cannot compile against torch"):
        shim.build()
