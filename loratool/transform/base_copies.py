"""Check whether a weight that an adapter stores under its factors, as PEFT does for embeddings, equals the base's."""

from __future__ import annotations

from ..adapters.adapter import Adapter
from ..adapters.updates.update import UpdateSpec
from ..binding.modules.resolve import resolve_modules
from ..binding.ties.shared_tensors import bindable, stored_names
from ..binding.ties.ties import find_tie
from ..files.checkpoint import Checkpoint
from ..files.tensor_compare import same_values
from ..files.tensor_ref import TensorRef


def equals_base(source: Adapter, update: UpdateSpec, base: Checkpoint | None) -> bool:
    """Return whether the weight under a module's factors equals the base's; False without a base or a weight."""
    if base is None or update.base is None:
        return False
    specs, _ = bindable(base, tie := find_tie(base))
    matches, _ = resolve_modules(specs, source.only([update.module]), base.configs)
    stored, weight = stored_names(base, tie), TensorRef(source.file, update.base)
    names = [stored.get(match.name, match.name) for match in matches.get(update.module, ())]
    return bool(names) and all(same_values(base.ref(name), weight) for name in names)
