"""Define the command `loratool resize`."""

from __future__ import annotations

from ..commands.resize import call
from .from_call import command_of

resize = command_of(
    call.resize,
    """\
Exact, from the factors alone. Scales end up in the factors, alpha being each module's rank. kohya's rules sv_ratio,
sv_cumulative and sv_fro mean what their names say, without the one rank too many.

\b
  loratool resize adapter/ --rank 4 -o small/
  loratool resize adapter/ --energy 0.95 --max-rank 6 -o even/
  loratool resize ink.safetensors --rank 8 --to diffusers -o small.safetensors

Rows are groups of layers, and -v has one a module. delta: its size. energy: the share of its square that is kept.
eff. rank: over how many directions it spreads. With --imatrix the energy is weighted by the inputs; out. error: the
share of the outputs that is lost; error: that of the change itself.
""",
    "resizing",
    unit="modules",
    html=True,
)
