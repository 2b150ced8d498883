"""Run the command `run`: recipes, files with commands and their options."""
