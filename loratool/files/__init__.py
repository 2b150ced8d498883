"""Read and write weights and the files around them on disk; nothing here knows what an adapter is."""
