"""The command `unmerge`."""
