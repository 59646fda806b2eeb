"""Tests may import megatron-core before the package: the platform prepares it first."""

import megatron_longpo.runtime.platform  # noqa: F401
