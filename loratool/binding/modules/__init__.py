"""Resolve an adapter's modules to a base's tensors, and place their updates."""
