"""Bounds that the configuration checks at once, and the code behind it again: both must know them without importing each other."""

LARGEST_SEED = 2**31 - 1
"""Each run's own seed, with its fold and repeat added, still fits where a generator takes 32 bits."""
MOST_REPEATS = 1000
"""Repetitions of a cross-validation."""
