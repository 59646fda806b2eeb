"""A run: plan, batches, losses, the reference, optimizer, memory, metrics, checkpoints, held-out evaluation."""
