"""Changes to a model's configuration that a conversion makes on the way, and the result of a conversion."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from megatron_longpo.errors import CheckpointError
from megatron_longpo.model.rotary import changed_scaling
from megatron_longpo.model.shape import ModelShape


@dataclass(frozen=True)
class Changes:
    """Changes to a model's RoPE and to the context that it claims; None keeps what the model has.

    Attributes:
        rotary_base: RoPE theta.
        rope_type: type of a new RoPE scaling.
        scaling: numbers of the new scaling, by Hugging Face's names.
        max_position_embeddings: longest context that the model claims, in tokens.
    """

    rotary_base: float | None = None
    rope_type: str | None = None
    scaling: dict[str, Any] = dataclasses.field(default_factory=dict)
    max_position_embeddings: int | None = None

    def apply(self, shape: ModelShape, source: str) -> ModelShape:
        """The shape with these changes.

        Args:
            shape: shape of the unchanged model.
            source: name of where the changes come from, for errors.

        Raises:
            CheckpointError: a number is not positive, or the numbers do not fit the type of scaling.
        """
        for name in ("rotary_base", "max_position_embeddings"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise CheckpointError(f"{name}={value} must be positive; leave it out to keep the model's value")
        return shape.replace(
            rotary_base=self.rotary_base or shape.rotary_base,
            rope_scaling=changed_scaling(shape, self.rope_type, self.scaling, source),
            max_position_embeddings=self.max_position_embeddings or shape.max_position_embeddings,
        )


NO_CHANGES = Changes()


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
        tensors: number of Hugging Face tensors.
        bytes: bytes written.
        shape: shape of the resulting model.
    """

    tensors: int
    bytes: int
    shape: ModelShape
