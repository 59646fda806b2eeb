"""Plans of runs, without data, checkpoints or process groups."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from megatron_longpo.config import from_dict
from megatron_longpo.data.indexed import Manifest
from megatron_longpo.model.shape import ModelShape
from megatron_longpo.runtime.process_groups import Parallel
from megatron_longpo.training.plan import RunPlan

SHAPE = ModelShape(
    family="llama",
    num_layers=4,
    hidden_size=48,
    ffn_hidden_size=96,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=12,
    vocab_size=101,
    layernorm_epsilon=1e-5,
    add_qkv_bias=False,
    untie_embeddings_and_output_weights=True,
    rotary_base=1e4,
    max_position_embeddings=512,
)
MANIFEST = Manifest(
    vocab_size=101, dtype="uint16", tokenizer=None, tokenizer_hash=None, template_hash=None, longest=200, samples=80
)


def parallel_of(**degrees: Any) -> Parallel:
    """A place in a layout without process groups: rank 0 of one process, with some fields changed."""
    values = {"tensor_size": 1, "pipeline_size": 1, "virtual_stages": None, "context_size": 1, "data_size": 1}
    values |= {"sequence_parallel": False, "comm_type": "a2a", "rank": 0, "world_size": 1}
    return Parallel(**{**values, **degrees})


def plan_of(folder: Path, *, manifest: dict[str, Any] | None = None, **sections: dict[str, Any]) -> RunPlan:
    """A plan of ten steps whose model is in ``folder``/ckpt, whose data are ``folder``/data, and whose output is ``folder``/run.

    Args:
        folder: folder of everything; nothing needs to exist.
        manifest: changes to the data's manifest.
        sections: sections of the configuration, by name.
    """
    (folder / "ckpt" / "hf").mkdir(parents=True, exist_ok=True)
    sections["checkpoint"] = {"save": str(folder / "run"), **sections.get("checkpoint", {})}
    sections["data"] = {"data_path": str(folder / "data"), **sections.get("data", {})}
    return RunPlan(
        config=from_dict(sections, "test"),
        load=folder / "ckpt",
        reference_load=folder / "ckpt",
        shape=SHAPE,
        reference_shape=SHAPE,
        manifest=dataclasses.replace(MANIFEST, **(manifest or {})),
        valid_manifest=None,
        train_iters=10,
        comm_type="a2a",
        comm_reason="test",
    )
