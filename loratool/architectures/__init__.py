"""What is known of model families, as literal tables: which names hide what, never how to compute."""
