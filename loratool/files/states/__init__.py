"""Sharded states of training runs, read as one weights file."""
