"""Compare the tensors of adapters other than factors: biases, replaced weights, trained rows, DoRA's magnitudes."""

from __future__ import annotations

from collections.abc import Sequence

from ...adapters.adapter import Adapter
from ...adapters.updates.add import AddDelta
from ...adapters.updates.update import UpdateSpec
from ...files.tensor_compare import Comparison, compare
from ...files.tensor_ref import TensorRef, finite_norm, require_finite
from ...numerics.arrays import Numbers
from ...views.diff_adapters import ValueDiff
from .aligned import AlignedModule

SAME = 1e-6  # relative distance up to which two deltas are one: float32 factors of the same product differ so much


def compare_values(a: Adapter, b: Adapter, aligned: Sequence[AlignedModule]) -> list[ValueDiff]:
    """Compare the tensors other than factors."""
    rows = []
    for module in aligned:
        first, second = module.updates
        roles = [_values_of(spec) if spec else {} for spec in (first, second)]
        for role in dict.fromkeys([*roles[0], *roles[1]]):
            sides = [
                TensorRef(adapter.file, names[role]) if role in names else None
                for adapter, names in zip((a, b), roles, strict=True)
            ]
            scales = [spec.scale if spec and spec.cls is AddDelta else 1.0 for spec in (first, second)]
            meanings = [_meaning(spec) if spec else None for spec in (first, second)]
            label = f"{module.name} {role}" if role != "value" else module.name
            kind = next(spec.kind for spec, side in zip((first, second), sides, strict=True) if spec and side)
            rows.append(_value_diff(label, kind, sides, scales, meanings[0] == meanings[1]))
    return rows


def is_same_value(kind: str, relative: float) -> bool:
    """Return whether a tensor other than a factor is equal on both sides; a scaled bias up to rounding."""
    return relative <= (SAME if kind == "add" else 0)


def _values_of(spec: UpdateSpec) -> dict[str, str]:
    """Return the tensors other than factors by role: all of a kind without factors, or DoRA's magnitudes."""
    factors = spec.cls.without_norm(spec).tensors if spec.rank else {}
    return {role: key for role, key in spec.tensors.items() if role not in factors}


def _meaning(spec: UpdateSpec) -> object:
    """Return the properties, besides shapes, that two updates must share so that their values compare."""
    if spec.rank:
        return spec.cls.norm_axis(spec, False)
    return spec.detail, 1.0 if spec.cls is AddDelta else spec.scale  # which scales what is compared


def _value_diff(
    name: str, kind: str, sides: Sequence[TensorRef | None], scales: Sequence[float], same_meaning: bool
) -> ValueDiff:
    """Compare a tensor other than a factor. Raise InputError for nan and inf."""
    for side in sides:
        if side:
            require_finite(side)
    norms = [None if side is None else compare(side, side).norms[0] for side in sides]
    norm_a, norm_b = (None if x is None else x * abs(scale) for x, scale in zip(norms, scales, strict=True))
    first, second = sides
    if not (first and second and first.spec.shape == second.spec.shape and same_meaning):
        return ValueDiff(name, kind, norm_a, norm_b, 1.0)
    comparison = compare(first, second) if scales[0] == scales[1] else _compare_scaled(first, second, scales)
    largest = max(comparison.norms[:2])
    relative = comparison.norms[2] / largest if largest else float(comparison.changed > 0)
    return ValueDiff(name, kind, norm_a, norm_b, relative)


def _compare_scaled(first: TensorRef, second: TensorRef, scales: Sequence[float]) -> Comparison:
    """Compare two biases, each times its scale."""
    x, y = (side.file.numbers(side.name).wide() * s for side, s in zip((first, second), scales, strict=True))
    return Comparison(False, (finite_norm(Numbers.of(x)), finite_norm(Numbers.of(y)), finite_norm(Numbers.of(y - x))))
