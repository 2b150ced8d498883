"""Define the command `loratool extract`."""

from __future__ import annotations

from ..commands.extract import call
from .from_call import command_of

extract = command_of(
    call.extract,
    """\
Each matrix is stored as the truncated SVD of its delta, biases and norms exactly. The energy kept is exact; its
distance from the best is estimated, or proven with --certify. The report lists what is not in the adapter, with its
norm. Both models can be quantized.

\b
  loratool extract base/ tuned/ --rank 8 -o extracted/
  loratool extract base/ tuned/ --params 30K --embed skip -o budget/

The report has a row for each group of layers, with -v for each matrix. delta/W: the norm of the delta relative to
the base's weight. energy: the share of the squared norm that is kept. residual: the norm of the rest. gap: the
distance from the best of this rank, estimated or proven. eff. rank: how many directions the kept part uses. over
noise: how many singular values are larger than rounding can cause. With --imatrix, energy is weighted by the inputs.
out. error is the relative error of the outputs, and error that of the delta.
""",
    "extracting",
    unit="matrices",
    html=True,
)
