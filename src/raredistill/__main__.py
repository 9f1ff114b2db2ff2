"""``python -m raredistill``: the command line."""

from raredistill.cli import main

main()
