"""One run: what it is, its rules, and everything that carries it out."""
