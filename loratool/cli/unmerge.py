"""Define the command `loratool unmerge`."""

from __future__ import annotations

from ..commands.unmerge import call
from .from_call import command_of

unmerge = command_of(
    call.unmerge,
    """\
MERGED is the output of merge. Its undo file is in the folder (loratool.undo) or beside it (merged.undo). Give the
adapters of the merge with their weights. Each restored tensor is checked against its hash. A different adapter
or weight, or a file that was edited since, is an error.

\b
  loratool unmerge merged/ adapter/ -o base-again/
  loratool unmerge mixed/ style/:0.7 task/:-0.2 --approximate -o nearly/
""",
    "restoring",
    last="syncing to disk",
)
