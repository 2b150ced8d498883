"""Run the command `diff`."""
