"""Weights and the files around them on disk. Nothing here depends on adapters."""
