"""Resolve what a user names: a path, or a model on the hub, in the local cache or downloaded."""
