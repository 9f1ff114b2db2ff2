"""One run: its definition, its rules, and its execution."""
