"""Checkpoints: where they lie, the streaming of single tensors in and out of them, the card of an exported model."""

from megatron_longpo.runtime import platform as platform  # must precede megatron-core, which this package imports
