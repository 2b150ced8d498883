"""Plan an output, check its place, and make it appear whole or not at all."""
