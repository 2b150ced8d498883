"""Define the command `loratool recover`."""

from __future__ import annotations

from ..commands.recover import call
from .from_call import command_of

recover = command_of(
    call.recover,
    """\
A model that is changed in place has no name meanwhile, so that no program loads a mixture. If the process dies, the
model and a journal stay in MODEL.loratool-in-place. This ends the change, or takes it back.

\b
  loratool recover model-1/
  loratool recover model-2/ --back
""",
    "recovering",
    last="syncing to disk",
)
