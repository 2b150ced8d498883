"""Define the command `loratool patch`."""

from __future__ import annotations

from ..commands.patch import call
from .from_call import command_of

patch = command_of(
    call.patch,
    """\
BASE and TUNED are two models of the same tensors: a step of training, a fine-tune, a merge. OUT holds what apply needs
to make TUNED's files of BASE's, with all hashes. The same two models give the same patch on every machine.

\b
  loratool patch base/ tuned/ -o tuned.patch
  loratool patch base/ tuned/ --dry-run
  loratool patch base/ step-1.patch step-2.patch --fold -o both.patch
""",
    "comparing",
    last="syncing to disk",
    html=True,
)
