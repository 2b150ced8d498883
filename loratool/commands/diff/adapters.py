"""Compare two adapters module by module in factor space: sizes, distances, angles, and the paper's phi, from QR cores.

All numbers are those of the deltas, not of their factors, so that two factorizations of a delta are equal.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ...adapters.adapter import Adapter
from ...binding.modules.selection import Selection
from ...binding.ties.placed_modules import Placed, bind_adapter, placed_modules
from ...files.checkpoint import Checkpoint
from ...files.tensor_ref import require_finite, squared_norm
from ...numerics.arrays import Device, fetched
from ...numerics.factored_svd import (
    FactoredSVD,
    amplification,
    principal_angles,
    random_similarity,
    subspace_similarity,
)
from ...numerics.forms import Wide
from ...numerics.linalg import norm
from ...numerics.overlaps import Overlaps, stacked
from ...numerics.spectrum import six_digits
from ...streaming.parallel import Progress
from ...views.diff_adapters import AdapterDiff, ModuleDiff, Phi
from .aligned import AlignedModule, LoadedModule, measure_modules
from .configs import count_ranks, differing_fields
from .shared import shared_of
from .values import SAME, compare_values, is_same_value

READ = 1 << 22  # numbers of a base read at a time


def diff_adapters(
    a: Adapter,
    b: Adapter,
    aligned: Sequence[AlignedModule],
    base: Checkpoint | None,
    base_name: str | None,
    device: Device,
    progress: Progress | None,
) -> AdapterDiff:
    """Compare two aligned adapters, and their deltas with a base.

    Raises:
        InputError: the shapes of two deltas differ, a factor or a weight has nan or inf, or `bind` raises it.
    """
    bindings = [bind_adapter(base, each, Selection()) for each in (a, b)] if base else []
    weights = [placed_modules(base, each) for each in bindings] if base else [{}, {}]

    def measure(loaded: LoadedModule) -> tuple[ModuleDiff, Overlaps]:
        (size_a, factor_a), (size_b, factor_b) = (_relative_to_base(each, loaded, i) for i, each in enumerate(weights))
        row = _module_diff(loaded)
        row = replace(row, size_a=size_a, size_b=size_b, amplification_a=factor_a, amplification_b=factor_b)
        return row, loaded.overlaps

    measured = measure_modules((a, b), aligned, device, progress, measure)
    modules, overlaps = [row for row, _ in measured], [each for _, each in measured]
    order = {module.name: i for i, module in enumerate(aligned)}
    modules.sort(key=lambda m: order[m.name])
    values = compare_values(a, b, aligned)
    total = stacked(overlaps).total() if overlaps else None
    pair = shared_of(overlaps).pairs[0] if overlaps else None
    norm_a, norm_b = total.norms.tolist() if total else (0.0, 0.0)
    worst = max([m.relative for m in modules] + [v.relative for v in values], default=0.0)
    return AdapterDiff(
        a=a.name,
        b=b.name,
        base=base_name,
        modules=tuple(modules),
        values=tuple(values),
        only_a=tuple(module.name for module in aligned if not module.updates[1]),
        only_b=tuple(module.name for module in aligned if not module.updates[0]),
        ranks_a=count_ranks(a),
        ranks_b=count_ranks(b),
        fields=differing_fields((a, b)),
        norm_a=norm_a,
        norm_b=norm_b,
        distance=float(total.distances[0, 1]) if total else 0.0,
        relative=float(total.relatives[0, 1]) if total else 0.0,
        cosine=pair.cosine if pair else 0.0,
        pair=pair,
        phi=mean_phi(modules),
        worst=worst,
        same=all(m.same for m in modules) and all(is_same_value(v.kind, v.relative) for v in values),
        left_out=(*a.excluded, *b.excluded),
    )


def _relative_to_base(
    weights: Mapping[str, Sequence[Placed]], loaded: LoadedModule, i: int
) -> tuple[float | None, float | None]:
    """Return ||D|| / ||W|| of adapter i, and the amplification factor if W is a full matrix. None without a base."""
    spec, change = loaded.module.factored[i], loaded.changes[i]
    if spec is None or spec.module not in weights:
        return None, None
    weight = weights[spec.module]
    sources = {each.weight.name: each.weight for each in weight}
    for source in sources.values():
        require_finite(source)
    of_base = math.sqrt(math.fsum(map(squared_norm, sources.values())))
    size = float(norm(change.S)) / of_base if of_base else None
    source, placement, _ = weight[0]
    if len(weight) > 1 or len(change.S) > 1 or placement.stop - placement.start != placement.rows:
        return size, None
    whole = loaded.load(i)
    U, S, V = (fetched(side[0]) for side in (whole.U, whole.S, whole.V))
    delta = FactoredSVD(V, S, U) if placement.transposed else FactoredSVD(U, S, V)  # stored as (in, out)
    factor = amplification(delta, (block.wide() for block in source.blocks(READ)), spec.rank)
    return size, factor if math.isfinite(factor) else None


def _module_diff(loaded: LoadedModule) -> ModuleDiff:
    sides, shared = loaded.module.factored, loaded.overlaps
    norm_a, norm_b = shared.norms.tolist()
    between, largest = float(shared.distances[0, 1]), max(norm_a, norm_b)
    missing = not all(sides)
    relative = 1.0 if missing else between / largest if largest else 0.0
    rank_a, rank_b = (update.rank if update else 0 for update in sides)
    row = ModuleDiff(
        name=loaded.module.name,
        kind=next(update.kind for update in sides if update),
        rank_a=rank_a,
        rank_b=rank_b,
        norm_a=norm_a,
        norm_b=norm_b,
        distance=between,
        relative=relative,
        cosine=float(shared.cosines[0, 1]),
        same=not missing and relative <= SAME,
        interference=None if missing else float(shared.of_all[0]),
    )
    mine, theirs = loaded.changes
    if missing or len(mine.S) > 1 or not (norm_a and norm_b):
        return row
    i, j = int(mine.rank()[0]), int(theirs.rank()[0])
    left, right = ((getattr(mine, side)[0, :, :i], getattr(theirs, side)[0, :, :j]) for side in ("U", "V"))
    angles_left, angles_right = (tuple(map(six_digits, principal_angles(*side).tolist())) for side in (left, right))
    return replace(row, angles_left=angles_left, angles_right=angles_right, phi=_phi(left, right, loaded.sides))


def _phi(left: tuple[Wide, Wide], right: tuple[Wide, Wide], sides: tuple[int, int]) -> Phi:
    i, j = (_powers_of_two(side.shape[1]) for side in left)

    def grid(vectors: tuple[Wide, Wide]) -> tuple[tuple[float, ...], ...]:
        full = subspace_similarity(*vectors)
        return tuple(tuple(six_digits(float(full[a - 1, b - 1])) for b in j) for a in i)

    def random(n: int) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(six_digits(random_similarity(a, b, n)) for b in j) for a in i)

    return Phi(i, j, grid(left), grid(right), *map(random, sides))


def _powers_of_two(rank: int) -> tuple[int, ...]:
    """Return 1, 2, 4, ... and the rank itself."""
    return (*(1 << n for n in range(rank.bit_length()) if 1 << n < rank), rank)


def mean_phi(modules: Sequence[ModuleDiff]) -> Phi | None:
    """Return the mean of phi over the modules with the commonest ranks. None if no module has a phi."""
    grids = [m.phi for m in modules if m.phi]
    if not grids:
        return None
    ((common, _),) = Counter((p.i, p.j) for p in grids).most_common(1)
    members = [p for p in grids if (p.i, p.j) == common]

    def mean(name: str) -> tuple[tuple[float, ...], ...]:
        values = np.mean([getattr(p, name) for p in members], 0)
        return tuple(tuple(map(six_digits, row)) for row in values.tolist())

    return Phi(*common, mean("left"), mean("right"), mean("random_left"), mean("random_right"))
