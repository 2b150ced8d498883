"""`python -m loratool`."""

from .cli import main

main()
