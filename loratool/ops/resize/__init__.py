"""Run the command `resize`."""
