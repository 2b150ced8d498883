"""Run the command `convert`."""
