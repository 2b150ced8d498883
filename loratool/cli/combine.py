"""Define the command `loratool combine`."""

from __future__ import annotations

from ..commands.combine import call
from .from_call import command_of

combine = command_of(
    call.combine,
    """\
By default it is the exact sum of the weighted changes, whatever their ranks, targets and scales; weights may be
negative. The other methods act on the changes B A themselves, module by module; `loratool guide which-method`
says which to use when. With --rank they run on the changes compressed to so many directions, and nothing is cut after.
Image models' adapters may be of several formats: their modules meet by what they mean. Components and modules
take weights of their own, as in merge, by the names of each adapter's own file.

\b
  loratool combine style/:0.7 task/:0.3 -o both/
  loratool combine style/ task/ --method ties --density 0.3 --rank 16 -o ties/
  loratool combine a.safetensors b.safetensors:0.5 --to comfy -o c.safetensors
  loratool combine a.safetensors b.safetensors:te=0.4,fc1=0 -o d.safetensors

Rows are groups of layers, and -v has one a module; the exact sum has none. delta: the size of the method's result.
energy: the share of its square that the rank keeps. shared: the share of the changes' energy, each by its own size,
in the directions that they were compressed to. error: the size of what is lost beside the result, as written. With
--imatrix the energy is weighted by the inputs; out. error: the share of the outputs that is lost.
""",
    "combining",
    unit="modules",
    html=True,
)
