"""Make a model of another by patches."""
