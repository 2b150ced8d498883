"""Run the command `extract`."""
