"""The table of named configurations, all compared with one process."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from tests.support.models import FAMILIES, VARIANTS


@dataclass(frozen=True)
class Case:
    """A layout with its settings.

    Attributes:
        name: name of the case.
        processes: number of processes it runs on.
        settings: configuration by section.
        oracle: one-process case that it must agree with; prefix sharing is off in that one.
        families: model families that it runs on.
        bf16: whether it computes in bf16, and so need not agree better than plain bf16 does.
    """

    name: str
    processes: int
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    oracle: str = "one-not-shared"
    families: tuple[str, ...] = FAMILIES
    bf16: bool = False


def _layout(tp: int = 1, pp: int = 1, cp: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "context_parallel_size": cp,
        **more,
    }


_FULL = {"recompute_granularity": "full"}
_SELECTIVE = {"recompute_granularity": "selective"}
_MLP = {"recompute_granularity": "selective", "recompute_modules": ("mlp",)}
_UP = {"recompute_granularity": "selective", "recompute_modules": ("mlp_up",)}
# Activations of some layers in host memory.
_OFFLOADED = {"cpu_offloading_num_layers": 3}
# A micro batch of the second step is computed twice before, which changes nothing.
_RERUN = {"check_rerun_interval": 2}
_NOT_SHARED = {"prefix_sharing": False}
_INDEPENDENT = {"turns": "independent"}
_FEW = {"data_path": "few"}
_MIXTURE = {"data_path": ["0.7", "data", "0.3", "few"]}

_LOSSES: tuple[tuple[str, dict[str, Any], str, int, dict[str, Any]], ...] = (
    ("norm", {"loss_type": "sigmoid_norm", "label_smoothing": 0.1}, "cp2", 2, _layout(cp=2)),
    ("robust", {"loss_type": "robust", "label_smoothing": 0.1}, "tp2", 2, _layout(tp=2)),
    ("hinge", {"loss_type": "hinge"}, "dp2", 2, _layout()),
    ("simpo", {"loss_type": "simpo", "beta": 2.0}, "pp2", 2, _layout(pp=2)),
    ("rpo", {"objective": "dpo", "rpo_alpha": 0.7}, "tp2-sp", 2, _layout(tp=2, sequence_parallel=True)),
    (
        "orpo",
        {"objective": "dpo", "loss_type": "orpo", "rpo_alpha": 1.0, "nll_scope": "response"},
        "cp2-allgather",
        2,
        _layout(cp=2, cp_comm_type="allgather"),
    ),
    # SoLoPO: three sums per sample, of short and of long rows.
    ("solo-simpo", {"objective": "solopo", "loss_type": "simpo", "beta": 2.0}, "cp2", 2, _layout(cp=2)),
    (
        "solo-orpo",
        {"objective": "solopo", "loss_type": "orpo", "rpo_alpha": 1.0, "solo_alpha": 3.0},
        "pp2",
        2,
        _layout(pp=2),
    ),
)

_BASE = (
    # One process: what may not change the numbers, and the oracles of other objectives.
    Case("one", 1),
    Case("one-not-shared", 1, {"data": _NOT_SHARED}),
    Case("one-micro2", 1, {"training": {"micro_batch_size": 2}}),
    Case("one-recompute-full", 1, {"training": _FULL}),
    Case("one-recompute-selective", 1, {"training": _SELECTIVE}),
    Case("one-recompute-mlp", 1, {"training": _MLP}),
    Case("one-recompute-up", 1, {"training": _UP}),
    Case(
        "one-recompute-block", 1, {"training": {**_UP, **_FULL, "recompute_method": "block", "recompute_num_layers": 2}}
    ),
    Case(
        "one-offloaded", 1, {"training": {"recompute_granularity": "none", **_OFFLOADED}}, families=("qwen2", "qwen3")
    ),
    Case("one-offloaded-up", 1, {"training": {**_UP, **_OFFLOADED}}, families=("qwen2",)),
    Case(
        "one-offloaded-block",
        1,
        {"training": {**_UP, **_FULL, **_OFFLOADED, "recompute_method": "block"}},
        families=("qwen2",),
    ),
    Case("one-offloaded-attention", 1, {"training": {**_SELECTIVE, **_OFFLOADED}}, families=("qwen2",)),
    Case("one-chunked", 1, {"model": {"logprob_chunk_bytes": 8 * 101 * 16}}),
    Case("one-online-swapped", 1, {"reference": {"reference": "online"}}),
    Case("one-online-resident", 1, {"reference": {"reference": "online", "reference_model": "resident"}}),
    Case("one-distopt", 1, {"parallel": {"use_distributed_optimizer": True}}),
    Case("one-independent", 1, {"data": _INDEPENDENT}, oracle="one-independent-not-shared"),
    Case(
        "one-independent-not-shared",
        1,
        {"data": {**_INDEPENDENT, **_NOT_SHARED}},
        oracle="one-independent-not-shared",
    ),
    Case("one-dpo", 1, {"objective": {"objective": "dpo"}}, oracle="one-dpo"),
    Case("one-sft", 1, {"objective": {"objective": "sft"}}, oracle="one-sft"),
    Case(
        "one-response-ipo", 1, {"objective": {"nll_scope": "response", "loss_type": "ipo"}}, oracle="one-response-ipo"
    ),
    Case("one-rmsprop", 1, {"optimizer": {"optimizer": "rmsprop", "rmsprop_eps": 1e-4}}, oracle="one-rmsprop"),
    # Three samples for a batch of four, with weights: the batch is filled up where it has to be divided.
    Case("one-few", 1, {"data": _FEW}, oracle="one-few-not-shared", families=("qwen2",)),
    Case("one-few-not-shared", 1, {"data": {**_FEW, **_NOT_SHARED}}, oracle="one-few-not-shared", families=("qwen2",)),
    Case("dp2-few", 2, {"data": _FEW}, oracle="one-few-not-shared", families=("qwen2",)),
    Case(
        "pp2-vpp2-few",
        2,
        {"data": _FEW, "parallel": _layout(pp=2, num_layers_per_virtual_pipeline_stage=1)},
        oracle="one-few-not-shared",
        families=("qwen2",),
    ),
    # Two data sets in proportion.
    Case("one-mixture", 1, {"data": _MIXTURE}, oracle="one-mixture", families=("qwen2",)),
    Case("dp2-mixture", 2, {"data": _MIXTURE}, oracle="one-mixture", families=("qwen2",)),
    # Other losses, each in one process and in another layout.
    *(
        Case(f"{layout}-{name}", processes, {"objective": values, **more}, oracle=f"one-{name}", families=("qwen2",))
        for name, values, split, size, parallel in _LOSSES
        for layout, processes, more in (("one", 1, {}), (split, size, {"parallel": parallel}))
    ),
    # Two processes.
    Case("tp2", 2, {"parallel": _layout(tp=2)}),
    Case("tp2-sp", 2, {"parallel": _layout(tp=2, sequence_parallel=True)}),
    # One rank's rows of the vocabulary are all padding.
    Case(
        "tp2-sp-all-padding",
        2,
        {"parallel": _layout(tp=2, sequence_parallel=True), "model": {"make_vocab_size_divisible_by": 128}},
    ),
    Case("tp2-sp-recompute-up", 2, {"parallel": _layout(tp=2, sequence_parallel=True), "training": _UP}),
    Case("pp2", 2, {"parallel": _layout(pp=2)}),
    Case("pp2-vpp2", 2, {"parallel": _layout(pp=2, num_layers_per_virtual_pipeline_stage=1), "faults": _RERUN}),
    # Stages of unequal sizes: 1 and 3 layers, and three virtual stages of which the outer two hold no layer.
    Case(
        "pp2-first1", 2, {"parallel": _layout(pp=2, decoder_first_pipeline_num_layers=1)}, families=("llama", "qwen2")
    ),
    Case(
        "pp2-vpp3-accounted",
        2,
        {
            "parallel": _layout(
                pp=2,
                virtual_pipeline_model_parallel_size=3,
                account_for_embedding_in_pipeline_split=True,
                account_for_loss_in_pipeline_split=True,
            )
        },
        families=("qwen2",),
    ),
    Case("cp2", 2, {"parallel": _layout(cp=2)}),
    Case("cp2-allgather", 2, {"parallel": _layout(cp=2, cp_comm_type="allgather")}),
    Case(
        "cp2-not-shared-micro2",
        2,
        {"parallel": _layout(cp=2), "data": _NOT_SHARED, "training": {"micro_batch_size": 2}},
    ),
    Case("cp2-distopt-recompute", 2, {"parallel": _layout(cp=2, use_distributed_optimizer=True), "training": _FULL}),
    Case(
        "pp2-offloaded",
        2,
        {"parallel": _layout(pp=2), "training": {"recompute_granularity": "none", "cpu_offloading_num_layers": 1}},
        families=("qwen2",),
    ),
    Case("cp2-offloaded-up", 2, {"parallel": _layout(cp=2), "training": {**_UP, **_OFFLOADED}}, families=("qwen2",)),
    Case("dp2", 2, {"parallel": _layout()}),
    Case("dp2-distopt", 2, {"parallel": _layout(use_distributed_optimizer=True)}),
    Case(
        "dp2-distopt-overlap",
        2,
        {"parallel": _layout(use_distributed_optimizer=True, overlap_grad_reduce=True)},
    ),
    Case(
        "dp2-distopt-offloaded",
        2,
        {"parallel": _layout(use_distributed_optimizer=True), "optimizer": {"optimizer_cpu_offload": True}},
        families=("qwen2",),
    ),
    Case(
        "dp2-distopt-offloaded-part-rmsprop",
        2,
        {
            "parallel": _layout(use_distributed_optimizer=True),
            "optimizer": {
                "optimizer": "rmsprop",
                "rmsprop_eps": 1e-4,
                "optimizer_cpu_offload": True,
                "optimizer_offload_fraction": 0.5,
                "overlap_cpu_optimizer_d2h_h2d": True,
            },
        },
        oracle="one-rmsprop",
        families=("qwen2",),
    ),
    Case(
        "dp2-distopt-overlap-gather",
        2,
        {
            "parallel": _layout(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True),
            "faults": _RERUN,
        },
        families=("llama", "qwen2"),
    ),
    Case(
        "dp2-distopt-overlap-gather-online",
        2,
        {
            "parallel": _layout(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True),
            "training": _FULL,
            "reference": {"reference": "online"},
        },
        families=("qwen2",),
    ),
    Case("dp2-micro2", 2, {"parallel": _layout(), "training": {"micro_batch_size": 2}}),
    Case("cp2-dpo", 2, {"parallel": _layout(cp=2), "objective": {"objective": "dpo"}}, oracle="one-dpo"),
    Case("pp2-sft", 2, {"parallel": _layout(pp=2), "objective": {"objective": "sft"}}, oracle="one-sft"),
    Case(
        "dp2-distopt-rmsprop",
        2,
        {
            "parallel": _layout(use_distributed_optimizer=True),
            "optimizer": {"optimizer": "rmsprop", "rmsprop_eps": 1e-4},
        },
        oracle="one-rmsprop",
    ),
    Case("tp2-sp-online", 2, {"parallel": _layout(tp=2, sequence_parallel=True), "reference": {"reference": "online"}}),
    # Three processes: a context-parallel size that divides nothing.
    Case("cp3", 3, {"parallel": _layout(cp=3)}),
    # And a pipeline that does not divide the layers: 1, 2 and 1.
    Case(
        "pp3-accounted",
        3,
        {
            "parallel": _layout(
                pp=3, account_for_embedding_in_pipeline_split=True, account_for_loss_in_pipeline_split=True
            )
        },
        families=("qwen2",),
    ),
    # Four processes.
    Case("tp2-pp2", 4, {"parallel": _layout(tp=2, pp=2)}),
    Case(
        "tp2-pp2-first3",
        4,
        {"parallel": _layout(tp=2, pp=2, decoder_first_pipeline_num_layers=3)},
        families=("qwen2",),
    ),
    Case(
        "tp2-sp-pp2-vpp2",
        4,
        {"parallel": _layout(tp=2, pp=2, sequence_parallel=True, virtual_pipeline_model_parallel_size=2)},
    ),
    Case("tp2-cp2", 4, {"parallel": _layout(tp=2, cp=2)}),
    Case("tp2-sp-cp2-recompute", 4, {"parallel": _layout(tp=2, cp=2, sequence_parallel=True), "training": _FULL}),
    Case("pp2-cp2", 4, {"parallel": _layout(pp=2, cp=2)}),
    Case("pp2-cp2-selective", 4, {"parallel": _layout(pp=2, cp=2), "training": _UP}),
    Case("dp2-cp2", 4, {"parallel": _layout(cp=2)}),
    Case(
        "dp2-cp2-distopt-online",
        4,
        {"parallel": _layout(cp=2, use_distributed_optimizer=True), "reference": {"reference": "online"}},
    ),
    Case(
        "tp2-sp-cp2-offloaded",
        4,
        {
            "parallel": _layout(tp=2, cp=2, sequence_parallel=True, cp_comm_type="allgather"),
            "training": {"recompute_granularity": "none", **_OFFLOADED},
        },
        families=("qwen2",),
    ),
    Case("cp4", 4, {"parallel": _layout(cp=4)}),
    Case(
        "cp4-allgather-micro2",
        4,
        {"parallel": _layout(cp=4, cp_comm_type="allgather"), "training": {"micro_batch_size": 2}},
    ),
    Case(
        "tp2-sp-cp2-allgather-recompute",
        4,
        {"parallel": _layout(tp=2, cp=2, sequence_parallel=True, cp_comm_type="allgather"), "training": _FULL},
    ),
    Case("dp2-pp2-vpp2", 4, {"parallel": _layout(pp=2, num_layers_per_virtual_pipeline_stage=1)}),
)


def _every_layout() -> dict[str, Case]:
    """Each layout of the matrix once, by the first case that has it."""
    layouts: dict[str, Case] = {}
    for case in _BASE:
        if case.processes > 1 and set(case.settings) == {"parallel"}:
            layouts.setdefault(repr(sorted(case.settings["parallel"].items())), case)
    return {case.name: case for case in layouts.values()}


# Up to six branches: each turn's two answers on the document, in every layout.
_SIX = tuple(
    Case(
        f"{case.name}-independent",
        case.processes,
        {**case.settings, "data": _INDEPENDENT},
        oracle="one-independent-not-shared",
        families=("qwen2",),
    )
    for case in _every_layout().values()
)

_RMSPROP = {"optimizer": "rmsprop", "rmsprop_eps": 1e-4}
_BF16 = tuple(
    Case(
        f"{case.name}-bf16",
        case.processes,
        {**case.settings, "training": {**case.settings.get("training", {}), "bf16": True}},
        families=("qwen2",),
        bf16=True,
    )
    for case in (
        Case("one", 1),
        Case("one-not-shared", 1, {"data": _NOT_SHARED}),
        *_every_layout().values(),
        # Where the optimizer's states are must change no bit.
        Case("dp2-distopt-rmsprop", 2, {"parallel": {"use_distributed_optimizer": True}, "optimizer": _RMSPROP}),
        Case(
            "dp2-distopt-rmsprop-offloaded",
            2,
            {
                "parallel": {"use_distributed_optimizer": True},
                "optimizer": {**_RMSPROP, "optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5},
            },
        ),
        Case("dp2-distopt-grad", 2, {"parallel": {"use_distributed_optimizer": True, "grad_reduce_in_bf16": True}}),
        # Gradients of weights that are added inside their product, whatever is recomputed; and rounded before they are added.
        Case("one-apart", 1, {"parallel": {"gradient_accumulation_fusion": False}}),
        Case("one-recompute-up", 1, {"training": _UP}),
        Case("one-offloaded-up", 1, {"training": {**_UP, **_OFFLOADED}}),
        Case(
            "dp2-distopt-overlap-gather-recompute",
            2,
            {
                "parallel": _layout(
                    use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True
                ),
                "training": _FULL,
            },
        ),
        Case("tp2-sp-recompute-up", 2, {"parallel": _layout(tp=2, sequence_parallel=True), "training": _UP}),
    )
)

# Three kinds of parallelism at once, for machines with eight GPUs.
_EIGHT = tuple(
    Case(name, 8, {"parallel": parallel}, families=("qwen2",))
    for name, parallel in (
        ("tp2-sp-pp2-cp2", _layout(tp=2, pp=2, cp=2, sequence_parallel=True)),
        (
            "dp2-tp2-sp-cp2-allgather-distopt",
            _layout(tp=2, cp=2, sequence_parallel=True, cp_comm_type="allgather", use_distributed_optimizer=True),
        ),
        ("dp2-pp2-vpp2-cp2", _layout(pp=2, cp=2, num_layers_per_virtual_pipeline_stage=1)),
        ("cp8-allgather", _layout(cp=8, cp_comm_type="allgather")),
    )
)

# What families differ in (scaled and partial RoPE, windows, norms of heads) meets every way to cut a sequence or a head.
_EVERY_FAMILY = {"one", "one-not-shared", "tp2", "pp2", "cp2", "cp2-allgather", "tp2-pp2", "tp2-sp-cp2-recompute"}
_WITH_VARIANTS = tuple(
    dataclasses.replace(c, families=FAMILIES + VARIANTS) if c.name in _EVERY_FAMILY else c for c in _BASE
)

CASES = (*_WITH_VARIANTS, *_SIX, *_BF16, *_EIGHT)
