"""Find tensors that several modules of a class have as one, beside the vocabulary's, and merge what changes all alike.

PEFT gives each module factors of its own, so that an adapter can change one of them alone; that is no longer one
tensor, and is refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from ...architectures.ties import SHARED_BLOCKS, SHARED_MODULES
from ...errors import InputError, NeedsFlag
from ...files.checkpoint import Checkpoint
from ...files.codecs.quantized import Coded
from ...files.dtypes import TensorSpec
from ..modules.placement import Placement
from ..names.peft_names import exclude_all
from .tied_weights import equal_changes
from .ties import Tie


def find_shared(base: Checkpoint) -> dict[str, tuple[tuple[str, bool], ...]]:
    """Map each such tensor to the names of the modules that compute with it, each with whether it is transposed."""
    rows = [row for model_type in base.model_types for row in SHARED_MODULES.get(model_type, ())]
    found = {}
    for name in base.specs if rows else ():
        for pattern, uses in rows:
            if match := re.search(pattern, name):
                before, after = name[: match.start()], name[match.end() :]
                named = [(f"{before}{match.expand(path)}{after}", transposed) for path, transposed in uses]
                found[name] = tuple(use for use in named if use[0] == name or _is_lacking(base, use[0]))
    for model_type in SHARED_BLOCKS.keys() & set(base.model_types):
        found.update(_shared_blocks(base, SHARED_BLOCKS[model_type]))
    return found


def _is_lacking(base: Checkpoint, name: str) -> bool:
    """Return whether a part of the class that is there, or a layer beside all parts, lacks a tensor."""
    part = f"{name.partition('.')[0]}."
    return name not in base.specs and (name == f"{part}weight" or any(each.startswith(part) for each in base.specs))


def _shared_blocks(base: Checkpoint, block: str) -> Iterator[tuple[str, tuple[tuple[str, bool], ...]]]:
    """Yield the tensors of the blocks of which all layers that have a `linear` beside one use one after the other."""
    layer = r"^(.*?\blayers\.)(\d{1,9})\."
    stored = [(match, name) for name in base.specs if (match := re.search(rf"{layer}{block}\.", name))]
    linear = [match for name in base.specs if (match := re.search(rf"{layer}linear\.weight$", name))]
    layers = sorted({int(match[2]) for match in linear})
    own = sorted({int(match[2]) for match, _ in stored})
    for match, name in stored:
        others = layers[own.index(int(match[2])) :: len(own)] if layers[: len(own)] == own else [int(match[2])]
        yield name, tuple((f"{match[1]}{i}.{name[match.end(2) + 1 :]}", False) for i in others)


def stored_names(base: Checkpoint, tie: Tie | None) -> dict[str, str]:
    """Map the names that adapters may have for a tensor that is stored under another to the latter."""
    shared = {use: stored for stored, uses in find_shared(base).items() for use, _ in uses if use != stored}
    return shared | ({name: tie.stored_as(name) for name in tie.lacking(base)} if tie else {})


def bindable(base: Checkpoint, tie: Tie | None) -> tuple[dict[str, TensorSpec], dict[str, Coded]]:
    """Return the tensors and the quantized weights that adapters may name, all names of what is shared included."""
    others = stored_names(base, tie)
    coded = {name: base.coded[stored] for name, stored in others.items() if stored in base.coded}
    return {**base.specs, **{name: base.specs[stored] for name, stored in others.items()}}, {**base.coded, **coded}


def resolve_shared(
    base: Checkpoint, placements: Mapping[str, tuple[Placement, ...]]
) -> Mapping[str, tuple[Placement, ...]]:
    """Move the changes of modules that have one tensor, which have to be the same, to that tensor.

    Raises:
        NeedsFlag: they are not the same; it names the --exclude options that leave them out.
        InputError: they are not, and nothing else is changed.
    """
    resolved = dict(placements)
    apart: dict[str, str] = {}  # module of an adapter -> the tensor that it would change for others too
    for stored, uses in find_shared(base).items():
        names = dict.fromkeys((*(name for name, _ in uses), stored))
        changed = {name: resolved.pop(name) for name in names if name in resolved}
        if not changed:
            continue
        first = next(iter(changed.values()))
        if len(names) > 1 and not all(equal_changes(first, changed.get(name, ())) for name, _ in uses):
            apart |= {p.update.module: stored for found in changed.values() for p in found}
        resolved[stored] = first
    if apart:
        raise _not_alike(base, apart, {p.update.module for found in placements.values() for p in found} - apart.keys())
    return {name: resolved[name] for name in base.specs if name in resolved} | resolved


def _not_alike(base: Checkpoint, apart: Mapping[str, str], kept: Collection[str]) -> NeedsFlag | InputError:
    """Return the error for modules that are `apart`, each with the tensor that it changes; `kept` can be merged."""
    stored = next(iter(apart.values()))
    shared = " and ".join(name for name, _ in find_shared(base)[stored])
    message = f"is one tensor of several layers, which the adapter does not change alike: {shared}"
    if not kept:
        return InputError(message, culprit=stored)
    return NeedsFlag(message, culprit=stored, flags=exclude_all([*apart], [*kept]))
