"""The command `extract`."""
