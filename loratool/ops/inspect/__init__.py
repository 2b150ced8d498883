"""Run the command `inspect`."""
