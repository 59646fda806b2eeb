"""Preference samples: what a sample is, how it is stored, in what order it is used, how rows become one sequence."""
