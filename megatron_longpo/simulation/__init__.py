"""The training step on tensors that claim to be on a GPU, on a machine that has none (docs/simulation.md)."""
