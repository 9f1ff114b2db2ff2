"""One file per family of distillers."""
