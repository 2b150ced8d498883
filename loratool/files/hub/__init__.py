"""Resolve a user's name for a model: a path, or a repo id on the hub, cached or downloaded."""
