"""Compute with tensors only: this package reads no file, and takes device and dtype from its inputs."""
