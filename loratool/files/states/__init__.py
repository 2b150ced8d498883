"""Read the sharded states of training runs as one weights file."""
