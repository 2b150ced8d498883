"""Pages of reports: one HTML file with pictures, the full table and the report itself."""
