"""The planner: numbers by hand, layouts that the trainer takes, answers that change as they must."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_longpo.command_line import ConfigOptions, given_flags, parse_with_config
from megatron_longpo.commands.plan import plan as command
from megatron_longpo.config import (
    Config,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainingConfig,
    changed_fields,
    check,
    check_against_model,
    from_yaml,
)
from megatron_longpo.errors import ConfigError
from megatron_longpo.model.shape import ModelShape
from megatron_longpo.planner import layout
from megatron_longpo.planner.explain import limits
from megatron_longpo.planner.failures import best_saving
from megatron_longpo.planner.layout import auto_layout, given_in, machine_here, machine_of, next_layout
from megatron_longpo.planner.links import Group
from megatron_longpo.planner.machine import Machine, load_machine
from megatron_longpo.planner.search import Recompute, Search
from megatron_longpo.planner.space import candidates
from megatron_longpo.planner.timing import TimeModel
from megatron_longpo.planner.verify import _seconds
from megatron_longpo.planner.workload import Rows, made_up
from megatron_longpo.runtime import failure, platform
from megatron_longpo.runtime.balance import assign
from megatron_longpo.simulation.data import made_up_sample, plan_of
from megatron_longpo.simulation.request import Request
from megatron_longpo.training.plan import make_plan

MISTRAL = ModelShape(
    family="mistral",
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=32000,
    layernorm_epsilon=1e-5,
    add_qkv_bias=False,
    untie_embeddings_and_output_weights=True,
    rotary_base=1e6,
    max_position_embeddings=32768,
)
SMALL = MISTRAL.replace(
    num_layers=4,
    hidden_size=512,
    ffn_hidden_size=1024,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=64,
    vocab_size=1000,
)
CONFIG = Config(training=TrainingConfig(bf16=True), optimizer=OptimizerConfig(optimizer="rmsprop"))
A100 = load_machine("a100-80g")


def search_of(
    length: int, gpus: int, *, shape: ModelShape = MISTRAL, config: Config = CONFIG, machine: Machine = A100
) -> Search:
    workload = made_up(config, shape, length=length, answer=256, turns=1, short=2048, samples=None)
    return Search(config, shape, machine, gpus, workload)


def test_recomputed_and_offloaded_layers_may_be_more_than_a_short_stage_has() -> None:
    training = TrainingConfig(
        bf16=True,
        recompute_granularity="full",
        recompute_method="block",
        recompute_num_layers=4,
        cpu_offloading_num_layers=4,
    )
    search = search_of(65536, 8, config=dataclasses.replace(CONFIG, training=training))
    given = frozenset(
        {"recompute_granularity", "recompute_method", "recompute_num_layers", "cpu_offloading_num_layers"}
    )
    for _, candidate in dataclasses.replace(search, given=given).ordered:
        layers = max(n for rank in candidate.split for n in rank)
        for (only,) in dataclasses.replace(search, given=given)._families(candidate):
            assert only.whole_layers == min(4, layers)
            assert only.offloaded == min(4, max(0, layers - only.whole_layers - 1))


# --------------------------------------------------------------------------------------------------
# Rows
# --------------------------------------------------------------------------------------------------


def test_rows_are_counted_as_the_trainer_lays_them_out() -> None:
    """1000 tokens with an answer of 100: 999 places of the chosen row, and a branch of 75 from the last common token on."""
    rows = Rows.of(made_up_sample(1000, answer=100, turns=1, vocab_size=50, short=30), CONFIG, SMALL)
    trunk, chosen, rejected = 1000 - 100 - 1, 100, 75
    assert rows.places == trunk + chosen + rejected
    assert (
        rows.pairs == (trunk + chosen) * (trunk + chosen + 1) // 2 + rejected * trunk + rejected * (rejected + 1) // 2
    )
    # The trunk's places have the NLL only; a prompt's last token predicts each answer's first.
    assert (rows.known_losses, rows.later_losses) == (trunk, chosen + rejected)
    assert (rows.longest, rows.chosen) == (999, 1000)
    # Two short rows of 30 + 16 tokens and an answer share all but the last token of their prompt.
    assert rows.short_places == 45 + 100 + 75


def test_a_sliding_window_leaves_fewer_pairs() -> None:
    rows = Rows.of(made_up_sample(1000, answer=100, turns=1, vocab_size=50), CONFIG, SMALL.replace(window_size=64))
    # Every query sees 64 keys, the first 63 fewer.
    assert rows.pairs == rows.places * 64 - 63 * 64 // 2


def test_gathered_keys_are_balanced_over_any_number_of_ranks() -> None:
    rows = Rows.of(made_up_sample(100_000, answer=100, turns=1, vocab_size=50), CONFIG, SMALL)
    assert [round(rows.imbalance(n), 2) for n in (2, 64, 1024)] == [1.0, 1.0, 1.01]


def test_assignment_does_not_take_longer_than_it_must() -> None:
    """Thousands of ranks with four tiles each: 16384 items and 4096 bins took minutes with a search for each."""
    began = time.monotonic()
    found = assign([float(i % 97) for i in range(16384)], 4096, equal_counts=True)
    assert time.monotonic() - began < 5
    assert {len(items) for items in found} == {4}


def test_gradients_that_their_product_adds_take_no_pass_of_their_own() -> None:
    """A pass reads and writes the fp32 sum, 8 bytes, and the gradient, in bf16 2 + 2: of a layer's weights, by the memory."""
    weights = 4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336
    # Eight samples, one micro batch each, of 32 layers.
    passes = 8 * 32 * 12 * weights / A100.elementwise_bytes_per_s("bfloat16")

    def elementwise(machine: Machine = A100, **changes: Any) -> float:
        config = dataclasses.replace(CONFIG, **changes)
        return search_of(4096, 1, config=config, machine=machine).as_configured().time.parts["element-wise"]

    fused = elementwise()
    added = ParallelConfig(gradient_accumulation_fusion=False)
    assert elementwise(parallel=added) - fused == pytest.approx(passes)
    assert elementwise(model=ModelConfig(transformer_impl="transformer_engine")) - fused == pytest.approx(passes)
    # Sums in bf16 have 4 bytes of 8.
    assert elementwise(parallel=ParallelConfig(grad_reduce_in_bf16=True)) - fused == pytest.approx(passes * 8 / 12)
    # Not of fp32 weights, and not on a CPU, whose products do not add.
    in_fp32 = dataclasses.replace(CONFIG.training, bf16=False)
    assert elementwise(training=in_fp32) == elementwise(training=in_fp32, parallel=added)
    cpu = load_machine("cpu")
    assert elementwise(cpu) == elementwise(cpu, parallel=added)


@pytest.mark.parametrize("bf16", [True, False])
def test_a_cpu_takes_the_memory_of_each_micro_batch_anew(bf16: bool) -> None:
    """2000 tokens of four layers that recompute the MLP's first product, and a chunk of logits of 1000 tokens."""
    training = TrainingConfig(
        bf16=bf16, global_batch_size=3, recompute_granularity="selective", recompute_modules=("mlp_up",)
    )
    config = dataclasses.replace(CONFIG, training=training, model=ModelConfig(logprob_chunk_bytes=6 * 1024 * 1000))
    cpu = load_machine("cpu")
    plain = search_of(2000, 1, shape=SMALL, config=config, machine=cpu).as_configured()
    # Half a GB per second.
    slow = dataclasses.replace(cpu, fresh_gb_per_s=0.5)
    search = search_of(2000, 1, shape=SMALL, config=config, machine=slow)
    plan = search.as_configured()
    peak = plan.memory.bytes.activations
    held = peak.saved + peak.backward + peak.logprobs
    assert plan.time.parts["fresh memory"] == pytest.approx(3 * held / 0.5e9)
    assert plan.seconds - plain.seconds == pytest.approx(plan.time.parts["fresh memory"])
    # Layers save their inputs, queries, keys, values and output, and numbers per row; it is more than that.
    width, places = (2 if bf16 else 4), search.workload.mean.places
    assert held > 4 * places * (2 * 512 + 2 * 512 + 2 * 256) * width
    assert plain.time.parts["fresh memory"] == 0


# --------------------------------------------------------------------------------------------------
# Links
# --------------------------------------------------------------------------------------------------


def links(**changes: Any) -> Machine:
    return dataclasses.replace(
        A100,
        node_link_gb_per_s=100.0,
        network_gb_per_s=10.0,
        node_link_latency_us=0.0,
        network_latency_us=0.0,
        **{"gpus_per_node": 8, **changes},
    )


@pytest.mark.parametrize(
    ("size", "stride", "gather"),
    [
        # In a node: 3/4 of a gigabyte over 100 GB/s.
        (4, 1, 0.75 / 100),
        (4, 2, 0.75 / 100),
        # Two nodes with eight members each, whose adapters make eight rings of 10 GB/s.
        (16, 1, 15 / 16 / 80),
        # One member per node: one adapter.
        (4, 8, 0.75 / 10),
        # Members 4 apart: two per node.
        (8, 4, 7 / 8 / 20),
        (1, 1, 0.0),
    ],
)
def test_a_gather_takes_the_links_of_its_group(size: int, stride: int, gather: float) -> None:
    group = Group(size, stride, links())
    assert group.gather(1e9) == pytest.approx(gather)
    assert group.all_reduce(1e9) == pytest.approx(2 * gather)


def test_an_all_to_all_leaves_the_node_with_what_is_for_other_nodes() -> None:
    """16 ranks on two nodes: each sends a half of what it has to the other node, at 10 GB/s."""
    assert Group(16, 1, links()).all_to_all(1e9) == pytest.approx(0.5 / 10)
    assert Group(8, 1, links()).all_to_all(1e9) == pytest.approx(7 / 8 / 100)


def test_small_all_reduces_of_many_nodes_go_by_a_tree() -> None:
    """A ring over 128 nodes takes 127 steps, a tree 14."""
    machine = dataclasses.replace(links(), network_latency_us=10.0)
    assert Group(128, 8, machine).all_reduce(8.0) == pytest.approx(2 * 7 * 10e-6, rel=1e-3)
    assert Group(128, 8, machine).gather(8.0) == pytest.approx(127 * 10e-6, rel=1e-3)


# --------------------------------------------------------------------------------------------------
# Failures
# --------------------------------------------------------------------------------------------------


def test_checkpoints_are_written_as_often_as_daly_says() -> None:
    """A checkpoint of 60 s, a failure a day: sqrt(2 60 86400) = 3220 s to the first order (Young), 3180 s by Daly."""
    saving = best_saving(save=60, gpu_hours_between_failures=24 * 1000, gpus=1000, restart=600)
    assert saving.mean_time == 86400
    assert saving.interval == pytest.approx(3220 * (1 + math.sqrt(60 / 172800) / 3 + 60 / 172800 / 9) - 60, rel=1e-3)

    def lost(interval: float) -> float:
        exponent = (interval + 60) / 86400
        return 86400 * math.exp(600 / 86400) * math.expm1(exponent) / interval - 1

    assert saving.lost_share == pytest.approx(lost(saving.interval))
    assert saving.lost_share < min(lost(saving.interval * 1.2), lost(saving.interval / 1.2))
    # First order: C / t + t / 2M + R / M.
    assert saving.lost_share == pytest.approx(60 / 3180 + 3180 / 172800 + 600 / 86400, rel=0.05)


def test_a_checkpoint_is_at_most_one_per_step() -> None:
    saving = best_saving(save=1, gpu_hours_between_failures=1000, gpus=1000, restart=0, shortest=1800)
    assert saving.interval == 1800
    # Half a step is lost of two steps per failure, to the first order.
    assert saving.lost_share == pytest.approx(math.expm1(1801 / 3600) * 3600 / 1800 - 1)


def test_nothing_is_lost_where_nothing_fails() -> None:
    saving = best_saving(save=60, gpu_hours_between_failures=math.inf, gpus=8, restart=600)
    assert (saving.interval, saving.lost_share) == (math.inf, 0.0)


# --------------------------------------------------------------------------------------------------
# Layouts
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 3, 8, 12])
def test_every_layout_is_one_that_the_trainer_takes(world: int) -> None:
    found = list(
        candidates(
            dataclasses.replace(CONFIG, training=TrainingConfig(global_batch_size=24)), SMALL, world, frozenset()
        )
    )
    assert found
    for candidate in found:
        check(candidate.config)
        check_against_model(candidate.config, world_size=world, num_layers=4, attention_heads=8, key_value_heads=4)
        parallel = candidate.parallel
        ranks = parallel.tensor_size * parallel.pipeline_size * parallel.context_size * parallel.data_size
        assert ranks == world
        assert candidate.micro_batches * candidate.micro_batch_size * parallel.data_size == 24
        assert sum(map(sum, candidate.split)) == 4 and min(min(chunks) for chunks in candidate.split) >= 1
    assert len({repr(c.config) for c in found}) == len(found)
    # No layout comes twice under another name.
    alike = {(c.parallel, c.split, c.micro_batch_size, c.config.parallel.use_distributed_optimizer) for c in found}
    assert len(alike) == len(found)


def test_settings_that_are_given_stay() -> None:
    given = given_flags(
        Config, ["--tensor-model-parallel-size", "2", "--no-sequence-parallel", "--cp_comm_type=allgather"]
    )
    assert given == {"tensor_model_parallel_size", "sequence_parallel", "cp_comm_type"}
    parallel = dataclasses.replace(CONFIG.parallel, tensor_model_parallel_size=2, cp_comm_type="allgather")
    found = list(candidates(dataclasses.replace(CONFIG, parallel=parallel), SMALL, 8, given))
    assert {(c.parallel.tensor_size, c.parallel.sequence_parallel, c.parallel.comm_type) for c in found} == {
        (2, False, "allgather")
    }
    assert len({c.parallel.context_size for c in found}) > 1


def test_pipelines_may_count_embedding_and_loss_as_layers() -> None:
    """30 layers on 4 ranks: only with both."""
    found = [
        c for c in candidates(CONFIG, SMALL.replace(num_layers=30), 4, frozenset()) if c.parallel.pipeline_size == 4
    ]
    assert {tuple(sum(rank) for rank in c.split) for c in found} == {(7, 8, 8, 7)}


# --------------------------------------------------------------------------------------------------
# Time
# --------------------------------------------------------------------------------------------------


def test_a_step_is_the_sum_of_operations_over_rates() -> None:
    """One GPU of 100 TFLOP/s that does nothing else: six products per weight and token, and 14 per pair and channel."""
    plain = ((1.0, 1.0),)
    machine = dataclasses.replace(
        A100,
        peak_tflops={"bfloat16": 100.0},
        linear_efficiency={"bfloat16": plain},
        linear_width_efficiency=plain,
        attention_forward_efficiency={"bfloat16": plain},
        attention_backward_efficiency={"bfloat16": plain},
    )
    search = search_of(4000, 1, shape=SMALL, machine=machine)
    (candidate,) = [c for c in candidates(CONFIG, SMALL, 1, frozenset()) if c.micro_batch_size == 1]
    parts = TimeModel(machine, SMALL, search.workload).step(candidate, up=False, whole_layers=0).parts
    rows = search.workload.mean
    assert parts["linear"] == pytest.approx(8 * 6 * rows.places * 4 * SMALL.layer_weights / 100e12)
    assert parts["attention"] == pytest.approx(8 * 4 * 14 * rows.pairs * SMALL.query_width / 100e12)
    losses = 3 * rows.known_losses + 4 * rows.later_losses
    assert parts["log-probs"] == pytest.approx(8 * 2 * losses * 1000 * 512 / 100e12)
    assert not any(
        parts[name] for name in ("TP exchange", "CP exchange", "PP exchange", "DP exchange", "bubble", "recompute")
    )
    again = TimeModel(machine, SMALL, search.workload).step(candidate, up=True, whole_layers=0).parts["recompute"]
    assert again > 8 * 2 * rows.places * 4 * SMALL.hidden_size * 2 * SMALL.ffn_hidden_size / 100e12


def test_a_pipeline_waits_for_its_first_and_last_micro_batch() -> None:
    """Stages alike: (stages - 1) / micro batches of the time, and a half of it with two virtual stages."""
    config = dataclasses.replace(CONFIG, training=TrainingConfig(bf16=True, global_batch_size=16))
    search = search_of(8192, 4, shape=SMALL.replace(num_layers=16, vocab_size=8), config=config)
    bubbles = {}
    for candidate in candidates(config, search.shape, 4, frozenset()):
        parallel = candidate.parallel
        counted = candidate.config.parallel
        if (
            parallel.pipeline_size == 4
            and candidate.micro_batch_size == 1
            and not counted.account_for_loss_in_pipeline_split
        ):
            time_ = search.times.step(candidate, up=False, whole_layers=0)
            busy = time_.total - sum(time_.parts[n] for n in ("bubble", "DP exchange", "optimizer", "stragglers"))
            bubbles[parallel.virtual_stages] = time_.parts["bubble"] / busy
            # Whichever stage is told of, the step takes as long: the others wait for the slowest.
            each = [search.times.step(candidate, up=False, whole_layers=0, stage=n) for n in range(4)]
            assert [t.stage for t in each] == [0, 1, 2, 3]
            shared = [t.total - t.parts["stragglers"] for t in each]
            assert shared == pytest.approx([shared[0]] * 4, rel=1e-3)
    assert bubbles[None] == pytest.approx(3 / 16, rel=0.02)
    assert bubbles[2] == pytest.approx(3 / 32, rel=0.05)


def test_less_memory_is_met_by_more_recomputation_and_then_by_another_layout() -> None:
    wide = search_of(65536, 8).best(1)[0]
    machine = dataclasses.replace(A100, memory_gib=24.0)
    narrow = search_of(65536, 8, machine=machine).best(1)[0]
    assert not wide.recompute.up and not wide.recompute.whole_layers
    assert narrow.memory.total <= 0.92 * 24 * 2**30 < wide.memory.total
    assert narrow.seconds > wide.seconds


def test_an_optimizer_in_host_memory_waits_for_the_link_and_the_cores() -> None:
    """RMSProp's share: 4 bytes per weight to the host and 2 back, and 56 + 6 bytes on its cores instead of 56 on the GPU."""
    machine = dataclasses.replace(A100, host_link_gb_per_s=20.0, host_update_gb_per_s=30.0, straggler_slowdown=0.0)
    search = search_of(4000, 2, shape=SMALL, machine=machine)
    candidate = next(c for c in search.candidates if c.parallel.context_size == 2)
    weights = search.times.parameters(candidate) / 2
    times = [search.times.step(candidate, up=False, whole_layers=0, host_optimizer=on).parts for on in (False, True)]
    assert times[1]["host copies"] == pytest.approx(6 * weights / 20e9)
    more = times[1]["optimizer"] - times[0]["optimizer"]
    assert more == pytest.approx(62 * weights / 30e9 - 56 * weights / machine.optimizer_bytes_per_s)
    # Its state and the fp32 weights leave the GPU: 8 bytes per weight of a rank's share.
    here, there = (search.memory(candidate, Recompute(False, host_optimizer=on)) for on in (False, True))
    parameters = here.bytes.static.parameters
    assert here.bytes.static.optimizer == 8 * parameters // 2 and there.bytes.static.optimizer == 0
    # Gradients that come while other parameters are updated, which takes longer, are not waited for.
    overlapping = dataclasses.replace(CONFIG.optimizer, overlap_cpu_optimizer_d2h_h2d=True)
    beside = dataclasses.replace(candidate, config=dataclasses.replace(candidate.config, optimizer=overlapping))
    copies = search.times.step(beside, up=False, whole_layers=0, host_optimizer=True).parts["host copies"]
    assert copies == pytest.approx(2 * weights / 20e9)


def test_the_optimizer_goes_to_host_memory_where_that_costs_least() -> None:
    """One GPU of 28 GiB: 8 layers, whose optimizer is 15 GiB, fit in no other way."""
    shape = MISTRAL.replace(num_layers=8)
    search = search_of(16384, 1, shape=shape, machine=dataclasses.replace(A100, memory_gib=28.0))
    (best,) = search.best(1)
    assert best.recompute.host_optimizer and "optimizer in host memory" in best.describe()
    assert best.config.optimizer.optimizer_cpu_offload and best.config.parallel.use_distributed_optimizer
    check(best.config)
    # What is given stays, and it is for the distributed optimizer.
    for name in ("optimizer_cpu_offload", "use_distributed_optimizer"):
        assert not dataclasses.replace(search, given=frozenset({name})).best(1)
    # 40 GB of the host per GPU do not hold 16 bytes per weight, half of them free.
    host = dataclasses.replace(search.machine, host_memory_gib=40.0)
    assert not dataclasses.replace(search, machine=host).best(1)
    # Where there is room, activations or nothing go first.
    roomy = dataclasses.replace(A100, memory_gib=48.0)
    (fast,) = dataclasses.replace(search, machine=roomy).best(1)
    assert not fast.recompute.host_optimizer and fast.seconds < best.seconds
    # A short row has little to compute per update: the reason says where the time goes.
    short = dataclasses.replace(CONFIG, training=TrainingConfig(bf16=True, global_batch_size=1))
    short_search = search_of(1024, 1, shape=shape, config=short, machine=search.machine)
    assert "optimizer" in limits(short_search.best(1)[0], short_search)
    assert "the optimizer in host memory" in limits(short_search.best(1)[0], short_search)


FP8 = dataclasses.replace(
    CONFIG,
    model=ModelConfig(transformer_impl="transformer_engine"),
    training=TrainingConfig(bf16=True, fp8_format="hybrid"),
)


@pytest.mark.parametrize("config", [CONFIG, FP8], ids=["bf16", "fp8"])
def test_train_takes_every_plan(config: Config) -> None:
    """Where memory is short the fastest have activations in host memory, but not with FP8, whose weights would go as well."""
    machine = dataclasses.replace(load_machine("h100-sxm"), memory_gib=60.0)
    plans = search_of(131072, 8, config=config, machine=machine).best(10)
    assert len(plans) == 10
    for plan in plans:
        check(plan.config)
    assert any(plan.recompute.offloaded for plan in plans) == (config is CONFIG)


def test_fp8_is_planned_for_widths_that_it_takes() -> None:
    """ffn_hidden_size=1040 on four ranks is 260, no multiple of 16."""
    shape = SMALL.replace(ffn_hidden_size=1040)
    for config, sizes in ((CONFIG, {1, 2, 4}), (FP8, {1})):
        found = candidates(config, shape, 4, frozenset())
        assert {c.parallel.tensor_size for c in found} == sizes
    fixed = dataclasses.replace(FP8, parallel=ParallelConfig(tensor_model_parallel_size=4))
    with pytest.raises(
        ConfigError, match="a rank's ffn_hidden_size is 260 with tensor_model_parallel_size=4; lower that"
    ):
        search_of(4096, 4, shape=shape, config=fixed).as_configured()


def test_what_is_fixed_must_fit_the_host_s_memory() -> None:
    """RMSProp's 16 bytes per weight of eight layers are 30 GiB of a GPU's host."""
    shape = MISTRAL.replace(num_layers=8)
    offloading = dataclasses.replace(CONFIG.optimizer, optimizer_cpu_offload=True)
    config = dataclasses.replace(
        CONFIG, optimizer=offloading, parallel=dataclasses.replace(CONFIG.parallel, use_distributed_optimizer=True)
    )
    host = dataclasses.replace(A100, host_memory_gib=40.0)
    search = search_of(16384, 1, shape=shape, config=config, machine=host)
    (best,) = search.best(1)
    assert best.memory.host == pytest.approx(16 * best.memory.bytes.static.parameters)
    assert best.memory.host <= search.usable_host_bytes and search.fits(search.as_configured().memory)
    small = dataclasses.replace(search, machine=dataclasses.replace(host, host_memory_gib=20.0))
    assert not small.best(1)
    for plan in (small.closest(), small.as_configured()):
        assert re.search(
            r"and 2\d\.\d of 18\.4 GiB of the host's memory per GPU \(optimizer_cpu", small.needs(plan.memory)
        )
    # The same of activations: twice what three layers keep, since pinned memory is rounded up.
    training = dataclasses.replace(CONFIG.training, cpu_offloading_num_layers=3)
    config = dataclasses.replace(CONFIG, training=training)
    given = frozenset({"cpu_offloading_num_layers", "optimizer_cpu_offload"})
    search = dataclasses.replace(search, config=config, given=given)
    (best,) = search.best(1)
    (stage,) = search._stages(best.candidate, False).values()
    assert best.memory.host == 2 * 3 * stage.activations.kept(recompute_up=best.recompute.up) > 0
    tight = dataclasses.replace(host, host_memory_gib=best.memory.host / 2**30)
    (plan,) = dataclasses.replace(search, machine=tight).best(1)
    assert plan.memory.host < best.memory.host


def test_the_configured_layout_keeps_the_layers_that_wait_in_host_memory() -> None:
    for wanted in (4, 0):
        training = TrainingConfig(bf16=True, cpu_offloading_num_layers=wanted)
        parallel = ParallelConfig(context_parallel_size=8, use_distributed_optimizer=True)
        config = dataclasses.replace(CONFIG, training=training, parallel=parallel)
        machine = dataclasses.replace(A100, memory_gib=74.0)
        assert search_of(131072, 8, config=config, machine=machine).as_configured().recompute.offloaded == wanted


def test_recomputing_one_layer_less_may_take_less_memory() -> None:
    """With few layers, what the last one makes again is more than it saved."""
    shape = MISTRAL.replace(num_layers=2)
    config = dataclasses.replace(CONFIG, training=TrainingConfig(bf16=True, global_batch_size=12))
    search = search_of(65536, 3, shape=shape, config=config)
    candidate = next(c for _, c in search.ordered if c.parallel.context_size == 3 and c.micro_batch_size == 1)
    one, two = (search.memory(candidate, Recompute(True, n)).total for n in (1, 2))
    assert one < two
    machine = dataclasses.replace(A100, memory_gib=(one + two) / 2 / 0.92 / 2**30, reserved_gib=0.0)
    given = frozenset({"cpu_offloading_num_layers", "optimizer_cpu_offload"})
    search = dataclasses.replace(search, machine=machine, given=given)
    plan = search.fitted(candidate)
    assert plan is not None and plan.recompute == Recompute(True, 1)
    assert search.leanest(candidate).recompute == Recompute(True, 1)


# --------------------------------------------------------------------------------------------------
# Answers change as they must
# --------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from((4096, 16384, 50000)),
    st.sampled_from((1, 2, 6, 8)),
    st.sampled_from(("a100-80g", "h100-sxm", "l40s")),
)
def test_answers_change_as_they_must(length: int, gpus: int, name: str) -> None:
    machine = load_machine(name)
    config = dataclasses.replace(CONFIG, training=TrainingConfig(bf16=True, global_batch_size=48))
    (best,) = search_of(length, gpus, shape=SMALL, config=config, machine=machine).best(1)
    # Twice the length: more than twice the time, at most four times; no less memory in the same layout.
    longer = search_of(2 * length, gpus, shape=SMALL, config=config, machine=machine)
    (twice,) = longer.best(1)
    assert 1.9 * best.seconds < twice.seconds < 4.1 * best.seconds
    assert longer.memory(best.candidate, best.recompute).total > best.memory.total
    # Twice the GPUs: faster, but not more than twice as fast.
    (more,) = search_of(length, 2 * gpus, shape=SMALL, config=config, machine=machine).best(1)
    assert 0.45 * best.seconds < more.seconds < best.seconds
    # Half the memory: not faster, and it fits.
    half = dataclasses.replace(machine, memory_gib=machine.memory_gib / 2)
    found = search_of(length, gpus, shape=SMALL, config=config, machine=half).best(1)
    assert not found or (found[0].seconds >= best.seconds and found[0].memory.total <= 0.92 * half.memory_bytes)
    # Links twice as slow: not faster.
    slow = dataclasses.replace(
        machine, node_link_gb_per_s=machine.node_link_gb_per_s / 2, network_gb_per_s=machine.network_gb_per_s / 2
    )
    assert search_of(length, gpus, shape=SMALL, config=config, machine=slow).best(1)[0].seconds >= best.seconds


def test_the_best_are_the_best_of_all() -> None:
    """The search stops early; going through everything finds the same."""
    search = search_of(32768, 8, machine=dataclasses.replace(A100, memory_gib=40.0))
    every = [plan for _, candidate in search.ordered if (plan := search.fitted(candidate)) is not None]
    assert [p.seconds for p in search.best(10)] == sorted(p.seconds for p in every)[:10]


def test_sixteen_thousand_gpus_and_four_million_tokens_take_seconds() -> None:
    config = dataclasses.replace(CONFIG, training=TrainingConfig(bf16=True, global_batch_size=512))
    shape = MISTRAL.replace(
        num_layers=80, hidden_size=8192, ffn_hidden_size=28672, num_attention_heads=64, vocab_size=128256
    )
    began = time.process_time()
    (best,) = search_of(4_000_000, 16384, shape=shape, config=config, machine=load_machine("h100-sxm")).best(1)
    # Of this process, whatever else the machine does.
    assert time.process_time() - began < 10
    assert best.candidate.parallel.context_size > 8


# --------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    SMALL.write(folder)
    return folder


def test_the_command_writes_what_train_takes(tmp_path: Path, model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan"
    flags = ["--hf", str(model), "--gpus", "4", "--length", "8192", "--samples", "1000", "--dollars-per-gpu-hour", "2"]
    command(
        [*flags, "--optimizer", "rmsprop", "--with-generation", "--with-evaluation", "--output", str(out)], prog="plan"
    )
    printed = capfd.readouterr().out
    assert "the best 10, fastest first:" in printed and "limited by" in printed and "slower by" in printed
    assert "the run: 125 steps" in printed and "dollars" in printed and "generation" in printed
    found = json.loads((out / "plan.json").read_text())
    assert found["schema_version"] == 1 and len(found["plans"]) == 10
    best = found["plans"][0]
    assert sum(best["seconds"].values()) == pytest.approx(best["step_seconds"], rel=1e-3)
    assert sum(best["bytes"].values()) - best["bytes"]["reserve"] == pytest.approx(best["peak_bytes"], abs=16)
    config = from_yaml(out / "train.yaml")
    check(config)
    check_against_model(config, world_size=4, num_layers=4, attention_heads=8, key_value_heads=4)
    assert config.training.bf16 and config.data.seq_length == 8192
    assert yaml.safe_load((out / "train.yaml").read_text())["parallel"] == best["parallel"]
    for theme in ("light", "dark"):
        assert (out / f"plan_{theme}.svg").read_text().startswith("<?xml")


def test_a_plan_is_verified_by_its_simulated_step(tmp_path: Path, model: Path) -> None:
    # Two samples per micro batch, which must not be equal: they would share their document.
    flags = ["--hf", str(model), "--gpus", "4", "--length", "2048", "--top", "1", "--micro-batch-size", "2"]
    flags += ["--tensor-model-parallel-size", "2", "--context-parallel-size", "2"]
    command([*flags, "--simulate", "--output", str(tmp_path / "plan")], prog="plan")
    (found,) = json.loads((tmp_path / "plan" / "plan.json").read_text())["simulated"]
    assert found["fits"] and not found["violations"]
    # Tables and buffers of a few megabytes weigh in a model of 20 MB.
    assert found["peak_bytes"] <= found["estimate_bytes"] <= 1.15 * found["peak_bytes"]
    assert found["seconds"] == pytest.approx(found["planned_seconds"], rel=0.05)


def test_what_was_simulated_but_not_planned_takes_its_time() -> None:
    assert _seconds(2.0, found=3, planned=6, alone=9.0) == 1.0
    assert _seconds(0.0, found=3, planned=0, alone=9.0) == 9.0
    assert _seconds(2.0, found=0, planned=6, alone=0.0) == 0.0


def test_the_yaml_s_own_layout_stands_beside_the_best(
    tmp_path: Path, model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run.yaml"
    run.write_text("parallel: {context_parallel_size: 4}\ntraining: {bf16: true}\ndata: {seq_length: 8192}\n")
    command(["--config", str(run), "--hf", str(model), "--gpus", "4"], prog="plan")
    assert "as configured: TP 1, PP 1, CP 4 a2a, DP 1" in capfd.readouterr().out
    command(["--config", str(run), "--hf", str(model), "--gpus", "6"], prog="plan")
    assert "the configured layout is none for 6 GPUs: tensor 1 x pipeline 1 x context 4" in capfd.readouterr().out


def test_where_nothing_fits_it_says_what_would(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    model.mkdir()
    MISTRAL.write(model)
    with pytest.raises(ConfigError, match="nothing fits 1 x a100-40g with rows of 131,"):
        command(["--hf", str(model), "--gpus", "1", "--gpu", "a100-40g", "--length", "131072"], prog="plan")
    printed = capfd.readouterr().out
    assert "nothing fits. Closest: TP 1" in printed
    assert re.search(r"would fit with 4 GPUs: TP .*; optimizer in host memory, 36", printed)


def test_a_world_without_any_layout_is_refused_with_the_reason(model: Path) -> None:
    flags = ["--hf", str(model), "--gpus", "7", "--length", "4096", "--context-parallel-size", "2"]
    with pytest.raises(
        ConfigError, match="no layout of 7 GPUs is allowed with global_batch_size=8, context_parallel_size=2"
    ):
        command(flags, prog="plan")


# --------------------------------------------------------------------------------------------------
# In training
# --------------------------------------------------------------------------------------------------


def run_of(folder: Path, tokens: int, **sections: dict[str, Any]) -> Config:
    """Configuration of a run of four micro batches, with a checkpoint's shape and data."""
    request = Request(sections, 1, 0, dataclasses.asdict(SMALL), tokens=tokens, answer_tokens=64, micro_batches=4)
    return plan_of(request, folder).config


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("NVIDIA A100-PCIE-40GB", "a100-40g"),
        ("NVIDIA A800-SXM4-80GB", "a800-80g"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("AMD Instinct MI300X", "mi300x"),
        ("NVIDIA GeForce RTX 3090", None),
        ("NVIDIA RTX A6000", None),
        ("Quadro 5000", None),
    ],
)
def test_a_card_is_known_by_its_name(device: str, name: str | None) -> None:
    assert machine_of(device) == name


def test_degrees_that_are_left_out_are_chosen_for_the_world(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    config = run_of(tmp_path, 4096, parallel={"tensor_model_parallel_size": 1})
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, auto_layout=True))
    chosen = auto_layout(config, 4, frozenset())
    check_against_model(chosen, world_size=4, num_layers=4, attention_heads=8, key_value_heads=4)
    assert not chosen.parallel.auto_layout
    # What is recomputed is decided by the trainer, by the memory that it finds.
    assert chosen.training.recompute_granularity == "auto"
    assert re.search(r"layout: TP .*, planned for 4 x cpu \(.* limited by .*; next TP", capfd.readouterr().out)
    fixed = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, context_parallel_size=2))
    assert auto_layout(fixed, 4, changed_fields(fixed)).parallel.context_parallel_size == 2
    with pytest.raises(ConfigError, match="auto_layout is resolved by the command"):
        make_plan(config, 1)
    monkeypatch.setattr(platform.Platform, "facts", lambda _: platform.DeviceFacts("x86_64", 2**28))
    with pytest.raises(ConfigError, match=r"no layout of 1 x cpu has room for rows of 4,096 tokens; the closest, TP 1"):
        auto_layout(config, 1, frozenset())


def test_an_optimizer_in_host_memory_is_said_and_can_be_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = run_of(tmp_path, 1024)
    search = search_of(1024, 1, shape=SMALL, config=config)
    least = min(plan.memory.total for plan in (search.leanest(c) for c in search.candidates))
    machine = dataclasses.replace(A100, memory_gib=1.02 * least / 0.92 / 2**30, reserved_gib=0.0, host_memory_gib=64.0)
    monkeypatch.setattr(layout, "machine_here", lambda: machine)
    chosen = auto_layout(config, 1, frozenset())
    assert chosen.optimizer.optimizer_cpu_offload
    assert (
        "layout: TP 1, PP 1, CP 1, DP 1; optimizer in host memory (optimizer_cpu_offload), planned for"
        in capfd.readouterr().out
    )
    with pytest.raises(ConfigError, match="no layout of 1 x"):
        auto_layout(config, 1, frozenset({"optimizer_cpu_offload"}))


def test_keys_that_a_file_writes_are_given_unless_it_writes_all(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "parallel:\n  tensor_model_parallel_size: 1\noptimizer:\n  optimizer_cpu_offload: false\n"
        "training:\n  cpu_offloading_num_layers: null\ndata:\n"
    )
    assert given_in(str(path)) == {"tensor_model_parallel_size", "optimizer_cpu_offload"}
    printed = dataclasses.replace(Config(), parallel=ParallelConfig(context_parallel_size=2))
    path.write_text(printed.as_yaml())
    assert given_in(str(path)) == {"context_parallel_size"}


@pytest.mark.parametrize(("threads", "rate"), [(1, 20.0), (64, 30.0)])
def test_the_host_s_memory_and_cores_are_those_that_are_here(
    monkeypatch: pytest.MonkeyPatch, threads: int, rate: float
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(platform.Platform, "host_memory_size", lambda _: 64 * 2**30)
    monkeypatch.setattr(layout.torch, "get_num_threads", lambda: threads)
    known = dataclasses.replace(load_machine("cpu"), host_update_gb_per_s=30.0)
    monkeypatch.setattr(layout, "load_machine", lambda _: known)
    machine = machine_here()
    assert (machine.host_memory_gib, machine.host_update_gb_per_s) == (16.0, rate)


def test_memory_that_is_not_enough_names_the_next_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_of(tmp_path, 32768, training={"recompute_granularity": "none"})
    monkeypatch.setattr(failure, "_memory_advice", None)
    failure.advise_on_memory(lambda: next_layout(config, 4))
    line = failure.explain(MemoryError())
    assert line is not None and "out of memory" in line
    found = re.search(r"the planner's next layout is (--.*) \((.*) GiB estimated; this one: (.*)\)", line)
    assert found is not None and float(found[2]) <= 0.85 * float(found[3])
    # They are flags, and a run that train takes.
    _, changed = parse_with_config(Config, found[1].split(), prog="train", description="", options=ConfigOptions)
    whole = dataclasses.replace(config, parallel=changed.parallel)
    check_against_model(whole, world_size=4, num_layers=4, attention_heads=8, key_value_heads=4)
    failure.advise_on_memory(lambda: next_layout(config, 3))
    # Advice that cannot be found is left out.
    assert (failure.explain(MemoryError()) or "").endswith("more memory")
