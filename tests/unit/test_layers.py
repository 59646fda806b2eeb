"""Blocks, rotary embedding, what layers keep, and how much is computed again, by hand and against plain torch."""

from __future__ import annotations

import dataclasses
import itertools
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_longpo.config import from_dict, from_yaml
from megatron_longpo.data.sequence import KeyBlock, QuerySpan
from megatron_longpo.model.attention import rotate
from megatron_longpo.model.blocks import Blocks, CausalBlock, FullBlock, block_attention, blocks_of
from megatron_longpo.model.entries import _halves, _neighbours
from megatron_longpo.model.families import shape_from_hf
from megatron_longpo.model.layers import _SwiGLU, recompute_in_backward
from megatron_longpo.model.rotary import Rotary, rotary_of
from megatron_longpo.model.shape import ModelShape
from megatron_longpo.runtime import platform
from megatron_longpo.training import memory
from megatron_longpo.training.activations import Activations
from tests.support.attention import dense_attention, tree
from tests.support.plans import parallel_of


def test_branches_on_one_trunk_are_one_block() -> None:
    """However many branches: their queries lie side by side and see the same keys."""
    groups = (
        QuerySpan(0, 5, (KeyBlock(0, 5, True),)),
        QuerySpan(5, 7, (KeyBlock(0, 3, False), KeyBlock(5, 7, True))),
        QuerySpan(7, 10, (KeyBlock(0, 3, False), KeyBlock(7, 10, True))),
        QuerySpan(10, 11, (KeyBlock(0, 4, False), KeyBlock(10, 11, True))),
    )
    assert blocks_of(groups) == Blocks(
        (CausalBlock(0, 0, 5), CausalBlock(5, 5, 2), CausalBlock(7, 7, 3), CausalBlock(10, 10, 1)),
        (FullBlock(5, 10, 0, 3), FullBlock(10, 11, 0, 4)),
    )


def test_a_group_without_its_own_keys_is_refused() -> None:
    with pytest.raises(ValueError, match="one causal block"):
        blocks_of([QuerySpan(0, 2, (KeyBlock(0, 2, False),))])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(0, 2))
def test_rotation_is_by_complex_numbers(half: int, rest: int) -> None:
    positions = torch.tensor([0, 3, 7, 100])
    frequencies = torch.rand(half)
    x = torch.randn(4, 2, 2 * half + rest, dtype=torch.float64, requires_grad=True)
    angles = positions.unsqueeze(1) * frequencies.double()
    turned = (
        torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    )
    expected = torch.cat([turned.real, turned.imag, x[..., 2 * half :]], dim=-1)
    found = rotate(x, *Rotary(frequencies).cos_sin(positions, torch.float64))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    direction = torch.randn_like(x)
    (a,), (b,) = (torch.autograd.grad((y * direction).sum(), x) for y in (found, expected))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_what_is_recomputed_is_not_kept() -> None:
    """The product that reads it keeps nothing of it, and its gradients are the same."""
    torch.manual_seed(0)
    both, weight = torch.randn(5, 8, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    plain = torch.nn.functional.silu(both[:, :4]) * both[:, 4:]
    expected = torch.autograd.grad((plain @ weight.t()).square().sum(), (both, weight))
    activated = _SwiGLU.apply(both)
    asked = []

    def make() -> torch.Tensor:
        asked.append(1)
        return plain.detach()

    with recompute_in_backward(activated, make):
        out = activated @ weight.t()
    activated.untyped_storage().resize_(0)  # whoever kept it would now fail or give garbage
    assert not asked
    found = torch.autograd.grad(out.square().sum(), (both, weight))
    assert asked
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


ROOT = Path(__file__).parents[2]
_MISTRAL = ModelShape("mistral", 32, 4096, 14336, 32, 8, 128, 32000, 1e-5, False, True, 1e6, 32768, 0.02, "bfloat16")


def _choices(
    tokens: int, context: int, *, on_cuda: bool = False, optimizer: str = "adam", **training: Any
) -> list[memory.Choice]:
    config = from_dict(
        {
            "optimizer": {"optimizer": optimizer},
            "training": {"bf16": True, **training},
            "parallel": {"context_parallel_size": context, "use_distributed_optimizer": True},
        },
        "test",
    )
    parallel = types.SimpleNamespace(**{**vars(parallel_of(context_size=context)), "dp_cp_size": context})
    return memory.choices(
        _MISTRAL,
        config,
        parallel,  # type: ignore[arg-type]
        tokens=tokens,
        pairs=tokens * tokens // 2,
        num_microbatches=8,
        stage=0,
        on_cuda=on_cuda,
    )


def test_no_more_is_computed_again_than_memory_demands() -> None:
    """Mistral-7B at 128K over 8 ranks: choices cost more and more, and the first that fits is taken."""
    found = _choices(131072, 8)
    assert [c.extra for c in found] == sorted(c.extra for c in found)
    # At this length most of a layer's time is attention: the MLPs' first products cost little.
    assert found[0].modules == ("mlp_up",) and found[0].granularity == "selective" and found[0].extra < 0.05
    by_layers = {c.layers: c for c in found}
    # By hand: 16384 places x (2 x 4096 + 2 x 4096 + 2 x 1024) numbers of 2 bytes, and in fp32 a number for each of two norms and
    # of 32 heads. Of a layer that is recomputed only the input is kept, but one of them is whole while it is passed.
    kept = 16384 * ((2 * 4096 + 2 * 4096 + 2 * 1024) * 2 + (2 + 32) * 4)
    all_layers = by_layers[32]
    assert found[0].bytes_needed - all_layers.bytes_needed == 31 * kept - 32 * 16384 * 4096 * 2
    assert all_layers.extra > 0.2
    available = 2 * 10**11
    assert memory.choose(found, [memory.free_bytes(c, available) for c in found]).layers == 0
    tight = int(by_layers[20].bytes_needed / 0.9) + 1
    chosen = memory.choose(found, [memory.free_bytes(c, tight) for c in found])
    assert memory.free_bytes(chosen, tight) >= 0
    assert all(memory.free_bytes(c, tight) < 0 for c in found if c.extra < chosen.extra)
    # Nothing fits: the one that is nearest. The last layer's turn comes first in the backward, when its halves fit beside the
    # other layers' inputs; recomputed as a whole it would take no less.
    nearest = memory.choose(found, [memory.free_bytes(c, 10**9) for c in found])
    assert nearest == by_layers[31] == min(found, key=lambda c: c.bytes_needed)


def test_activations_wait_in_host_memory_before_layers_are_recomputed_if_copies_are_hidden() -> None:
    """Mistral-7B over 8 GPUs: what a layer saves is copied while 30,000 operations per byte are computed at 128K, not at 64K."""
    found = _choices(131072, 8, on_cuda=True, optimizer="rmsprop")
    kept = 16384 * ((2 * 4096 + 2 * 4096 + 2 * 1024) * 2 + (2 + 32) * 4)
    linear, attention = 2 * 131072 * _MISTRAL.layer_weights / 8, 4 * 131072**2 / 2 * 4096 / 8
    assert linear + attention > memory.FLOPS_PER_COPIED_BYTE * kept
    first = [c for c in found if c.granularity == "selective"]
    assert found[: len(first)] == first and [c.offloaded for c in first] == list(range(32))
    # Each layer less on the GPU, as long as two are left there; pinned memory is counted twice. With the first of them the last
    # norm's input stays in the layers' backward.
    needs = [c.bytes_needed for c in first]
    assert [a - b for a, b in itertools.pairwise(needs)] == [kept - 16384 * 4096 * 2] + [kept] * 29 + [0]
    # Adam has a number more per weight of a rank's share: 32 layers of 218 million and two norms, the embedding, the output and
    # the last norm, by 8 ranks.
    adam = [c.bytes_needed for c in _choices(131072, 8, on_cuda=True) if c.granularity == "selective"]
    share = (32 * (218_103_808 + 2 * 4096) + (2 * 32000 + 1) * 4096) // 8
    assert {a - n for a, n in zip(adam, needs, strict=True)} == {4 * share}
    assert [c.host_bytes for c in first] == [2 * n * kept for n in range(32)]
    assert str(first[3]) == "the MLPs' up-projections; activations of 3 layer(s) of each stage in host memory"
    assert {c.offloaded for c in _choices(65536, 8, on_cuda=True)} == {0}
    assert {c.offloaded for c in _choices(131072, 8)} == {0}
    # What is asked for is neither raised nor lowered.
    assert {c.offloaded for c in _choices(131072, 8, on_cuda=True, cpu_offloading_num_layers=0)} == {0}
    assert {c.offloaded for c in _choices(1024, 1, cpu_offloading_num_layers=4) if c.layers < 28} == {4}


@pytest.mark.parametrize(("bf16", "each"), [(True, 16), (False, 20)])
def test_activations_in_host_memory_leave_room_for_the_optimizer(bf16: bool, each: int) -> None:
    """RMSProp's fp32 weight, state and pinned gradient (twice): 16 bytes per weight; weights trained in fp32 are pinned, too."""
    config = from_dict(
        {
            "parallel": {"use_distributed_optimizer": True, "context_parallel_size": 8},
            "training": {"bf16": bf16},
            "optimizer": {"optimizer": "rmsprop", "optimizer_cpu_offload": True},
        },
        "test",
    )
    parallel = parallel_of(context_size=8, world_size=8)
    weights = memory.static_bytes(_MISTRAL, config, parallel, 0).parameters
    taken = each * weights // 8
    assert memory.host_optimizer_bytes(weights, config, parallel) == pytest.approx(taken, abs=1)
    assert memory.host_room(4 * taken, _MISTRAL, config, parallel) == pytest.approx(taken, abs=1)
    assert memory.host_room(taken, _MISTRAL, config, parallel) == 0
    on_device = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, optimizer_cpu_offload=False)
    )
    assert memory.host_room(4 * taken, _MISTRAL, on_device, parallel) == 2 * taken


def test_an_update_needs_memory_when_activations_are_gone() -> None:
    """Mistral-7B: on a GPU the roots of all second moments of a rank's share at once with Adam, elsewhere two numbers per weight
    of the largest tensor, the embedding, and one of the MLP's before it; with RMSProp one of the largest."""

    def update(optimizer: str, ranks: int, on_cuda: bool, **more: Any) -> int:
        sections = {
            "optimizer": {"optimizer": optimizer, **more},
            "training": {"bf16": True, "recompute_granularity": "none"},
            "parallel": {"context_parallel_size": ranks, "use_distributed_optimizer": True},
        }
        config = from_dict(sections, "test")
        parallel: Any = types.SimpleNamespace(**{**vars(parallel_of(context_size=ranks)), "dp_cp_size": ranks})
        sizes = {"tokens": 64, "num_microbatches": 1, "stage": 0, "on_cuda": on_cuda}
        found = memory.StageMemory.of(_MISTRAL, config, parallel, **sizes)
        assert found.static.parameters > 7.2e9
        return found.update.update

    weights, largest = 7241732096, 32000 * 4096
    assert update("adam", 1, True) == 4 * weights
    assert update("adam", 1, True, optimizer_cpu_offload=True, optimizer_offload_fraction=0.5) == 2 * weights
    assert update("adam", 64, True) == 8 * (weights // 64)
    assert update("adam", 1, False) == 8 * largest + 4 * 2 * 4096 * 14336
    assert update("rmsprop", 1, True) == 4 * largest


@pytest.mark.parametrize(
    ("bf16", "on_cuda", "reduced", "each"),
    [
        # The gradient, and on a CPU torch's copy in fp32 of what is added to fp32 sums.
        (True, False, False, 2 + 4),
        (True, False, True, 2),
        (True, True, False, 2),
        (False, False, False, 4),
    ],
)
def test_short_rows_peak_in_the_embedding_s_backward(bf16: bool, on_cuda: bool, reduced: bool, each: int) -> None:
    """Of a stage without log-probs, where the gradient of a large table is more than what layers save of 100 tokens."""
    config = from_dict({"training": {"bf16": bf16}, "parallel": {"grad_reduce_in_bf16": reduced}}, "test")
    shape = _MISTRAL.replace(num_layers=2, hidden_size=512, ffn_hidden_size=1024, num_attention_heads=4)
    first, later = (
        Activations(shape, config, parallel_of(), tokens=100, is_first=is_first, is_last=False, on_cuda=on_cuda).peak(
            2, whole_layers=0, recompute_up=True
        )
        for is_first in (True, False)
    )
    assert first.backward == 32000 * 512 * each + 100 * 512 * (2 if bf16 else 4)
    assert (first.saved, first.buffers) == (0, later.buffers)
    assert later.total < first.total


def test_the_backward_of_gathered_keys_holds_what_comes_back_of_their_gradients() -> None:
    """Four query heads on four key-value heads, four pieces, two ranks: all in units of this rank's queries, of which keys and
    values have as many numbers, in 16 bits."""
    shape = _MISTRAL.replace(hidden_size=512, num_attention_heads=4, num_query_groups=4)
    config = from_dict({"training": {"bf16": True}}, "test")
    parallel = parallel_of(context_size=2, world_size=2, comm_type="allgather")
    found = Activations(shape, config, parallel, tokens=2000, is_first=False, is_last=False, on_cuda=True)
    # The gradient of the hidden states, those of output and queries, gathered keys and values of one piece.
    held = 1 + 2 + 2 * 2 / 4
    # Gradients of all ranks' keys and values in fp32, this rank's of three pieces, and the tensors that they are put into.
    held += 2 * 2 * 2 + 2 * 2 * 3 / 4 + 2
    # A piece's gradients as the kernel gives them, together in 16 bits, and in fp32.
    held += 2 * 2 / 4 + 2 * 2 / 4 + 2 * 2 * 2 / 4
    assert found._attention_backward == held * 1000 * 512 * 2


def test_log_probs_on_a_cpu_round_gradients_of_the_weight_by_blocks() -> None:
    """In bf16 a block of 2^23 numbers in 2 bytes, and torch's copy of it in fp32 while it is added."""

    def peak(*, bf16: bool, on_cuda: bool, vocabulary: int = 32000) -> int:
        sections = {"training": {"bf16": bf16}, "model": {"logprob_chunk_bytes": 2**27}}
        found = Activations(
            _MISTRAL.replace(vocab_size=vocabulary),
            from_dict(sections, "test"),
            parallel_of(),
            tokens=4096,
            is_first=False,
            is_last=True,
            on_cuda=on_cuda,
        )
        return found._logprobs

    assert peak(bf16=True, on_cuda=False) - peak(bf16=True, on_cuda=True) == 6 * 2**23
    assert peak(bf16=False, on_cuda=False) == peak(bf16=False, on_cuda=True)
    # Less where the weight has fewer numbers.
    small = {"bf16": True, "vocabulary": 1024}
    assert peak(**small, on_cuda=False) - peak(**small, on_cuda=True) == 6 * 1024 * 4096


def test_what_is_compared_of_two_computations_takes_memory() -> None:
    """Mistral-7B at 128K tokens over CP 8 is 16,384 places per rank, of each of which a layer gives 9 * 4096 + 3 * (32 + 8) * 128
    + 2 * 14336 values and as many gradients; 16 bytes per 1024 of them, twice."""

    def records(*, on_cuda: bool = True, granularity: str = "none", **training: Any) -> int:
        sections = {
            "training": {"bf16": True, "recompute_granularity": granularity, **training},
            "parallel": {"context_parallel_size": 8, "use_distributed_optimizer": True},
            "faults": {"check_rerun_interval": 100},
        }
        config = from_dict(sections, "test")
        sizes = {"tokens": 131072, "num_microbatches": 1, "stage": 0, "on_cuda": on_cuda}
        found = memory.step_bytes(_MISTRAL, config, parallel_of(context_size=8, world_size=8), **sizes)  # type: ignore[arg-type]
        assert found is not None
        return found.activations.records

    layers, rest, weights = 32 * 16384 * 80896, 2 * 16384 * (5 * 4096 + 1), 7241732096
    assert records() == (2 * layers + rest + weights) // 32 == pytest.approx(2.9e9, rel=0.01)
    recomputed = {"recompute_method": "block", "recompute_num_layers": 1}
    assert records(granularity="full", **recomputed) == (3 * layers + rest + weights) // 32
    # Bits leave one number per value.
    assert records(deterministic_mode=True) == records(on_cuda=False) == 0


def test_a_longer_row_needs_more_recompute() -> None:
    rooms = [[memory.free_bytes(c, 80 * 10**9) for c in _choices(tokens, 8)] for tokens in (32768, 131072, 262144)]
    extra = [memory.choose(_choices(t, 8), r).extra for t, r in zip((32768, 131072, 262144), rooms, strict=True)]
    assert extra == sorted(extra) and extra[0] < memory.CHEAP < extra[2]
    # Where attention is little, the MLPs' products are not cheap: nothing is computed again without need.
    short = _choices(1024, 1)
    assert memory.choose(short, [memory.free_bytes(c, 10**12) for c in short]).granularity == "none"


def test_the_example_at_128k_is_the_layout_with_room_to_spare() -> None:
    """Of the ways to cut Mistral-7B over eight ranks in two kinds of parallelism or one, by peaks of 131,072 tokens."""
    example = from_yaml(ROOT / "examples" / "longpo_128k.yaml")

    def peak(tensor: int, context: int) -> float:
        degrees = {"tensor_model_parallel_size": tensor, "context_parallel_size": context}
        config = dataclasses.replace(
            example,
            parallel=dataclasses.replace(example.parallel, **degrees, sequence_parallel=tensor > 1),
            training=dataclasses.replace(
                example.training, recompute_granularity="selective", recompute_modules=("mlp_up",)
            ),
        )
        parallel = parallel_of(tensor_size=tensor, context_size=context, sequence_parallel=tensor > 1, world_size=8)
        sizes = {"tokens": 131072, "num_microbatches": 8, "stage": 0, "on_cuda": True}
        found = memory.step_bytes(_MISTRAL, config, parallel, **sizes)  # type: ignore[arg-type]
        assert found is not None
        return found.total / 2**30

    # CP 8, at which every rank has all weights and their fp32 gradients, is the tightest: 6 bytes of each of 7.2 billion.
    peaks = {(tensor, context): peak(tensor, context) for tensor, context in ((1, 8), (2, 4), (4, 2), (8, 1))}
    assert max(peaks, key=peaks.__getitem__) == (1, 8)
    chosen = (example.parallel.tensor_model_parallel_size, example.parallel.context_parallel_size)
    assert chosen == (2, 4) and example.parallel.sequence_parallel
    # What docs/simulation.md has: nothing is recomputed but the MLPs' first products.
    assert peaks[chosen] < 50 and peaks[1, 8] > peaks[chosen] + 18


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 80), st.integers(0, 3))
def test_a_sliding_window_is_a_mask(window: int, seed: int) -> None:
    """Blocks with a window, on a tree, against dense attention under the mask of positions."""
    layout, tensors = tree(seed)
    blocks = blocks_of(layout.query_spans, window, layout.positions_S)
    direction = torch.randn_like(tensors[0])
    query, key, value = tensors
    n = layout.length
    positions = torch.from_numpy(layout.positions_S)
    within = torch.zeros(len(query), len(query), dtype=torch.bool)
    within[:n, :n] = positions[None, :] > positions[:, None] - window
    dense = dense_attention(layout.query_spans, query, key, value, 0.3, within)
    found = block_attention(query, key, value, blocks, 0.3)
    torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-5)
    pairs = [torch.autograd.grad((x * direction).sum(), tensors) for x in (found, dense)]
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 8.0},
        # Llama 3.1's and 3.2's own numbers.
        *(
            {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
            for factor in (8.0, 32.0)
        ),
        # Qwen2.5's, YaRN-Mistral-128K's, and every optional number.
        _YARN,
        {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 8192, "finetuned": True},
        {**_YARN, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
        {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.8},
        {**_YARN, "attention_factor": 1.3},
    ],
)
@pytest.mark.parametrize("theta", [1e4, 1e7])
def test_scaled_rope_is_transformers_to_the_bit(parameters: dict[str, Any], theta: float) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=512,
        num_attention_heads=4,
        num_hidden_layers=1,
        max_position_embeddings=131072,
        rope_parameters={**parameters, "rope_theta": theta},
    )
    positions = torch.tensor([0, 1, 5, 8191, 32768, 131071, 500000])
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    shape = shape_from_hf(
        {
            **config.to_dict(),
            "architectures": ["LlamaForCausalLM"],
            "rope_parameters": {**parameters, "rope_theta": theta},
        },
        "config.json",
    )
    ours = rotary_of(shape, shape.rotary_base).cos_sin(positions, torch.float32)
    assert torch.equal(ours[0], cos[0, :, :64]) and torch.equal(ours[1], sin[0, :, :64])


def test_interleaved_rows_there_and_back() -> None:
    """GLM's neighbours become halves, and neighbours again; the rest of a head stays."""
    shape = _MISTRAL.replace(kv_channels=8, rotary_interleaved=True, rotary_percent=0.5)
    rows = torch.arange(16.0)[:, None]
    halves = _halves(rows, shape)
    assert halves[:8, 0].tolist() == [0, 2, 1, 3, 4, 5, 6, 7]
    assert torch.equal(_neighbours(halves, shape), rows)


def test_limits_of_containers_and_jobs_are_seen(tmp_path: Path) -> None:
    """Version 2 and version 1; cached files do not count, ``max`` and missing files set no limit."""
    process = tmp_path / "cgroup"
    process.write_text("0::/slurm/job_1\n")
    root = tmp_path / "root"
    job = root / "slurm" / "job_1"
    job.mkdir(parents=True)
    assert platform._left_in_control_group(root, process) == sys.maxsize
    (root / "memory.max").write_text("max\n")
    (job / "memory.max").write_text("1000\n")
    (job / "memory.current").write_text("700\n")
    (job / "memory.stat").write_text("anon 100\ninactive_file 200\n")
    assert platform._left_in_control_group(root, process) == 1000 - (700 - 200)
    assert list(platform._control_group_memory(root, process)) == [(1000, 700 - 200)]
    first = root / "memory"
    first.mkdir()
    (first / "memory.limit_in_bytes").write_text("450\n")
    (first / "memory.usage_in_bytes").write_text("50\n")
    (first / "memory.stat").write_text("cache 0\n")
    assert platform._left_in_control_group(root, process) == 400
