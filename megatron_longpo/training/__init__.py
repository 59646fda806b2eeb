"""A run: plan, batches, losses, the reference, optimizer, memory, metrics, checkpoints, held-out evaluation."""

from megatron_longpo.runtime import platform as platform  # must precede megatron-core, which this package imports
