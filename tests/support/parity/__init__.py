"""The parity matrix: its cases, its oracles, and the launches that compute its numbers."""
