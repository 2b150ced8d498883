"""Run the command `demo`."""
