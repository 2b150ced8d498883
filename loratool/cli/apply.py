"""Define the command `loratool apply`."""

from __future__ import annotations

from ..commands.apply import call
from .from_call import command_of

apply = command_of(
    call.apply,
    """\
Give the patches in their order: all are applied in one pass. What is read and what is written is held against the
hashes in the patches, so another model, a gap between two patches or a damaged file is an error.

\b
  loratool apply base/ tuned.patch -o tuned-again/
  loratool apply base/ step-1.patch step-2.patch -o step-2/
  loratool apply tuned/ tuned.patch --reverse -o base-again/
  loratool apply base/ tuned.patch --dry-run
""",
    "applying",
    last="syncing to disk",
    html=True,
)
