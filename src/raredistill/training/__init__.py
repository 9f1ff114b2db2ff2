"""One loop for every run."""
