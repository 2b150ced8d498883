"""Define the command `loratool env`."""

from __future__ import annotations

from ..commands.env import call
from .from_call import command_of

env = command_of(
    call.env,
    """\
The output has versions, the kernel, GPUs, folders of caches, and the names of environment variables. It has no tokens,
no values of variables, and no names of users or machines.

\b
  loratool env
  loratool env --json
""",
)
