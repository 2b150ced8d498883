"""Files of a model's folder that are not weights."""
