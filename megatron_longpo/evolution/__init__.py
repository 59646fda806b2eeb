"""Self-evolution: rounds of pairs, training and evaluation, each on the model that the round before it made."""
