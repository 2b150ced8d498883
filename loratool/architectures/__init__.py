"""Literal tables of facts on model families: names and layouts, without computation."""
