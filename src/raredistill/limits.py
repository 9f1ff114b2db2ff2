"""Bounds that are checked both by the configuration and by the code behind it, which do not import each other."""

LARGEST_SEED = 2**31 - 1
"""With fold and repeat added, each run's seed still fits into 32 bits."""
MOST_REPEATS = 1000
"""Most repetitions of a cross-validation."""
