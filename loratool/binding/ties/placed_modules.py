"""Find the rows of stored tensors that each module of an adapter changes."""

from __future__ import annotations

from typing import NamedTuple

from ...adapters.adapter import Adapter
from ...files.checkpoint import Checkpoint
from ...files.tensor_ref import TensorRef
from ..modules.beside import beside_weights
from ..modules.placement import Placement
from ..modules.resolve import Binding, bind
from ..modules.selection import Selection
from .shared_tensors import bindable, stored_names
from .ties import find_tie


class Placed(NamedTuple):
    """The rows of a tensor that a module changes."""

    weight: TensorRef
    placement: Placement
    together: tuple[Placement, ...]  # all placements on this tensor


def bind_adapter(base: Checkpoint, adapter: Adapter, selection: Selection) -> Binding:
    """Bind one adapter with weight 1; errors as in `bind`."""
    specs, coded = bindable(base, find_tie(base))
    return bind(specs, base.configs, [(adapter, 1.0)], selection, coded)


def placed_modules(base: Checkpoint, binding: Binding) -> dict[str, list[Placed]]:
    """Return bound module -> its changes, by the names of the base's files, except codes of unsupported formats."""
    stored, by_module = stored_names(base, find_tie(base)), dict[str, list[Placed]]()
    weights = {name: base.ref(stored.get(name, name)) for name in binding.placements}
    for name, placements in beside_weights(binding.placements, weights).items():
        for placement in placements:
            by_module.setdefault(placement.update.module, []).append(Placed(weights[name], placement, placements))
    return by_module
