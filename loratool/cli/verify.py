"""Define the command `loratool verify`."""

from __future__ import annotations

from ..commands.verify import call
from .from_call import command_of

verify = command_of(
    call.verify,
    """\
Each tensor is exact (the bits that merge writes), right with another rounding (PEFT's, a sum in 16 bits, ...), or
wrong, with a diagnosis: not applied, applied twice, wrong scale, transposed, swapped, or edited since. Quantized
weights are exact if they have the codes that merge writes. For codes of other programs, the report shows how much of
the delta they keep. Exit code 0 means proven, 1 means wrong or undecided. Modules that --target, --exclude and
--layers exclude must be equal to the base's.

\b
  loratool verify base/ adapter/ merged/
  loratool verify base/ style/:0.7 task/:-0.2 mixed/ --json
""",
    "verifying",
    html=True,
)
