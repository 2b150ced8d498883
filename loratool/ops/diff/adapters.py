"""Compare two adapters module by module in factor space: sizes, distances, angles, and the paper's phi, from QR cores.

All numbers are those of the deltas and not of their factors, so that one delta in two factorizations is equal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...adapters.adapter import Adapter
from ...adapters.updates.add import AddDelta
from ...adapters.updates.update import UpdateSpec
from ...files.tensor_compare import Comparison, compare
from ...files.tensor_ref import TensorRef, norm, require_finite
from ...numerics.factored_svd import principal_angles, random_similarity, subspace_similarity
from ...streaming.workers import Progress
from .aligned import AlignedModule, LoadedModule, load_modules

SAME = 1e-6  # relative distance up to which two deltas are one: float32 factors of the same product differ so much


@dataclass(frozen=True)
class Phi:
    """phi(i, j) of the first i singular directions of A's delta and the first j of B's (Hu et al., equation 4).

    Attributes:
        i, j: powers of 2 and the ranks.
        left, right: on the output and on the input side, i rows and j columns each.
        random_left, random_right: the means of random subspaces.
    """

    i: tuple[int, ...]
    j: tuple[int, ...]
    left: tuple[tuple[float, ...], ...]
    right: tuple[tuple[float, ...], ...]
    random_left: tuple[tuple[float, ...], ...]
    random_right: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class ModuleDiff:
    """One module of A and B; D is its delta on a side (of DoRA before the norm).

    Attributes:
        rank_a, rank_b, norm_a, norm_b: the rank and ||D||, 0 on a side without the module.
        distance: ||D_B - D_A||.
        relative: ||D_B - D_A|| / max(||D_A||, ||D_B||); 1 if it is on one side only.
        same: whether that is 0 but for float32's rounding, whatever the factors.
        angles_left, angles_right: between the spans of the deltas on the output and the input side, in radians, rising;
            None for stacks of experts and where a delta is 0.
        phi: None where the angles are.
        interference: of both (`numerics.overlaps`) over the sum of their singular values: 0 if they share no direction,
            1 if they are equal; None if it is on one side only.
        size_a, size_b: ||D|| / ||W|| with a base W.
        amplification_a, amplification_b: ||D|| / ||U^T W V|| (section 7.3) with a base W.
    """

    name: str
    kind: str
    rank_a: int
    rank_b: int
    norm_a: float
    norm_b: float
    distance: float
    relative: float
    cosine: float
    same: bool
    angles_left: tuple[float, ...] | None = None
    angles_right: tuple[float, ...] | None = None
    phi: Phi | None = None
    interference: float | None = None
    size_a: float | None = None
    size_b: float | None = None
    amplification_a: float | None = None
    amplification_b: float | None = None


@dataclass(frozen=True)
class ValueDiff:
    """A tensor that is no factor: a trained bias, a replaced weight, trained rows, DoRA's magnitudes.

    Attributes:
        norm_a, norm_b: None on a side without it.
        relative: as of modules; 1 if it is on one side only or of another shape.
    """

    name: str
    kind: str
    norm_a: float | None
    norm_b: float | None
    relative: float


def compare_modules(
    a: Adapter, b: Adapter, aligned: Sequence[AlignedModule], device: torch.device, progress: Progress | None
) -> Iterator[tuple[ModuleDiff, LoadedModule]]:
    """Yield every module that has factors on either side, and what was loaded for it.

    Raises:
        InputError: the shapes of two deltas differ, or a factor has nan or inf.
    """
    for loaded in load_modules((a, b), aligned, device, progress):
        yield _module_diff(loaded), loaded


def _module_diff(loaded: LoadedModule) -> ModuleDiff:
    sides, shared = loaded.module.factored, loaded.overlaps
    norm_a, norm_b = shared.norms.tolist()
    between, largest = float(shared.distances[0, 1]), max(norm_a, norm_b)
    missing = not all(sides)
    relative = 1.0 if missing else between / largest if largest else 0.0
    rank_a, rank_b = (update.rank if update else 0 for update in sides)
    found = ModuleDiff(
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
        return found
    i, j = int(mine.rank()[0]), int(theirs.rank()[0])
    left, right = ((getattr(mine, side)[0, :, :i], getattr(theirs, side)[0, :, :j]) for side in ("U", "V"))
    angles_left, angles_right = (tuple(principal_angles(*side).tolist()) for side in (left, right))
    return replace(found, angles_left=angles_left, angles_right=angles_right, phi=_phi(left, right))


def _phi(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> Phi:
    i, j = (_powers_of_two(side.shape[1]) for side in left)

    def grid(sides: tuple[Tensor, Tensor]) -> tuple[tuple[float, ...], ...]:
        full = subspace_similarity(*sides)
        return tuple(tuple(float(full[a - 1, b - 1]) for b in j) for a in i)

    def random(side: Tensor) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(random_similarity(a, b, len(side)) for b in j) for a in i)

    return Phi(i, j, grid(left), grid(right), random(left[0]), random(right[0]))


def _powers_of_two(rank: int) -> tuple[int, ...]:
    """Return 1, 2, 4, ... and the rank itself."""
    return (*(1 << n for n in range(rank.bit_length()) if 1 << n < rank), rank)


def compare_values(a: Adapter, b: Adapter, aligned: Sequence[AlignedModule]) -> list[ValueDiff]:
    """Compare the tensors that are no factors."""
    found = []
    for module in aligned:
        one, two = module.updates
        roles = [_values_of(spec) if spec else {} for spec in (one, two)]
        for role in dict.fromkeys([*roles[0], *roles[1]]):
            sides = [
                TensorRef(adapter.file, own[role]) if role in own else None
                for adapter, own in zip((a, b), roles, strict=True)
            ]
            scales = [spec.scale if spec and spec.cls is AddDelta else 1.0 for spec in (one, two)]
            meanings = [_meaning(spec) if spec else None for spec in (one, two)]
            label = f"{module.name} {role}" if role != "value" else module.name
            kind = next(spec.kind for spec, side in zip((one, two), sides, strict=True) if spec and side)
            found.append(_value_diff(label, kind, sides, scales, meanings[0] == meanings[1]))
    return found


def is_same_value(kind: str, relative: float) -> bool:
    """Return whether a tensor that is no factor is equal on both sides; a bias is, with its scale, up to rounding."""
    return relative <= (SAME if kind == "add" else 0)


def _values_of(spec: UpdateSpec) -> dict[str, str]:
    """Return the tensors that are no factors, by role: all of a kind without factors, DoRA's magnitudes."""
    factors = spec.cls.without_norm(spec).tensors if spec.rank else {}
    return {role: key for role, key in spec.tensors.items() if role not in factors}


def _meaning(spec: UpdateSpec) -> object:
    """Return what has to be equal for two updates' values to mean the same beside their shapes."""
    return spec.cls.norm_axis(spec, False) if spec.rank else spec.detail


def _value_diff(
    name: str, kind: str, sides: Sequence[TensorRef | None], scales: Sequence[float], same_meaning: bool
) -> ValueDiff:
    """Compare a tensor that is no factor; raise InputError for nan and inf."""
    for side in sides:
        if side:
            require_finite(side)
    norms = [None if side is None else compare(side, side).norms[0] for side in sides]
    norm_a, norm_b = (None if x is None else x * abs(scale) for x, scale in zip(norms, scales, strict=True))
    one, two = sides
    if not (one and two and one.spec.shape == two.spec.shape and same_meaning):
        return ValueDiff(name, kind, norm_a, norm_b, 1.0)
    found = compare(one, two) if scales[0] == scales[1] else _compare_scaled(one, two, scales)
    largest = max(found.norms[:2])
    relative = found.norms[2] / largest if largest else float(found.changed > 0)
    return ValueDiff(name, kind, norm_a, norm_b, relative)


def _compare_scaled(one: TensorRef, two: TensorRef, scales: Sequence[float]) -> Comparison:
    """Compare two biases, each times its scale."""
    x, y = (side.file.tensor(side.name).double() * s for side, s in zip((one, two), scales, strict=True))
    return Comparison(False, (norm(x), norm(y), norm(y - x)))


def mean_phi(modules: Sequence[ModuleDiff]) -> Phi | None:
    """Return the mean of phi over the modules whose ranks are the commonest; None if no module has a phi."""
    grids = [m.phi for m in modules if m.phi]
    if not grids:
        return None
    ((common, _),) = Counter((p.i, p.j) for p in grids).most_common(1)
    members = [p for p in grids if (p.i, p.j) == common]

    def mean(name: str) -> tuple[tuple[float, ...], ...]:
        values = torch.tensor([getattr(p, name) for p in members], dtype=torch.float64).mean(0)
        return tuple(tuple(row) for row in values.tolist())

    return Phi(*common, mean("left"), mean("right"), mean("random_left"), mean("random_right"))
