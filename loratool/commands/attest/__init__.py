"""Statements about outputs: written beside them, and held against the files."""
