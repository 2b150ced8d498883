"""Compare two adapters module by module in factor space: sizes, distances, angles, and the paper's phi, from QR cores.

Modules of equal shapes go through together. All numbers are those of the deltas and not of their factors, so that one
delta in two factorizations is equal.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...adapters.adapter import Adapter
from ...adapters.stacked import load_stacked_factors
from ...adapters.updates.add import AddDelta
from ...adapters.updates.update import UpdateSpec
from ...architectures.components import component_of
from ...architectures.prefixes import CONTAINER_PREFIXES, KOHYA_COMPONENTS
from ...architectures.renames import RENAMES, canonical
from ...binding.model_pairs import missing_prefix
from ...binding.resolve import strip_wrappers
from ...errors import InputError
from ...files.tensor_compare import Comparison, compare
from ...files.tensor_ref import TensorRef, norm, require_finite
from ...numerics.factored_svd import (
    FactoredSVD,
    cosine,
    distance,
    factored_svd,
    inner,
    principal_angles,
    random_similarity,
    subspace_similarity,
)
from ...streaming.workers import Progress

SAME = 1e-6  # relative distance up to which two deltas are one: float32 factors of the same product differ so much


BATCH = 1 << 24  # numbers of factors held at a time


# (name, the update that A has there, the one that B has)
ModulePair = tuple[str, UpdateSpec | None, UpdateSpec | None]


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


def pair_modules(a: Adapter, b: Adapter) -> list[ModulePair]:
    """Pair the updates of both by one name, in A's order.

    Names are paths without wrappers, of today's transformers. They are flattened if either side's are; kohya's prefixes
    are then the components that they mean. If few names are on both sides, renames of one model type and a prefix that
    one side does not have are tried.
    """
    flat = a.flattened or b.flattened
    one, two = (_by_key(adapter, flat, ()) for adapter in (a, b))
    if len(one.keys() & two.keys()) * 2 < min(len(one), len(two)):
        tried = [[_by_key(adapter, flat, types) for adapter in (a, b)] for types in ((), *((t,) for t in RENAMES))]
        one, two = max(tried, key=_count_matches)
    heads = KOHYA_COMPONENTS.values() if flat else {path.split(".")[0] + "." for path in {*one, *two}}
    prefix = missing_prefix(set(one), set(two), heads)
    if prefix is not None and _is_one_component(*prefix):
        longer, shorter = prefix
        two = {longer + path.removeprefix(shorter): spec for path, spec in two.items()}
    return [(name, one.get(name), two.get(name)) for name in [*one, *(name for name in two if name not in one)]]


def _count_matches(sides: Sequence[Mapping[str, UpdateSpec]]) -> int:
    """Count the names that have an update on both sides; none if the shapes say that it is an accident."""
    pairs = [(sides[0][name], sides[1][name]) for name in sides[0].keys() & sides[1].keys()]
    return len(pairs) if all(one.shape == two.shape for one, two in pairs) else 0


def _is_one_component(one: str, two: str) -> bool:
    """Return whether two prefixes can mean one component: no encoder is a decoder, no text encoder the second."""
    if not (one and two):
        return True
    components = [component_of(f"{prefix[:-1]}.")[0] for prefix in (one, two)]
    are_known = all(
        component or prefix[:-1] in CONTAINER_PREFIXES for component, prefix in zip(components, (one, two), strict=True)
    )
    return are_known and len({*components} - {None}) < 2


def _by_key(adapter: Adapter, flat: bool, types: tuple[str, ...]) -> dict[str, UpdateSpec]:
    found = {_key(module, adapter, flat, types): spec for module, spec in adapter.updates.items()}
    if len(found) < len(adapter.updates):
        raise InputError("has two modules of one name, but for their wrappers", culprit=adapter.name)
    return found


def _key(module: str, adapter: Adapter, flat: bool, types: tuple[str, ...]) -> str:
    if adapter.flattened:
        prefix = next((p for p in KOHYA_COMPONENTS if module.startswith(p)), "")
        return KOHYA_COMPONENTS.get(prefix, "") + module.removeprefix(prefix)
    path = canonical(strip_wrappers(module), types)
    return path.replace(".", "_") if flat else path


def compare_modules(
    a: Adapter,
    b: Adapter,
    aligned: Sequence[ModulePair],
    device: torch.device,
    progress: Progress | None,
) -> Iterator[tuple[ModuleDiff, FactoredSVD | None, FactoredSVD | None]]:
    """Yield every module that has factors on either side, with the SVDs of its deltas, each a stack (E, ...).

    Raises:
        InputError: the shapes of two deltas differ, or a factor has nan or inf.
    """
    found = [(name, one, two) for name, one, two in aligned if (one and one.rank) or (two and two.rank)]
    for name, one, two in found:
        if one and two and one.rank and two.rank and not _fit_together(one, two):
            raise InputError(
                f"is {one.shape} in {a.name} and {two.shape} in {b.name}: these are of different models", culprit=name
            )
    done, total = 0, sum(map(_nbytes, found))
    for batch in _batches(found):
        svd_a, svd_b = _svds(a, [one for _, one, _ in batch], device), _svds(b, [two for _, _, two in batch], device)
        for i, ((name, one, two), numbers) in enumerate(zip(batch, _numbers(svd_a, svd_b), strict=True)):
            mine, theirs = _member(svd_a, i), _member(svd_b, i)
            yield _module_diff(name, one, two, numbers, mine, theirs), mine, theirs
        done += sum(map(_nbytes, batch))
        if progress:
            progress(done, total)


def _fit_together(one: UpdateSpec, two: UpdateSpec) -> bool:
    """Return whether two updates are of one tensor, whose kernel one of them may have flattened."""
    if one.shape == two.shape or one.cls.stack or two.cls.stack:
        return one.shape == two.shape
    kinds = {each.cls.without_norm(each).cls for each in (one, two)}
    return len(kinds) > 1 and (one.cls.fits(one, two.shape) or two.cls.fits(two, one.shape))


def _nbytes(entry: ModulePair) -> int:
    _, one, two = entry
    return sum(spec.nbytes for update in (one, two) if update for spec in update.specs.values())


def _batches(found: Sequence[ModulePair]) -> Iterator[list[ModulePair]]:
    """Group entries whose factors have equal shapes, as many as memory should hold."""
    groups: dict[object, list[ModulePair]] = {}
    for entry in found:
        groups.setdefault(tuple(_shapes(spec) for spec in entry[1:]), []).append(entry)
    for group in groups.values():
        numbers = sum(_count_numbers(spec) for spec in group[0][1:] if spec)
        count = max(1, BATCH // max(1, numbers))
        for start in range(0, len(group), count):
            yield group[start : start + count]


def _shapes(spec: UpdateSpec | None) -> tuple[object, ...]:
    if not (spec and spec.rank):
        return ()
    inner = spec.cls.without_norm(spec)
    return (inner.cls, inner.experts, *sorted((role, each.shape) for role, each in inner.specs.items()))


def _count_numbers(spec: UpdateSpec) -> int:
    """Return how many numbers the factors have that the update's tensors multiply out to."""
    if not spec.rank:
        return 0
    out, columns = spec.cls.flat(spec)
    return spec.experts * spec.rank * ((out or 0) + (columns or 0))


def _svds(adapter: Adapter, specs: Sequence[UpdateSpec | None], device: torch.device) -> FactoredSVD | None:
    """Return the SVDs of N modules as (N, E, ...); None if this side has none of them."""
    pairs = [load_stacked_factors(adapter, spec) for spec in specs if spec and spec.rank]
    if not pairs:
        return None
    return factored_svd(*(torch.stack(side).to(device) for side in zip(*pairs, strict=True)))


def _member(side: FactoredSVD | None, i: int) -> FactoredSVD | None:
    return None if side is None else FactoredSVD(side.U[i], side.S[i], side.V[i])


def _numbers(one: FactoredSVD | None, two: FactoredSVD | None) -> list[tuple[float, float, float, float]]:
    """Return (||D_A||, ||D_B||, ||D_B - D_A||, cosine) of each module of a batch, over its stack."""
    there = one or two
    assert there is not None
    zero = there.S.new_zeros(there.S.shape[:2])
    norms = [_over_stack(side.norm) if side else zero[:, 0] for side in (one, two)]
    if one and two:
        between = _over_stack(distance(one, two))
        product = inner(one, two).sum(1)
        both = norms[0] * norms[1]
        angle = torch.where(both == 0, 0.0, product / torch.where(both == 0, 1.0, both)).clamp(-1.0, 1.0)
        if there.S.shape[1] == 1:
            angle = cosine(one, two)[:, 0]
    else:
        between, angle = norms[0] + norms[1], zero[:, 0]
    return list(zip(*(column.tolist() for column in (*norms, between, angle)), strict=True))


def _over_stack(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=1)
    return norm


def _module_diff(
    name: str,
    one: UpdateSpec | None,
    two: UpdateSpec | None,
    numbers: tuple[float, float, float, float],
    mine: FactoredSVD | None,
    theirs: FactoredSVD | None,
) -> ModuleDiff:
    norm_a, norm_b, between, angle = numbers
    largest = max(norm_a, norm_b)
    missing = not (one and one.rank and two and two.rank)
    relative = 1.0 if missing else between / largest if largest else 0.0
    kind = next(spec.kind for spec in (one, two) if spec and spec.rank)
    rank_a, rank_b = (spec.rank if spec else 0 for spec in (one, two))
    found = ModuleDiff(
        name=name,
        kind=kind,
        rank_a=rank_a,
        rank_b=rank_b,
        norm_a=norm_a,
        norm_b=norm_b,
        distance=between,
        relative=relative,
        cosine=angle,
        same=not missing and relative <= SAME,
    )
    if not (mine and theirs and len(mine.S) == 1 and norm_a and norm_b):
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


def compare_values(a: Adapter, b: Adapter, aligned: Sequence[ModulePair]) -> list[ValueDiff]:
    """Compare the tensors that are no factors."""
    found = []
    for name, one, two in aligned:
        roles = [_values_of(spec) if spec else {} for spec in (one, two)]
        for role in dict.fromkeys([*roles[0], *roles[1]]):
            sides = [
                TensorRef(adapter.file, own[role]) if role in own else None
                for adapter, own in zip((a, b), roles, strict=True)
            ]
            scales = [spec.scale if spec and spec.cls is AddDelta else 1.0 for spec in (one, two)]
            meanings = [_meaning(spec) if spec else None for spec in (one, two)]
            label = f"{name} {role}" if role != "value" else name
            kind = next(spec.kind for spec, side in zip((one, two), sides, strict=True) if spec and side)
            found.append(_value_diff(label, kind, sides, scales, meanings[0] == meanings[1]))
    return found


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


def total_distances(modules: Sequence[ModuleDiff]) -> tuple[float, float, float, float]:
    """Return (||D_A||, ||D_B||, ||D_B - D_A||, cosine) of all modules together."""
    norm_a, norm_b, between = (
        math.hypot(*(getattr(m, name) for m in modules)) for name in ("norm_a", "norm_b", "distance")
    )
    product = math.fsum(m.cosine * m.norm_a * m.norm_b for m in modules)
    return norm_a, norm_b, between, product / (norm_a * norm_b) if norm_a and norm_b else 0.0


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
