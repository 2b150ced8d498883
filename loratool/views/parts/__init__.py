"""Lay out what is to be read: documents, tables, columns, numbers."""
