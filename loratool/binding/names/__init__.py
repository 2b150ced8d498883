"""Map names: of the files, of the class that PEFT wraps, of the base that a config names."""
