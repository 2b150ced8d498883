"""Open pages in a browser."""
