"""A grid of runs, planned and carried out."""
