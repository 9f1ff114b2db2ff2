"""Statistics on any predictions table."""
