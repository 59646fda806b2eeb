"""What the attention kernels are called with in real layouts, as ``block_calls.json`` has it from simulations of these layouts.

A simulation takes a CPU build of torch, which a machine with GPUs does not have, so its findings come along with the package.
``python -m megatron_longpo.doctor.calls`` makes the file anew where simulations can be run; a test compares it with them.
Rows are cut to a thousand tokens, heads and strides are those of whole models. ``small`` is for the CPU.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_longpo.simulation.request import Report, Request

FILE = Path(__file__).with_name("block_calls.json")
_BASE_SHAPE: dict[str, Any] = {
    "family": "qwen2",
    "num_layers": 1,
    "hidden_size": 64,
    "ffn_hidden_size": 64,
    "vocab_size": 256,
    "layernorm_epsilon": 1e-5,
    "add_qkv_bias": False,
    "untie_embeddings_and_output_weights": True,
    "rotary_base": 1e4,
    "max_position_embeddings": 4096,
}
# Names by which layouts are reported; heads on key-value heads, channels, window, and the layout.
_MODELS: dict[str, dict[str, Any]] = {
    "7B": {"num_attention_heads": 32, "num_query_groups": 8, "kv_channels": 128},
    "MHA": {"num_attention_heads": 32, "num_query_groups": 32, "kv_channels": 64},
    "28 heads": {"num_attention_heads": 28, "num_query_groups": 4, "kv_channels": 128},
    "window": {"num_attention_heads": 32, "num_query_groups": 8, "kv_channels": 128, "window_size": 256},
}
_SMALL: dict[str, dict[str, Any]] = {
    "7B": {"num_attention_heads": 8, "num_query_groups": 4, "kv_channels": 16},
    "MHA": {"num_attention_heads": 8, "num_query_groups": 8, "kv_channels": 12},
    "28 heads": {"num_attention_heads": 12, "num_query_groups": 4, "kv_channels": 16},
    "window": {"num_attention_heads": 8, "num_query_groups": 4, "kv_channels": 16, "window_size": 24},
}
_LAYOUTS: tuple[tuple[str, str, int, dict[str, Any]], ...] = (
    ("7B", "TP 1", 1, {}),
    ("7B", "TP 2 + SP, CP 2 a2a", 4, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "context_parallel_size": 2}),
    ("7B", "TP 2 + SP", 2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    ("7B", "CP 8 a2a", 8, {"context_parallel_size": 8}),
    ("7B", "CP 4 allgather", 4, {"context_parallel_size": 4, "cp_comm_type": "allgather"}),
    ("MHA", "CP 2 a2a", 2, {"context_parallel_size": 2}),
    ("28 heads", "CP 2 allgather", 2, {"context_parallel_size": 2, "cp_comm_type": "allgather"}),
    ("window", "TP 1", 1, {}),
)  # fmt: skip
# Kernels that take several causal runs at once, and those that take one.
PACKED, SINGLE = "packed", "single"
_BACKENDS = {PACKED: "flash", SINGLE: "memory_efficient"}
_SIZES: dict[str, dict[str, Any]] = {
    "large": {"models": _MODELS, "tokens": 1000, "answer_tokens": 120, "kinds": (PACKED, SINGLE)},
    # The CPU's kernels take one run.
    "small": {"models": _SMALL, "tokens": 150, "answer_tokens": 24, "kinds": (SINGLE,)},
}


@dataclass(frozen=True)
class BlockCall:
    """A call of an attention kernel.

    Attributes:
        layout: the layout that it is of.
        backward: whether it is one of the backward.
        lengths: as in ``BlockInputs``.
        tensors: shape, strides and offset in its storage of ``q``, ``k``, ``v`` and, in the backward, ``grad_out``, ``out``,
            ``lse``.
    """

    layout: str
    backward: bool
    lengths: tuple[int, ...] | None
    tensors: Mapping[str, tuple[list[int], list[int], int]]

    def random(self, name: str, dtype: torch.dtype, generator: torch.Generator, device: torch.device) -> Tensor:
        """A tensor of the call, of normal random numbers: ``name`` with its strides, in a storage that holds more than it."""
        shape, strides, offset = self.tensors[name]
        size = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
        storage = torch.randn(size, generator=generator).to(device, dtype)
        return storage.as_strided(shape, strides, offset)


@functools.cache
def block_calls(size: str, kind: str) -> tuple[BlockCall, ...]:
    """Calls of all layouts.

    Args:
        size: ``large`` or ``small``.
        kind: ``PACKED`` or ``SINGLE``.
    """
    content = json.loads(FILE.read_text(encoding="utf-8"))
    return tuple(
        BlockCall(
            layout=layout,
            backward=row["direction"] == "backward",
            lengths=None if row["lengths"] is None else tuple(row["lengths"]),
            tensors={name: tuple(value) for name, value in row.items() if name not in ("direction", "lengths")},
        )
        for layout, rows in content[size][kind].items()
        for row in rows
    )


def requests() -> dict[tuple[str, str, str], Request]:
    """What is simulated for the file, by size, kind and layout."""
    found = {}
    for size, of_size in _SIZES.items():
        for kind in of_size["kinds"]:
            backend = _BACKENDS[kind]
            for model, layout, ranks, parallel in _LAYOUTS:
                config = {
                    "parallel": parallel,
                    "model": {"attention_backend": backend},
                    "training": {"bf16": True, "recompute_granularity": "none", "global_batch_size": 1},
                }
                shape = {**_BASE_SHAPE, **of_size["models"][model]}
                tokens = {name: of_size[name] for name in ("tokens", "answer_tokens")}
                # The last rank: with allgather its queries do not begin with the sequence.
                found[size, kind, f"{model}, {layout}"] = Request(config, ranks, ranks - 1, shape, **tokens)
    return found


def content_of(reports: Mapping[tuple[str, str, str], Report]) -> dict[str, Any]:
    """The file's content from the reports of ``requests``; of calls that differ only in their lengths, one."""
    content: dict[str, Any] = {}
    seen: set[str] = set()
    for (size, kind, layout), report in reports.items():
        rows = []
        # The longest first: it stands for the others.
        for row in sorted(report.blocks, key=lambda row: -row["q"][0][0]):
            key = f"{size} {kind} {signature(row)}"
            if key not in seen:
                seen.add(key)
                rows.append({name: value for name, value in row.items() if name != "calls"})
        content.setdefault(size, {}).setdefault(kind, {})[layout] = rows
    return content


def signature(row: Mapping[str, Any]) -> str:
    """What a kernel may get wrong about a call: heads, strides, alignment, one run or several, one query or many."""
    runs = None if row["lengths"] is None else min(2, len(row["lengths"]))
    tensors = []
    for name in ("q", "k", "v", "grad_out", "out", "lse"):
        if name in row:
            shape, strides, offset = row[name]
            tensors.append((shape[1:] if name != "lse" else [shape[0]], strides, offset % 8, offset > 0))
    rows, keys = row["q"][0][0], row["k"][0][0]
    return repr((row["direction"], runs, (rows > keys) - (rows < keys), min(rows, 2), tensors))


def _as_text(content: dict[str, Any]) -> str:
    """JSON with a line per call."""
    sizes = []
    for size, kinds in content.items():
        of_kind = []
        for kind, layouts in kinds.items():
            of_layout = [
                f'"{layout}": [\n' + ",\n".join(json.dumps(row) for row in rows) + "]"
                for layout, rows in layouts.items()
            ]
            of_kind.append(f'"{kind}": {{\n' + ",\n".join(of_layout) + "}")
        sizes.append(f'"{size}": {{\n' + ",\n".join(of_kind) + "}")
    return "{\n" + ",\n".join(sizes) + "}\n"


def main() -> None:
    """Make the file anew."""
    from megatron_longpo.simulation.start import simulate

    wanted = requests()
    reports = simulate(list(wanted.values()), quiet=True)
    FILE.write_text(_as_text(content_of(dict(zip(wanted, reports, strict=True)))), encoding="utf-8")


if __name__ == "__main__":
    main()
