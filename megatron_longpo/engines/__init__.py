"""Engines that answer prompts, for generation and evaluation: transformers, vLLM, a server. Knows transformers."""
