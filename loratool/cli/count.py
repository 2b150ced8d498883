"""Define the command `loratool count`."""

from __future__ import annotations

from ..commands.count import call
from .from_call import command_of

count = command_of(
    call.count,
    """\
You need only a config.json, or the headers of a checkpoint. LoRA targets query and value, as in the paper, unless you
give --target. q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj mean these parts in every family, also
in a fused matrix.

\b
  loratool count base/ --rank 16 --target q_proj,k_proj,v_proj,o_proj
  loratool count config.json --params 4K
""",
)
