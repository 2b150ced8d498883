"""Know the files of a model's folder that are no weights."""
