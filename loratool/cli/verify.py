"""Define the command `loratool verify`."""

from __future__ import annotations

from ..commands.verify import call
from .from_call import command_of

verify = command_of(
    call.verify,
    """\
Each tensor is exact (our bits), right with another rounding (peft's, 16 bits on the way, ...), or wrong: not
applied, applied twice, at another scale, transposed, swapped, altered since. Codes are exact if they are those
that merge writes; of others', `verify` tells how much of the delta they keep. Exit 0 is proven, 1 is wrong or
cannot be told. What --target, --exclude and --layers leave out must be the base's.

\b
  loratool verify base/ adapter/ merged/
  loratool verify base/ style/:0.7 task/:-0.2 mixed/ --json
""",
    "verifying",
    html=True,
)
