"""Convert adapters of one model to one layout, so that a module has the same name and rows in all of them.

A language model's q, k, v or gate, up may be one fused module in one adapter and split modules in another. Both can be
the same change. The rows of a fused module's parts are known from the other adapter's parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..adapters.adapter import Adapter
from ..adapters.updates.low_rank import LowRank
from ..architectures.families.lookup import Located, parts_of
from ..architectures.prefixes import CONTAINER_PREFIXES
from ..binding.modules.image_modules import SourceModule
from ..binding.modules.resolve import strip_wrappers
from ..errors import InputError
from .expand import expand
from .fused_qkv import locate_fused
from .lazy import Transformed
from .module_map import RowSlice, TargetModule, fuse_modules, refuse_column_norms
from .regroup import regroup


@dataclass
class _Group:
    """A fused module and its parts in one adapter."""

    located: Located | None = None  # of any of them
    fused: SourceModule | None = None
    parts: dict[int, SourceModule] = field(default_factory=dict)  # by their order in the fused module


def to_one_layout(states: Sequence[Transformed], keep_first: bool) -> list[Transformed]:
    """Return the adapters with each module either fused in all, or split in all.

    Args:
        keep_first: a module gets the layout of the first adapter that has it; else it is split.

    Raises:
        InputError: the rows of a fused module differ from those of the other adapter's parts.
        NeedsFlag: DoRA cannot be split or fused.
    """
    groups = [_groups_of(state.adapter) for state in states]
    targets: list[dict[str, TargetModule]] = [{} for _ in states]
    for key in dict.fromkeys(key for of_adapter in groups for key in of_adapter):
        of_all = [of_adapter.get(key, _Group()) for of_adapter in groups]
        if not any(group.fused for group in of_all) or not any(group.parts for group in of_all):
            continue
        known = {i: source.update.shape[0] for group in of_all for i, source in group.parts.items()}
        fused = next(group.fused for group in of_all if group.fused)
        fuses = keep_first and next(group for group in of_all if group.located).fused is not None
        for group, mine in zip(of_all, targets, strict=True):
            if group.located and (group.parts if fuses else group.fused):
                mine |= {target.path: target for target in _targets(group, fused, known, fuses)}
    taken_updates = [p.source.update for mine in targets for target in mine.values() for p in target.parts]
    if any(
        update.cls.without_norm(update).cls is not LowRank for update in taken_updates
    ):  # only LoRA has rows to split
        return to_one_layout([expand(state) for state in states], keep_first)
    regrouped = []
    for state, mine in zip(states, targets, strict=True):
        refuse_column_norms(mine.values())
        taken = {part.source.module for target in mine.values() for part in target.parts}
        others = [module for module in state.adapter.updates if module not in taken]
        regrouped.append(regroup(state, mine, others) if mine else state)
    return regrouped


def _groups_of(adapter: Adapter) -> dict[str, _Group]:
    """Return the fused modules and parts of an adapter, by the fused path without containers."""
    groups: dict[str, _Group] = {}
    for module, update in adapter.updates.items():
        located = locate_fused(module) if update.rank and not update.cls.stack else None
        if located is None or update.transposed:
            continue
        group = groups.setdefault(_without_containers(located.maker[0]), _Group())
        source = SourceModule(module, update, "", module)
        group.located = located
        if module in located.maker:
            group.fused = source
        else:
            located_fused = locate_fused(located.maker[0])
            assert located_fused is not None
            group.parts[located_fused.diffusers.index(module)] = source
    return groups


def _without_containers(path: str) -> str:
    """Return a path without wrappers and container prefixes, which one of two adapters may have."""
    path = strip_wrappers(path)
    while prefix := next((container for container in CONTAINER_PREFIXES if path.startswith(f"{container}.")), None):
        path = path.removeprefix(f"{prefix}.")
    return path


def _targets(group: _Group, fused: SourceModule, known: Mapping[int, int], fuses: bool) -> list[TargetModule]:
    """Return the targets of an adapter's group, split or fused.

    Args:
        fused: the fused module, of this adapter or another.
        known: the rows of the parts in any adapter, by their order.
    """
    assert group.located is not None
    located = locate_fused(group.located.maker[0])
    assert located is not None
    rows, width = fused.update.shape[:2]
    named = {located.diffusers[i]: size for i, size in known.items()}
    spans = parts_of(located, width, rows, named)
    if spans is None:
        others = ", ".join(f"{module.rpartition('.')[2]} {size}" for module, size in named.items())
        raise InputError(
            f"has {rows} rows, and those of the other adapter ({others}) are not part of them", culprit=fused.module
        )
    if fuses:
        placed = [RowSlice(source, 0, source.update.shape[0], spans[i].start) for i, source in group.parts.items()]
        return [fuse_modules("", located.path, placed, rows)]
    assert group.fused is not None
    return [
        TargetModule("", span.module, span.module_rows, (RowSlice(group.fused, span.start, span.stop),), "split")
        for span in spans
    ]
