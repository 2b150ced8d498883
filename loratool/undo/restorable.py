"""Reduce a merge to the part that an undo file takes back: of several copies of a layer it needs one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..binding.merge.merge_plan import MergePlan
from ..files.dtypes import TensorSpec
from ..files.layer_numbers import RepeatedLayers
from ..files.output.output import Output


@dataclass(frozen=True)
class RestorableMerge:
    """A merge into the base's own layers, which an undo file takes back.

    Attributes:
        plan: by the base's names; of several copies of a layer it has one.
        output: with the tensors of this plan.
        names: the base's names of these tensors, and names that were added -> those of the model that is written.
        copies: the other tensors of that model, with their types.
        layers: the layers there that this merge has, as those of the base; None if none are repeated.
    """

    plan: MergePlan
    output: Output
    names: Mapping[str, str]
    copies: Mapping[str, TensorSpec]
    layers: RepeatedLayers | None


def restorable_merge(plan: MergePlan, output: Output) -> RestorableMerge:
    """Return the part of a merge that restores its base. A model that repeats layers has each layer of the base."""
    base, layers = plan.base.original, plan.base_layers
    if layers is None:
        return RestorableMerge(plan, output, {name: name for name in output.specs}, {}, None)
    names = {plan.base.stored_name(name): name for name in output.specs if plan.restores_base(name)}
    copies = {name: spec for name, spec in output.specs.items() if not plan.restores_base(name)}
    sources = {stored: plan.sources[name] for stored, name in names.items()}
    for stored, name in names.items():
        if name in plan.base.specs and sources[stored] == plan.base.ref(name):
            sources[stored] = base.ref(stored)
    part = replace(
        plan,
        base=base,
        sources=sources,
        placements={stored: plan.placements[name] for stored, name in names.items() if name in plan.placements},
    )
    specs = {stored: output.specs[name] for stored, name in names.items()}
    return RestorableMerge(part, replace(output, specs=specs), names, copies, layers)
