"""Tell whether a weight that an adapter has under its factors, as PEFT saves embeddings, is no more than the base's."""

from __future__ import annotations

from ..adapters.adapter import Adapter
from ..adapters.updates.update import UpdateSpec
from ..binding.modules.resolve import resolve_modules
from ..binding.ties.shared_tensors import bindable, stored_names
from ..binding.ties.ties import find_tie
from ..files.checkpoint import Checkpoint
from ..files.tensor_compare import same_values
from ..files.tensor_ref import TensorRef


def is_of_base(source: Adapter, update: UpdateSpec, base: Checkpoint | None) -> bool:
    """Return whether the weight under the factors of a module has the base's values; not without a base or a weight."""
    if base is None or update.base is None:
        return False
    specs, _ = bindable(base, tie := find_tie(base))
    matches, _ = resolve_modules(specs, source.only([update.module]), base.configs)
    stored, weight = stored_names(base, tie), TensorRef(source.file, update.base)
    names = [stored.get(match.name, match.name) for match in matches.get(update.module, ())]
    return bool(names) and all(same_values(base.ref(name), weight) for name in names)
