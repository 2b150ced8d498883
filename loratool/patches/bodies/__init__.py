"""The bodies of patches: ways to write the numbers of a span, given those that are predicted."""
