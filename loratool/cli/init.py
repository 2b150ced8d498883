"""Define the command `loratool init`."""

from __future__ import annotations

from ..commands.init import call
from .from_call import command_of

init = command_of(
    call.init,
    """\
The output is a PEFT folder. An image model in one file gives a kohya file, a pipeline a diffusers file. Without
--target, every linear layer except the head gets an adapter. Random numbers depend on --seed and the name of the
weight. pissa, milora and olora subtract their factors from the base: --residual writes the rest, the base to train on.

\b
  loratool init base/ --rank 8 --target q_proj,v_proj -o started/
  loratool init base/ --method pissa --rank 16 --residual residual/ -o pissa/
  loratool init xl.safetensors --target to_k --to diffusers -o new.safetensors
""",
    "initializing",
    last="syncing to disk",
)
