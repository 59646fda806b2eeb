"""Hugging Face folders to checkpoints and back, and the proof that both compute the same. Knows transformers."""
