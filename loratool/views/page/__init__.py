"""Make the page of a report: one HTML file with pictures, the whole table and the report itself."""
