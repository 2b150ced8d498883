"""Resolve an adapter's modules among a base's tensors, and place their updates."""
