"""Define the command `loratool combine`."""

from __future__ import annotations

from ..commands.combine import call
from .from_call import command_of

combine = command_of(
    call.combine,
    """\
The default is the exact sum of the weighted deltas. Ranks, targets and scales can differ, and weights can be negative.
The other methods work on the deltas B A, module by module; `loratool guide which-method` says when to use which. With
--rank they work on deltas that are compressed to so many directions, so nothing is truncated afterwards. Adapters of
image models can have different formats, since modules are matched by what they mean. As in merge, components and
modules can have weights of their own, by the names in each adapter's file.

\b
  loratool combine style/:0.7 task/:0.3 -o both/
  loratool combine style/ task/ --method ties --density 0.3 --rank 16 -o ties/
  loratool combine a.safetensors b.safetensors:0.5 --to comfy -o c.safetensors
  loratool combine a.safetensors b.safetensors:te=0.4,fc1=0 -o d.safetensors

The report has a row for each group of layers, with -v for each module; the exact sum has no rows. delta: the norm of
the method's result. energy: the share of the squared norm that the rank keeps. shared: the mean share of the deltas'
energies in the directions that they are compressed to. error: the norm of what is lost, relative to the result. With
--imatrix, energy is weighted by the inputs, and out. error is the relative error of the outputs.
""",
    "combining",
    unit="modules",
    html=True,
)
