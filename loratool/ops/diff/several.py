"""Compare three or more adapters: how far any two are apart, module by module, and what all of them share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, ClassVar

import torch

from ...adapters.adapter import Adapter
from ...numerics.overlaps import Overlaps, stacked
from ...reports.report import Report
from ...streaming.workers import Progress
from .aligned import AlignedModule, LoadedModule, measure_modules
from .configs import count_ranks, differing_fields
from .shared import Matrix, Shared, as_rows, shared_of
from .values import SAME, compare_values, is_same_value


@dataclass(frozen=True)
class ModuleSpread:
    """One module of T adapters; D is its delta in one (of DoRA before the norm).

    Attributes:
        ranks, norms: of each adapter, 0 without the module.
        cosine: the least of two adapters that have it; None if only one has.
        pair: these two, counted from 0.
        relative: the largest ||D_j - D_i|| / max(||D_i||, ||D_j||) of two; 1 if one of them lacks it.
        same: whether that is 0 but for float32's rounding, whatever the factors.
        interference, random_interference: as of `Shared`; None if only one has it.
    """

    name: str
    kind: str
    ranks: tuple[int, ...]
    norms: tuple[float, ...]
    cosine: float | None
    pair: tuple[int, int] | None
    relative: float
    same: bool
    interference: float | None
    random_interference: float | None


@dataclass(frozen=True)
class ValueSpread:
    """A tensor that is no factor, as of `ValueDiff`.

    Attributes:
        norms: None in an adapter without it.
        relative: the largest of two; 1 if one of them lacks it or has another shape.
    """

    name: str
    kind: str
    norms: tuple[float | None, ...]
    relative: float


@dataclass(frozen=True)
class AdaptersDiff(Report):
    """Three or more adapters, in their order, module by module and as a whole.

    Attributes:
        ranks: of each adapter, rank -> how many modules have it.
        norms: of all factors together.
        lacking: of each adapter, the modules that others have and it has not.
        fields: a field of the configs that differs -> the values.
        shared: cosines and interference, and what they mean.
        relatives: T rows of T: the distance over the larger norm, of all factors together.
        worst: the largest relative distance of two in any module or tensor, 1 if one of them lacks it.
        left_out: what --drop left out of any.
        above: what `worst` is above, of --fail-above.
        sha256: an adapter -> the hash of its weights file.
    """

    shown_by: ClassVar[str] = "several_document.several_document"
    paged_by: ClassVar[str] = "several_page.several_page"
    rows: ClassVar[str] = "modules"

    adapters: tuple[str, ...]
    modules: tuple[ModuleSpread, ...]
    values: tuple[ValueSpread, ...]
    ranks: tuple[Mapping[int, int], ...]
    norms: tuple[float, ...]
    lacking: tuple[tuple[str, ...], ...]
    fields: Mapping[str, tuple[Any, ...]]
    shared: Shared | None
    relatives: Matrix
    worst: float
    same: bool
    left_out: tuple[str, ...] = ()
    kind: str = "several"
    above: float | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)

    @property
    def said_no(self) -> str | None:
        return None if self.above is None else "different"

    def is_above(self, limit: float) -> bool:
        """Return whether a distance is above a limit."""
        return self.worst > limit


def diff_several(
    adapters: Sequence[Adapter], aligned: Sequence[AlignedModule], device: torch.device, progress: Progress | None
) -> AdaptersDiff:
    """Compare aligned adapters."""

    def measure(loaded: LoadedModule) -> tuple[ModuleSpread, Overlaps]:
        return _module_spread(loaded), loaded.overlaps

    measured = measure_modules(adapters, aligned, device, progress, measure)
    modules, found = [row for row, _ in measured], [each for _, each in measured]
    order = {module.name: i for i, module in enumerate(aligned)}
    modules.sort(key=lambda row: order[row.name])
    values = _compare_values(adapters, aligned)
    total = stacked(found).total() if found else None
    return AdaptersDiff(
        adapters=tuple(adapter.name for adapter in adapters),
        modules=tuple(modules),
        values=values,
        ranks=tuple(map(count_ranks, adapters)),
        norms=tuple(total.norms.tolist()) if total else (0.0,) * len(adapters),
        lacking=tuple(tuple(m.name for m in aligned if not m.updates[i]) for i in range(len(adapters))),
        fields=differing_fields(adapters),
        shared=shared_of(found) if found else None,
        relatives=as_rows(total.relatives) if total else (),
        worst=max([row.relative for row in modules] + [row.relative for row in values], default=0.0),
        same=all(row.same for row in modules) and all(is_same_value(row.kind, row.relative) for row in values),
        left_out=tuple(name for adapter in adapters for name in adapter.left_out),
    )


def _module_spread(loaded: LoadedModule) -> ModuleSpread:
    updates, shared = loaded.module.factored, loaded.overlaps
    there = [i for i, update in enumerate(updates) if update]
    both = list(combinations(there, 2))
    cosines, relatives = shared.cosines.tolist(), shared.relatives.tolist()
    pair = min(both, key=lambda ij: cosines[ij[0]][ij[1]], default=None)
    complete = len(there) == len(updates)
    relative = max([relatives[i][j] for i, j in both] + [1.0] * (not complete))
    interference, random_interference = map(float, shared.of_all)
    return ModuleSpread(
        name=loaded.module.name,
        kind=next(update.kind for update in updates if update),
        ranks=tuple(update.rank if update else 0 for update in updates),
        norms=tuple(shared.norms.tolist()),
        cosine=cosines[pair[0]][pair[1]] if pair else None,
        pair=pair,
        relative=relative,
        same=complete and relative <= SAME,
        interference=interference if pair else None,
        random_interference=random_interference if pair else None,
    )


def _compare_values(adapters: Sequence[Adapter], aligned: Sequence[AlignedModule]) -> tuple[ValueSpread, ...]:
    """Compare the tensors that are no factors, each two adapters'."""
    norms: dict[str, list[float | None]] = {}
    relatives, kinds = dict[str, float](), dict[str, str]()
    for i, j in combinations(range(len(adapters)), 2):
        sides = [AlignedModule(module.name, (module.updates[i], module.updates[j])) for module in aligned]
        for row in compare_values(adapters[i], adapters[j], sides):
            of = norms.setdefault(row.name, [None] * len(adapters))
            of[i], of[j] = row.norm_a, row.norm_b
            kinds.setdefault(row.name, row.kind)
            relatives[row.name] = max(relatives.get(row.name, 0.0), row.relative)
    return tuple(ValueSpread(name, kinds[name], tuple(norms[name]), relatives[name]) for name in norms)
