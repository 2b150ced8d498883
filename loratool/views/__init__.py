"""Make of a report what is to be read: a document of lines and tables, for a terminal, a pipe or a notebook."""
