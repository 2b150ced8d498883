"""Containers of tensors: safetensors, GGUF, torch files, and virtual files."""
