"""Parts of all views: documents, tables, columns, numbers."""
