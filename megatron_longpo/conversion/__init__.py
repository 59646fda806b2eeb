"""Hugging Face folders to checkpoints and back, and the verification that both compute the same. Imports transformers."""
