"""Checkpoints: where they lie, the streaming of single tensors in and out of them, the card of an exported model."""
