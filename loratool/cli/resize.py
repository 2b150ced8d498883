"""Define the command `loratool resize`."""

from __future__ import annotations

from ..commands.resize import call
from .from_call import command_of

resize = command_of(
    call.resize,
    """\
The result is exact and needs only the factors. The scale is multiplied into the factors, and alpha becomes the rank of
each module. With --to, ranks are those of the modules in the new format. The rules sv_ratio, sv_cumulative and sv_fro
are kohya's, but without its one rank too many.

\b
  loratool resize adapter/ --rank 4 -o small/
  loratool resize adapter/ --energy 0.95 --max-rank 6 -o even/
  loratool resize ink.safetensors --rank 8 --to diffusers -o small.safetensors

The report has a row for each group of layers, with -v for each module. delta: its norm. energy: the share of the
squared norm that is kept. eff. rank: how many directions the delta uses. With --imatrix, energy is weighted by the
inputs, out. error is the relative error of the outputs, and error that of the delta.
""",
    "resizing",
    unit="modules",
    html=True,
)
