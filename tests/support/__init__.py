"""What several tests share: tiny models and data, launches, oracles. Test modules import from here, never from one another."""

# Worker programs import from here too, and some import megatron-core: the platform prepares it first.
import megatron_longpo.runtime.platform  # noqa: F401
