"""Run the command line as `python -m loratool`."""

from __future__ import annotations

from .cli import main

main()
