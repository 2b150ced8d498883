"""Plan an output, check its path, and make it appear complete or not at all."""
