"""Find tensors, except the vocabulary's, that several modules share, and merge updates that change all of them equally.

PEFT gives each module separate factors, so an adapter can change only one of them. They would no longer be one tensor,
so that is refused.
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
    """Return shared tensor -> names of the modules that use it, each with whether it is transposed there."""
    rows = [row for model_type in base.model_types for row in SHARED_MODULES.get(model_type, ())]
    shared = {}
    for name in base.specs if rows else ():
        for pattern, uses in rows:
            if match := re.search(pattern, name):
                before, after = name[: match.start()], name[match.end() :]
                named = [(f"{before}{match.expand(path)}{after}", transposed) for path, transposed in uses]
                shared[name] = tuple(use for use in named if use[0] == name or _is_lacking(base, use[0]))
    for model_type in SHARED_BLOCKS.keys() & set(base.model_types):
        shared.update(_shared_blocks(base, SHARED_BLOCKS[model_type]))
    return shared


def _is_lacking(base: Checkpoint, name: str) -> bool:
    """Return whether a tensor is missing from a stored part of the class, or from the layers outside all parts."""
    part = f"{name.partition('.')[0]}."
    return name not in base.specs and (name == f"{part}weight" or any(each.startswith(part) for each in base.specs))


def _shared_blocks(base: Checkpoint, block: str) -> Iterator[tuple[str, tuple[tuple[str, bool], ...]]]:
    """Yield the tensors of shared blocks, which all layers with a `linear` beside a block use in turn."""
    layer = r"^(.*?\blayers\.)(\d{1,9})\."
    stored = [(match, name) for name in base.specs if (match := re.search(rf"{layer}{block}\.", name))]
    linear = [match for name in base.specs if (match := re.search(rf"{layer}linear\.weight$", name))]
    layers = sorted({int(match[2]) for match in linear})
    numbers = sorted({int(match[2]) for match, _ in stored})
    for match, name in stored:
        others = (
            layers[numbers.index(int(match[2])) :: len(numbers)]
            if layers[: len(numbers)] == numbers
            else [int(match[2])]
        )
        yield name, tuple((f"{match[1]}{i}.{name[match.end(2) + 1 :]}", False) for i in others)


def stored_names(base: Checkpoint, tie: Tie | None) -> dict[str, str]:
    """Return name in adapters -> name in the files, for tensors that are stored under another name."""
    shared = {use: stored for stored, uses in find_shared(base).items() for use, _ in uses if use != stored}
    return shared | ({name: tie.stored_as(name) for name in tie.lacking(base)} if tie else {})


def bindable(base: Checkpoint, tie: Tie | None) -> tuple[dict[str, TensorSpec], dict[str, Coded]]:
    """Return the tensors and the quantized weights that adapters may name, with all names of shared tensors."""
    others = stored_names(base, tie)
    coded = {name: base.coded[stored] for name, stored in others.items() if stored in base.coded}
    return {**base.specs, **{name: base.specs[stored] for name, stored in others.items()}}, {**base.coded, **coded}


def resolve_shared(
    base: Checkpoint, placements: Mapping[str, tuple[Placement, ...]]
) -> Mapping[str, tuple[Placement, ...]]:
    """Move equal changes of modules that share a tensor to that tensor.

    Raises:
        NeedsFlag: the changes differ; the error has --exclude options for them.
        InputError: the changes differ, and nothing else is changed.
    """
    resolved = dict(placements)
    apart: dict[str, str] = {}  # module of an adapter -> the tensor that it would also change for other modules
    for stored, uses in find_shared(base).items():
        names = dict.fromkeys((*(name for name, _ in uses), stored))
        changed = {name: resolved.pop(name) for name in names if name in resolved}
        if not changed:
            continue
        first = next(iter(changed.values()))
        if len(names) > 1 and not all(equal_changes(first, changed.get(name, ())) for name, _ in uses):
            apart |= {p.update.module: stored for placed in changed.values() for p in placed}
        resolved[stored] = first
    if apart:
        raise _not_alike(
            base, apart, {p.update.module for placed in placements.values() for p in placed} - apart.keys()
        )
    return {name: resolved[name] for name in base.specs if name in resolved} | resolved


def _not_alike(base: Checkpoint, apart: Mapping[str, str], mergeable: Collection[str]) -> NeedsFlag | InputError:
    """Return the error for modules with differing changes (`apart`: module -> tensor); `mergeable` can be merged."""
    stored = next(iter(apart.values()))
    shared = " and ".join(name for name, _ in find_shared(base)[stored])
    message = f"is one tensor that several layers share, but the adapter changes them differently: {shared}"
    if not mergeable:
        return InputError(message, culprit=stored)
    return NeedsFlag(message, culprit=stored, flags=exclude_all([*apart], [*mergeable]))
