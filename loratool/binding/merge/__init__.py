"""Plan a merge from headers."""
