"""Define the command `loratool unmerge`."""

from __future__ import annotations

from ..commands.unmerge import call
from .from_call import command_of

unmerge = command_of(
    call.unmerge,
    """\
MERGED is what merge wrote, with its undo file in it (loratool.undo) or beside it (merged.undo); the adapters are
those of the merge, with their weights. Every restored tensor is held against its hash; another adapter or weight,
or a file edited since, is refused by name.

\b
  loratool unmerge merged/ adapter/ -o base-again/
  loratool unmerge mixed/ style/:0.7 task/:-0.2 --approximate -o nearly/
""",
    "restoring",
    last="syncing to disk",
)
