"""What several tests share: tiny models and data, launches, oracles. Test modules import from here, never from one another."""
