"""Plan a language model's adapter for the other layout: q, k, v and gate, up as fused modules, or as split ones.

Both ways are exact. A split module gets its rows of B, and the ranks that reach them. A fused module gets the ranks of
its slices one after the other, or their common A (`factors.make_factors`). With grouped-query attention the numbers of
rows of q, k and v are in the base's config.json only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..adapters.updates.dora import DoRA
from ..adapters.updates.update import UpdateSpec
from ..architectures.families import LAYOUTS
from ..architectures.families.lookup import Located, locate, parts_of
from ..architectures.heads import heads_of
from ..binding.modules.image_modules import SourceModule
from ..errors import InputError, NeedsFlag
from .module_map import RowSlice, TargetModule, fuse_modules

Sizes = Mapping[str, int]  # split module -> its rows


def qkv_rows(config: Mapping[str, Any]) -> Sizes:
    """Return the numbers of rows of q_proj, k_proj and v_proj by a config.json; empty if it lacks them."""
    heads = heads_of(config)
    queries, keys = heads.queries * heads.size, heads.keys * heads.size
    return {"q_proj": queries, "k_proj": keys, "v_proj": keys} if queries and keys else {}


def plan_qkv(sources: list[SourceModule], layout: str, sizes: Sizes) -> list[TargetModule]:
    """Return a target for every module, split or fused as in the layout.

    Args:
        layout: a key of QKV_LAYOUTS.

    Raises:
        NeedsFlag: the rows of a module need a base.
        InputError: the rows differ from the base's, or are of no model.
    """
    targets: list[TargetModule] = []
    to_fuse: dict[str, dict[str, SourceModule]] = {}
    for source in sources:
        located = locate_fused(source.path)
        is_whole = located is not None and source.path in located.maker
        if located and layout == "split" and is_whole:
            targets += _split(source, located, sizes)
        elif located and layout == "fused" and not is_whole:
            to_fuse.setdefault(located.maker[0], {})[source.path] = source
        else:
            rows = source.update.shape[0]
            targets.append(TargetModule("", source.path, rows, (RowSlice(source, 0, rows),), "exact"))
    return targets + [_fuse(path, parts, sizes) for path, parts in to_fuse.items()]


def to_fuse_unlike(sources: Iterable[SourceModule]) -> tuple[dict[str, UpdateSpec], list[str]]:
    """Return the modules that are parts of a fused module, and those in a fused module that is only partly DoRA."""
    groups: dict[str, list[SourceModule]] = {}
    for source in sources:
        located = locate_fused(source.path)
        if located and source.path not in located.maker:
            groups.setdefault(located.maker[0], []).append(source)
    unlike: list[str] = []
    for path, parts in groups.items():
        fused = locate_fused(path)
        magnitudes = sum(part.update.cls is DoRA for part in parts)
        if fused and magnitudes not in (0, len(fused.diffusers)):
            unlike += [part.module for part in parts]
    return {part.module: part.update for parts in groups.values() for part in parts}, unlike


def locate_fused(path: str) -> Located | None:
    """Find a module that a language model fuses, or a part of one; None for any other."""
    return next((located for family in LAYOUTS.values() if (located := locate(family, path))), None)


def _of_base(located: Located, sizes: Sizes) -> dict[str, int]:
    """Return the known numbers of rows of a fused module's parts in the base."""
    ends = {module: module.rpartition(".")[2] for module in located.diffusers}
    return {module: sizes[end] for module, end in ends.items() if end in sizes}


def _split(source: SourceModule, located: Located, sizes: Sizes) -> list[TargetModule]:
    rows, width = source.update.shape[:2]
    known = _of_base(located, sizes)
    spans = parts_of(located, width, rows, known)
    if spans is None:
        of_table = parts_of(located, width, known=known)
        if of_table is None and any("queries" in fused.sizes for _, fused in located.rows):
            raise _base_tells(source.path, next(m for m in located.diffusers if m not in known))
        count = len(located.diffusers)
        terms = " + ".join(map(str, [span.module_rows for span in of_table] if of_table else [rows // count] * count))
        raise InputError(f"has {rows} rows, which are not {terms}: it belongs to another model", culprit=source.path)
    return [
        TargetModule("", span.module, span.module_rows, (RowSlice(source, span.start, span.stop),), "split")
        for span in spans
    ]


def _fuse(path: str, parts: Mapping[str, SourceModule], sizes: Sizes) -> TargetModule:
    located = locate_fused(path)
    assert located is not None
    rows = {module: source.update.shape[0] for module, source in parts.items()}
    alike = [rows[module] for module in located.diffusers[-2:] if module in rows]  # key and value, gate and up
    if len(set(alike)) > 1:
        raise InputError(f"would have parts of {alike[0]} and {alike[1]} rows, which no model has", culprit=path)
    width = next(iter(parts.values())).update.shape[1]
    of_table = parts_of(located, width, known={}) or ()  # by the table alone, if the width determines all parts
    base = {span.module: span.module_rows for span in of_table} or _of_base(located, sizes)
    wrong = next((module for module in rows if base.get(module, rows[module]) != rows[module]), None)
    if wrong:
        whose = f"{located.family.title}'s matrices" if of_table else "the base"
        part = wrong.rpartition(".")[2]
        raise InputError(f"has {rows[wrong]} rows of {part}, and {whose} {base[wrong]}", culprit=path)
    spans = parts_of(located, width, known={**base, **rows})
    if spans is None:
        raise _base_tells(path, next(m for m in located.diffusers if m not in rows and m not in base))
    placed = [RowSlice(parts[s.module], 0, s.module_rows, s.start) for s in spans if s.module in parts]
    return fuse_modules("", path, placed, spans[-1].stop)


def _base_tells(path: str, part: str) -> NeedsFlag:
    return NeedsFlag(
        f"the adapter alone does not say how many of its rows are {part.rpartition('.')[2]}'s",
        culprit=path,
        flags="--base BASE",
        why="with the model or its config.json",
    )
