"""A study: a grid of runs, its plan and its execution."""
