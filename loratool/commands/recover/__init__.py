"""End a change in place that was interrupted."""
