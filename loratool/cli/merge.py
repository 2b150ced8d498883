"""Define the command `loratool merge`."""

from __future__ import annotations

from ..commands.merge import call
from .from_call import command_of

merge = command_of(
    call.merge,
    """\
BASE is a file (.safetensors, .gguf, or torch's .bin, .pt, .ckpt) or a folder, also one with the sharded state of a
training run. ADAPTER is a PEFT folder or a LoRA file. Each can be org/name on the Hugging Face hub (loratool guide
hub).

All adapters are added in one pass, each times its weight. Each merged weight is the number nearest to the exact sum,
so every machine writes the same bytes. PATTERN=WEIGHT gives some modules another weight, with patterns as in --target;
unet, te, te1, te2 and so on select the components of an image model. The last match wins.

\b
  loratool merge base/ adapter/ -o merged/
  loratool merge base/ style/:0.7 task/:-0.2 -o mixed/ --dtype fp32 --no-undo
  loratool merge xl.safetensors ink.safetensors:0.8,te=0.4 -o out.safetensors
  loratool merge merged/ style/ --replace adapter/ -o swapped/
  loratool merge base/ "style/:0.8,*.layers.0.*=0,mlp=0.5" -o parts/

The report groups modules over layers and marks lines that need attention with !. scale: alpha / rank, times the
weight. delta/W: the norm of the delta relative to the base's weight. kept: the share of the delta that survives
rounding.
""",
    "merging",
    last="syncing to disk",
    html=True,
)
