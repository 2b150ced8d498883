"""Run the command `verify`."""
