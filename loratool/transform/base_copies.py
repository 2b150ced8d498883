"""Leave out weights that an adapter stores under its factors, as PEFT does for embeddings, if they are the base's."""

from __future__ import annotations

from ..adapters.adapter import Adapter
from ..adapters.updates.update import UpdateSpec
from ..binding.modules.resolve import resolve_modules
from ..binding.ties.shared_tensors import bindable, stored_names
from ..binding.ties.ties import find_tie
from ..errors import NeedsFlag
from ..files.checkpoint import Checkpoint
from ..files.tensor_compare import same_values
from ..files.tensor_ref import TensorRef
from .lazy import Transformed, noted, without_bases
from .refusals import cannot_convert
from .request import ConvertRequest, selected


def equals_base(source: Adapter, update: UpdateSpec, base: Checkpoint | None) -> bool:
    """Return whether the weight under a module's factors equals the base's; False without a base or a weight."""
    if base is None or update.base is None:
        return False
    specs, _ = bindable(base, tie := find_tie(base))
    matches, _ = resolve_modules(specs, source.only([update.module]), base.configs)
    stored, weight = stored_names(base, tie), TensorRef(source.file, update.base)
    names = [stored.get(match.name, match.name) for match in matches.get(update.module, ())]
    return bool(names) and all(same_values(base.ref(name), weight) for name in names)


def without_copies(state: Transformed, request: ConvertRequest) -> Transformed:
    """Return an adapter without the weights under its factors, for a format that has no place for them.

    PEFT saves them for embeddings and heads, trained or not.

    Raises:
        NeedsFlag: some differ from the base's, and must be excluded, or the base's weights are missing.
        InputError: some differ, and no other module is there to convert.
    """
    source, updates = state.adapter, selected(state.adapter, request.exclude)
    under = [module for module, update in updates.items() if update.base]
    if not under or request.base is None:
        return state
    if request.base.is_config:
        message = "has a weight under its factors, which must be compared with the base's"
        raise NeedsFlag(message, culprit=under[0], flags="--base BASE", why="with the model and its weights")
    base = request.base.open("--base is the adapter's model")
    if trained := [module for module in under if not equals_base(source, updates[module], base)]:
        what = f"have a weight under their factors that is not the base's, and {request.to} has no place for it"
        raise cannot_convert(source.name, what, trained, among=updates)
    note = f"{', '.join(under)}: the weight that is stored under the factors is left out: it is the base's"
    return noted(without_bases(state), note)
