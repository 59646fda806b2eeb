"""Evaluation of checkpoints: RULER, InfiniteBench, needle maps, short-context tasks, comparison."""
