"""Check by names and shapes whether adapters can be of one model.

Two adapters can change different modules of one model (one the attention, one the MLPs). They then have the same names
of layers, and the same width. Adapters with neither in common are of two models, and their sum is useless.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import combinations

from ...adapters.adapter import Adapter
from ...adapters.updates.update import UpdateSpec
from ...architectures.components import component_of
from ...binding.modules.image_modules import detect_family, read_source_modules
from ...errors import InputError, NeedsFlag
from ...transform.in_memory import common_family, is_of_one
from ..inputs import WeightedAdapter
from .aligned import AlignedModule, align_modules

NUMBER = re.compile(r"(?:^|[._])\d+(?:[._]|$)")  # of a layer, after the name of its stack


def require_related(loaded: WeightedAdapter) -> None:
    """Raise NeedsFlag if some adapters are unrelated to the first. All have one format and spelling."""
    related, rest = [loaded[0][0]], [adapter for adapter, _ in loaded[1:]]
    while rest:
        related_at = next(
            (i for i, adapter in enumerate(rest) if any(not why_unrelated(each, adapter) for each in related)), None
        )
        if related_at is None:
            why = why_unrelated(related[0], rest[0])
            assert why
            raise NeedsFlag(why, culprit=rest[0].name, flags="--allow unrelated", why="to combine them anyway")
        related.append(rest.pop(related_at))


def require_same_names(loaded: WeightedAdapter) -> None:
    """Raise InputError for adapters without a common name, if they have the same modules under other names.

    Two versions of transformers saved them, and a loader would find the modules of only one.
    """
    for (first, _), (second, _) in combinations(loaded, 2):
        if first.updates.keys().isdisjoint(second.updates):
            pairs = [(a, b) for a, b in (each.updates for each in align_modules((first, second))) if a and b]
            fewer = min(len(first.updates), len(second.updates))
            if 0 < fewer == len(pairs) and all(a.shape == b.shape for a, b in pairs):
                a, b = pairs[0]
                message = f"is in {second.name}, and {first.name} calls it {a.module}: they come from two model classes"
                raise InputError(message, culprit=b.module)


def require_of_one_model(adapters: Sequence[Adapter]) -> None:
    """Raise InputError for adapters of two models, whatever is selected."""
    first, *others = adapters
    for other in others:
        aligned = align_modules((first, other))
        if any(all(module.updates) for module in aligned):
            continue
        if why := why_unrelated(first, other):
            raise InputError(f"{why}; nothing can be compared", culprit=other.name)


def require_known_names(adapters: Sequence[Adapter], aligned: Sequence[AlignedModule]) -> None:
    """Raise InputError if the names of two formats do not show which modules are the same."""
    for (i, a), (j, b) in combinations(enumerate(adapters), 2):
        if a.format == b.format or (is_of_one(a) and is_of_one(b)):
            continue
        pairs = [(module.updates[i], module.updates[j]) for module in aligned]
        only_b = [update_b for update_a, update_b in pairs if update_b and not update_a]
        known = all(detect_family(read_source_modules(each)[0]) for each in (a, b))
        if only_b and any(update_a and not update_b for update_a, update_b in pairs) and not known:
            raise InputError(
                f"is in {b.name} and cannot be matched to a module of {a.name}: the names are those of {b.format} and "
                f"{a.format}, and the image model is unknown",
                culprit=only_b[0].module,
            )


def why_unrelated(first: Adapter, second: Adapter) -> str | None:
    """Return the reason why no model can have the modules of both. None if one can."""
    if first.updates.keys() & second.updates.keys():
        return None
    try:
        if common_family((first, second)):
            return None
    except InputError as error:
        return error.message
    if first.config.base_model and first.config.base_model == second.config.base_model:
        return None
    components = [{component_of(module)[0] for module in each.updates} for each in (first, second)]
    if None not in components[0] | components[1] and components[0].isdisjoint(components[1]):
        return None
    opening = f"has no module in common with {first.name}, and"
    stems = [
        {module[: match.start()] for module in each.updates if (match := NUMBER.search(module))}
        for each in (first, second)
    ]
    if all(stems) and stems[0].isdisjoint(stems[1]):
        return f"{opening} its layers are in {min(stems[1])}, not {min(stems[0])}"
    sizes = [{size for update in each.updates.values() for size in _sizes(update)} for each in (first, second)]
    if all(sizes) and sizes[0].isdisjoint(sizes[1]):
        shapes = [
            "x".join(map(str, next(u.shape for u in each.updates.values() if u.rank))) for each in (second, first)
        ]
        return f"{opening} no width: {shapes[0]} and {shapes[1]}"
    return None


def _sizes(update: UpdateSpec) -> tuple[int, ...]:
    """Return the sizes of an update's inputs and outputs."""
    if not update.rank:
        return ()
    return update.shape[1:] if update.cls.stack else update.shape[:2]
