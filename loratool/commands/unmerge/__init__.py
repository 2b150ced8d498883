"""Run the command `unmerge`."""
