"""Run the command line, as `loratool` and as `python -m loratool`.

A signal that comes while it is loaded waits until `main` can answer it; only Python's own start is before that.
"""

from __future__ import annotations

from .durable.interrupts import hold

hold()

from .cli import main  # noqa: E402

if __name__ == "__main__":
    main()
