"""Run the command `merge`."""
