"""Define the command `loratool init`."""

from __future__ import annotations

from ..commands.init import call
from .from_call import command_of

init = command_of(
    call.init,
    """\
Without --target every linear layer but the head gets one. What is random follows from --seed and each weight's
name. pissa, milora and olora take their factors out of the base: --residual writes what is left, on which the
adapter belongs.

\b
  loratool init base/ --rank 8 --target q_proj,v_proj -o started/
  loratool init base/ --method pissa --rank 16 --residual residual/ -o pissa/
  loratool init xl.safetensors --target to_k --to diffusers -o new.safetensors
""",
    "initializing",
    last="syncing to disk",
)
