"""Run the command `count`."""
