"""What fits, how fast and on how many GPUs, before any is rented (docs/planner.md)."""
