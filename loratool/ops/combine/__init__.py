"""Run the command `combine`."""
