"""Checkpoints: their folders, reading and writing them one tensor at a time, and the card of an exported model."""

from megatron_longpo.runtime import platform as platform  # must precede megatron-core, which this package imports
