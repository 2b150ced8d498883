"""Define the command `loratool merge`."""

from __future__ import annotations

from ..commands.merge import call
from .from_call import command_of

merge = command_of(
    call.merge,
    """\
BASE is a file (.safetensors, .gguf, or torch's .bin, .pt, .ckpt) or a folder, a training run's sharded state too;
ADAPTER a PEFT folder or a LoRA file; each may be org/name on the Hugging Face hub (loratool guide hub). Several
adapters are added in one pass, each with its weight; each merged weight is the number nearest to the exact sum, so
the output's bytes are the same on every machine. Modules take weights of their own by pattern, as in --target, and
those of an image model by component: unet, te, te1, te2 and so on. The last that matches wins.

\b
  loratool merge base/ adapter/ -o merged/
  loratool merge base/ style/:0.7 task/:-0.2 -o mixed/ --dtype fp32 --no-undo
  loratool merge xl.safetensors ink.safetensors:0.8,te=0.4 -o out.safetensors
  loratool merge base/ "style/:0.8,*.layers.0.*=0,mlp=0.5" -o parts/

The report groups modules over layers; what needs attention has a line of its own, marked with !. scale: alpha /
rank, times the weight. delta/W: the size of the delta beside the base's weight. kept: how much of the delta
rounding has left.
""",
    "merging",
    last="syncing to disk",
    html=True,
)
