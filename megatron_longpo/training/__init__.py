"""A training run: plan, data, batches, losses, reference, optimizer, memory, metrics, checkpoints, held-out evaluation."""

from megatron_longpo.runtime import platform as platform  # must precede megatron-core, which this package imports
