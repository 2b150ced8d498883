"""Define the command `loratool count`."""

from __future__ import annotations

from ..commands.count import call
from .from_call import command_of

count = command_of(
    call.count,
    """\
From a checkpoint's headers, or from a config.json alone. LoRA goes to query and value, as in the paper, or to
--target; q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj mean those parts in every family, also
within a fused matrix.

\b
  loratool count base/ --rank 16 --target q_proj,k_proj,v_proj,o_proj
  loratool count config.json --params 4K
""",
)
