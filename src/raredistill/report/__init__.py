"""What a reader sees of a study."""
