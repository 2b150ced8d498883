"""Read, represent and write adapters: their updates, their file formats, the layout of their factors."""
