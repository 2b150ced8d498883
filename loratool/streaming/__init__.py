"""Read, change and write rows of tensors, in any order, with threads or processes."""
