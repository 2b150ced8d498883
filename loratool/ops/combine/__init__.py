"""The command `combine`."""
