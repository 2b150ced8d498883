"""Define the command `loratool demo`."""

from __future__ import annotations

from ..commands.demo import call
from .from_call import command_of

demo = command_of(
    call.demo,
    """\
The guides use these files: a Llama with its fine-tune, two adapters and a float8 copy, a GPT-2 and parts of an SDXL.
The weights are random, so the models are only good for trying commands.

\b
  loratool demo demo/
  loratool demo demo/ --force
""",
)
