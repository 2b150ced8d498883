"""Compare three or more adapters, module by module: the distance of each pair, and the overlaps of all."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from ...adapters.adapter import Adapter
from ...numerics.arrays import Device
from ...numerics.overlaps import Overlaps, stacked
from ...streaming.parallel import Progress
from ...views.diff_several import AdaptersDiff, ModuleSpread, ValueSpread
from .aligned import AlignedModule, LoadedModule, measure_modules
from .configs import count_ranks, differing_fields
from .shared import as_rows, shared_of
from .values import SAME, compare_values, is_same_value


def diff_several(
    adapters: Sequence[Adapter], aligned: Sequence[AlignedModule], device: Device, progress: Progress | None
) -> AdaptersDiff:
    """Compare aligned adapters."""

    def measure(loaded: LoadedModule) -> tuple[ModuleSpread, Overlaps]:
        return _module_spread(loaded), loaded.overlaps

    measured = measure_modules(adapters, aligned, device, progress, measure)
    modules, overlaps = [row for row, _ in measured], [each for _, each in measured]
    order = {module.name: i for i, module in enumerate(aligned)}
    modules.sort(key=lambda row: order[row.name])
    values = _compare_values(adapters, aligned)
    total = stacked(overlaps).total() if overlaps else None
    return AdaptersDiff(
        adapters=tuple(adapter.name for adapter in adapters),
        modules=tuple(modules),
        values=values,
        ranks=tuple(map(count_ranks, adapters)),
        norms=tuple(total.norms.tolist()) if total else (0.0,) * len(adapters),
        lacking=tuple(tuple(m.name for m in aligned if not m.updates[i]) for i in range(len(adapters))),
        fields=differing_fields(adapters),
        shared=shared_of(overlaps) if overlaps else None,
        relatives=as_rows(total.relatives) if total else (),
        worst=max([row.relative for row in modules] + [row.relative for row in values], default=0.0),
        same=all(row.same for row in modules) and all(is_same_value(row.kind, row.relative) for row in values),
        left_out=tuple(name for adapter in adapters for name in adapter.excluded),
    )


def _module_spread(loaded: LoadedModule) -> ModuleSpread:
    updates, shared = loaded.module.factored, loaded.overlaps
    having = [i for i, update in enumerate(updates) if update]
    both = list(combinations(having, 2))
    cosines, relatives = shared.cosines.tolist(), shared.relatives.tolist()
    pair = min(both, key=lambda ij: cosines[ij[0]][ij[1]], default=None)
    complete = len(having) == len(updates)
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
    """Compare the tensors other than factors, for each pair of adapters."""
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
