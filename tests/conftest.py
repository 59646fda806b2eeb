"""The package is imported before anything imports megatron-core: the platform comes first."""

import megatron_longpo  # noqa: F401
