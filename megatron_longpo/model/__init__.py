"""The policy: layer specs, attention over blocks, and the tables that map Hugging Face names to ours."""
