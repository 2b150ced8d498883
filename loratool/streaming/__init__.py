"""Rows read, changed and written, in any order, by threads or processes."""
