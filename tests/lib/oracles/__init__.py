"""Compute again, another way, what the package computes."""
