"""Whether a machine computes right and fast, found out by running each part of a training step on it (docs/doctor.md)."""
