"""Preference samples: what a sample is, how it is stored, in what order it is used, how rows become one sequence."""

from megatron_longpo.runtime import platform as platform  # must precede megatron-core, which this package imports
