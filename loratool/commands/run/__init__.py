"""Run the command `run`: recipes, files that say what commands do in the words of their options."""
