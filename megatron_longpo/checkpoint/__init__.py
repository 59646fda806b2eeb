"""Checkpoints: training's own, the streaming of single tensors in and out of them, and conversion."""
