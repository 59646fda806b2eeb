"""What an allocation is, by the place of the code that makes it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A line of the training code.

    Attributes:
        file: path from the folder that holds the package.
        line: number of the line.
        function: the function that it is in.
    """

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.function}" if self.line else f"{self.file} {self.function}".strip()


SET_UP, WEIGHTS, GRADIENTS, OPTIMIZER = "set-up", "weights", "gradients", "optimizer"

# File, functions (empty: all of them), kind; the first that fits counts.
_KINDS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("model/logprobs.py", (), "log-probs"),
    (
        "model/attention.py",
        ("_exchange", "_to_heads", "_to_places", "_copies", "__init__"),
        "exchange buffers",
    ),
    ("model/attention.py", ("wait",), "queries, keys, values"),
    ("model/attention.py", ("_rotated",), "queries, keys, values"),
    ("model/attention.py", ("backward",), "gradients of activations"),
    ("model/attention.py", (), "attention outputs"),
    ("model/kernels.py", ("backward",), "gradients of activations"),
    ("model/blocks.py", ("blocks_backward", "backward"), "gradients of activations"),
    ("model/kernels.py", (), "attention outputs"),
    ("model/blocks.py", (), "attention outputs"),
    ("model/layers.py", ("backward", "_gate_gradient_in_one_pass"), "gradients of activations"),
    ("model/layers.py", ("_gate_in_one_pass", "_activated", "make_both", "make_activated"), "MLP"),
    ("model/layers.py", (), "norms"),
    ("model/gpt.py", (), "last hidden states"),
    ("training/batch.py", (), "inputs"),
    ("runtime/platform.py", ("bring_back",), "back from host memory"),
    ("training/optimization.py", (), OPTIMIZER),
    ("core/optimizer/", (), "optimizer, temporary"),
    ("core/tensor_parallel/mappings.py", (), "exchange buffers"),
    ("core/tensor_parallel/layers.py", ("backward",), "gradients of activations"),
    ("core/tensor_parallel/layers.py", (), "outputs of linear layers"),
    ("core/fusions/", (), "layer inputs"),
    ("core/pipeline_parallel/", (), "pipeline"),
    ("core/tensor_parallel/random.py", (), "layer inputs"),
    ("autograd", (), "gradients of activations"),
)


def kind_of(place: Place, phase: str) -> str:
    """What is allocated at a place, for the table and the picture."""
    if phase == SET_UP:
        return SET_UP
    for part, functions, kind in _KINDS:
        if part in place.file and (not functions or place.function in functions):
            return kind
    return "other"
