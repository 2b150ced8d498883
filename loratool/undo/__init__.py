"""Write and read what `unmerge` needs to restore a base bit for bit."""
