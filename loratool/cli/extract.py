"""Define the command `loratool extract`."""

from __future__ import annotations

from ..commands.extract import call
from .from_call import command_of

extract = command_of(
    call.extract,
    """\
Every matrix gets the top of its delta's SVD; biases and norms are kept exactly. The energy kept is exact, and how
far it can be from the best is estimated, or proven with --certify. What is not in the adapter is named with its
norm. Either model may be quantized.

\b
  loratool extract base/ tuned/ --rank 8 -o extracted/
  loratool extract base/ tuned/ --params 30K --embed skip -o budget/

Rows are groups of layers, and -v has one a matrix. delta/W: the size of the delta beside the base's weight. energy:
the share of its square that is kept; residual: the size of what is not. gap: how far from the best of this rank,
estimated or proven. eff. rank: over how many directions what is kept spreads. over noise: how many are larger than
rounding can have made. With --imatrix the energy is weighted by the inputs; out. error: the share of the outputs
that is lost; error: that of the change itself.
""",
    "extracting",
    unit="matrices",
    html=True,
)
