"""Compiled passes over the rows of a block: optional, and the same bytes as without them."""
