"""Map names of files, of the class that PEFT wraps, and of the base in a config."""
