"""Run the command `init`."""
