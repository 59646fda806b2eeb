"""The policy: layer specs, attention over blocks, and the tables that map Hugging Face names to ours."""

from megatron_longpo.runtime import platform as platform  # must precede megatron-core, which this package imports
