"""Tell where the modules of one adapter are in a base: which rows of which stored tensor each of them changes."""

from __future__ import annotations

from typing import NamedTuple

from ...adapters.adapter import Adapter
from ...files.checkpoint import Checkpoint
from ...files.tensor_ref import TensorRef
from ..modules.placement import Placement
from ..modules.resolve import Binding, bind
from ..modules.selection import Selection
from .shared_tensors import bindable, stored_names
from .ties import find_tie


class Placed(NamedTuple):
    """Say what a module changes of a tensor."""

    weight: TensorRef
    placement: Placement
    together: tuple[Placement, ...]  # all of this tensor


def bind_adapter(base: Checkpoint, adapter: Adapter, selection: Selection) -> Binding:
    """Bind one adapter with weight 1; raises what `bind` raises if the two do not belong together."""
    specs, coded = bindable(base, find_tie(base))
    return bind(specs, base.configs, [(adapter, 1.0)], selection, coded)


def placed_modules(base: Checkpoint, binding: Binding) -> dict[str, list[Placed]]:
    """Return what each bound module changes, by the names that the base's files have, but codes that are not read."""
    stored, found = stored_names(base, find_tie(base)), dict[str, list[Placed]]()
    for name, placements in binding.placements.items():
        weight = base.ref(stored.get(name, name))
        for placement in placements:
            found.setdefault(placement.update.module, []).append(Placed(weight, placement, placements))
    return found
