"""Everything that `unmerge` needs to restore a base bit for bit."""
