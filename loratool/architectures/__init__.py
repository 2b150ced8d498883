"""Literal tables of facts on model families: which names and layouts they use, never how to compute."""
