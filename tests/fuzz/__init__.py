"""Fuzzing of everything that the package reads: ``python -m tests.fuzz --help``."""
