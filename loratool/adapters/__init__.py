"""Adapters: their updates, their file formats, the layout of their factors."""
